"""Runs the command line client: `python -m jaxserve.client "PROMPT"`, from standard input, or interactive.

One prompt on the command line; `-` or a pipe: one prompt a line (--whole: all of it is one); neither: a dialogue, each
prompt on its own, or with --chat a conversation. Text is printed as its tokens arrive. Decoding is greedy unless
--temperature says otherwise. --address names a gRPC port (HOST:PORT) or an HTTP port (http://HOST:PORT).

A prompt may begin with a dash ("-5+3"), and so may the value of an option (--stop --- ends the answer before ---). What
looks like an option and is none is refused; after -- everything is the prompt, a dash and an option's name too.

Exit codes: 0; 1 when a request failed or no server answers; 2 for faulty options; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from jaxserve.config.plain_params import params_of
from jaxserve.pooling_params import PoolingParams
from jaxserve.serving.clients.client_command import ClientOptions, run_client, unescape
from jaxserve.serving.clients.client_credentials import KEY_VARIABLE, Credentials
from jaxserve.serving.clients.client_failures import Failure
from jaxserve.serving.clients.client_target import parse_target
from jaxserve.serving.clients.grpc_client import DEFAULT_ADDRESS
from jaxserve.serving.clients.sampling_flags import given_params, sampling_flags, text_params
from jaxserve.serving.clients.shell_completion import SHELLS, completion_script, options_of

_MARK = "="
"""Stands before the values of options on their way through argparse, which takes a value of two dashes away."""


class _Parser(argparse.ArgumentParser):
    """Reports faulty options as JSON too, where that is asked for."""

    as_json = False

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        if self.as_json:
            print(json.dumps(Failure("INVALID_ARGUMENT", message).record(), ensure_ascii=False), flush=True)
            self.exit(2)
        super().error(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the client; returns the exit code: 0, 1 when a request failed, 2 for faulty options, 130 after Ctrl-C."""
    parser, actions = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser.as_json = bool({"--json", "--json-events"} & set(arguments))
    try:
        others, prompt, literal = split_prompt(arguments, actions)
    except ValueError as error:
        parser.error(str(error))
    parser.as_json = bool({"--json", "--json-events"} & set(others))
    parsed = parser.parse_args(others)
    if parsed.completion:
        print(completion_script(parsed.completion, "jaxserve.client", options_of(actions)), end="")
        return 0
    from_stdin = prompt is None or (prompt == "-" and not literal)
    try:
        credentials = Credentials(parsed.api_key, parsed.tls, parsed.ca, parsed.certificate, parsed.private_key)
        target = parse_target(parsed.address, credentials)
        target.credentials.ssl_context()  # files that cannot be used are faulty options
        options = _options(parsed, None if from_stdin else prompt, dialogue=prompt is None)
    except ValueError as error:
        parser.error(str(error))
    return run_client(target, options)


def split_prompt(arguments: Sequence[str], actions: Sequence[argparse.Action]) -> tuple[list[str], str | None, bool]:
    """Splits the command line into its options and its prompt, either of which may begin with a dash.

    argparse takes every argument with a dash for an option, and refuses values with one. An option's value is whatever
    follows it. The rest is the prompt, unless it looks like an option: letters behind one dash of which all are
    options, or behind two dashes one word. Behind `--` everything is the prompt, and `--` alone is one. Returns the
    options in a form that argparse takes, the prompt, and whether it stood behind `--`. Raises ValueError for an option
    that is unknown and for a second prompt.
    """
    takes_value = {name: action.nargs != 0 for action in actions for name in action.option_strings}
    letters = "".join(name[1] for name in takes_value if len(name) == 2)
    options: list[str] = []
    prompts: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--" and (rest or prompts):
            return options, _only(prompts + rest), bool(rest)
        if re.fullmatch(f"-[{letters}]+", argument):
            options.append(argument)
        elif not re.fullmatch(r"--[A-Za-z][\w-]*(=.*)?", argument, re.DOTALL):
            prompts.append(argument)
        else:
            name, equals, value = argument.partition("=")
            name = _full_name(name, takes_value)
            if not takes_value[name]:
                options.append(name + equals + value)
            elif equals or rest:
                options.append(f"{name}={_MARK}{value if equals else rest.pop(0)}")
            else:
                options.append(name)
    return options, _only(prompts), False


def _full_name(name: str, known: Collection[str]) -> str:
    """Expands an option's name or its prefix to the full name."""
    found = [name] if name in known else [option for option in known if option.startswith(name)]
    if len(found) == 1:
        return found[0]
    near = found or difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {' or '.join(near)}? Or " if near else ""
    raise ValueError(f"there is no option {name}; {hint}put -- before it if it is the prompt")


def _marked(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Returns an argparse type for options whose values carry the mark."""

    def convert(text: str) -> Any:
        try:
            return kind(text.removeprefix(_MARK))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text.removeprefix(_MARK)!r} is no {kind.__name__}") from error

    return convert


def _only(prompts: Sequence[str]) -> str | None:
    if len(prompts) > 1:
        raise ValueError(f"{len(prompts)} prompts are given, {prompts[0]!r} and {prompts[1]!r}; put quotes around one")
    return prompts[0] if prompts else None


def _options(parsed: argparse.Namespace, prompt: str | None, dialogue: bool) -> ClientOptions:
    """Builds the options from the parsed arguments. Raises ValueError naming the option.

    prompt: that of the command line; None reads standard input. dialogue: a terminal is asked for prompts.
    """
    params = given_params(parsed)
    if parsed.escapes:
        params |= {name: [unescape(text) for text in params[name]] for name in text_params() if name in params}
    params_of(params, {})
    if parsed.timeout is not None and not parsed.timeout > 0:
        raise ValueError(f"timeout is {parsed.timeout:g}; it must be above 0 seconds")
    if not -(2**31) <= parsed.priority < 2**31:
        raise ValueError(f"priority is {parsed.priority}; it must be from {-(2**31)} to {2**31 - 1}")
    embedding = {name: getattr(parsed, name) for name in ("pooling_type", "dimensions")}
    if not parsed.embeddings and (given := [name for name, value in embedding.items() if value is not None]):
        raise ValueError(f"{given[0]} is of embeddings; use --embeddings with it")
    if parsed.embeddings and parsed.chat:
        raise ValueError("embeddings are of texts, and no conversation; leave out --chat")
    if parsed.system and not parsed.chat:
        raise ValueError("system needs a conversation; use --chat with it")
    return ClientOptions(
        params=params,
        fields={"tenant": parsed.tenant, "priority": parsed.priority},
        timeout=parsed.timeout,
        prompt=prompt,
        dialogue=dialogue and not parsed.whole,
        whole=parsed.whole,
        escapes=parsed.escapes,
        newline=parsed.newline,
        chat=parsed.chat,
        system=unescape(parsed.system) if parsed.escapes else parsed.system,
        embed=PoolingParams(**embedding) if parsed.embeddings else None,
        json=parsed.json,
        json_events=parsed.json_events,
        wait=parsed.wait,
    )


def _parser() -> tuple[_Parser, list[argparse.Action]]:
    """Returns the parser and its options."""
    description = (__doc__ or "").partition("\n\n")[2]
    parser = _Parser(prog="jaxserve.client", description=description, add_help=False)
    actions = []

    def add(*names: str, **settings: Any) -> None:
        if settings.get("action") in (None, "append"):
            settings["type"] = _marked(settings.get("type", str))
        actions.append(parser.add_argument(*names, **settings))

    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="the prompt; '-' or a pipe: standard input, one prompt a line"
    )
    add("-h", "--help", action="help", help="show this and end")
    add(
        "--address",
        default=DEFAULT_ADDRESS,
        metavar="ADDRESS",
        help="the server: HOST:PORT for gRPC, http://HOST:PORT for HTTP (default: %(default)s)",
    )
    add("--api-key", metavar="KEY", help=f"key for the server (default: {KEY_VARIABLE} of the environment)")
    add("--tls", action="store_true", help="encrypt the connection; grpcs:// and https:// addresses do so anyway")
    add("--ca", metavar="FILE", help="certificates of the authorities to trust (default: the system's); turns TLS on")
    add("--certificate", metavar="FILE", help="the client's own certificate, for servers that ask for one")
    add("--private-key", metavar="FILE", help="private key of --certificate")
    add("--wait", type=float, default=0.0, metavar="SECONDS", help="wait so long for the server to become ready")
    add("--chat", action="store_true", help="prompts are turns of one conversation; /reset forgets it, /quit ends")
    add("--system", default="", metavar="TEXT", help="system prompt of the conversation")
    add("--whole", action="store_true", help="all of standard input is one prompt")
    add("-e", "--escapes", action="store_true", help=r"\n, \t, \r and \\ in prompts and stop strings are escapes")
    add("-n", "--newline", action="store_true", help="end each prompt with a newline, as the tiny model's tasks do")
    add(
        "--embeddings",
        action="store_true",
        help="print the embedding of each prompt, a JSON list, instead of an answer",
    )
    add("--pooling-type", metavar="TYPE", help="LAST, MEAN or CLS: how --embeddings pools hidden states")
    add("--dimensions", type=int, metavar="N", help="numbers of an embedding; the model's by default")
    add("--json", action="store_true", help="one JSON line an answer: ids, text, finish reason and usage; or an error")
    add("--json-events", action="store_true", help="JSON lines of each piece of an answer too; each names its event")
    add("--completion", choices=SHELLS, help="print what completes this command in a shell, and end")
    for name, settings in sampling_flags().items():
        add(name, **settings)
    add("--tenant", default="", metavar="NAME", help="whom the work is counted for")
    add("--priority", type=int, default=0, metavar="N", help="a higher number is more urgent (default: 0)")
    add("--timeout", type=float, metavar="SECONDS", help="give up after so many seconds")
    return parser, actions


if __name__ == "__main__":
    sys.exit(main())
