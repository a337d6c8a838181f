"""Runs the command line client: `python -m jaxserve.client "PROMPT"`, from standard input, or interactive.

One prompt on the command line; `-` or a pipe: one prompt a line (--whole: all of it is one); neither: a dialogue, each
prompt on its own. Text is printed as its tokens arrive. Decoding is greedy unless --temperature says otherwise.

A prompt may begin with a dash ("-5+3"), and so may the value of an option (--stop --- ends the answer before ---). What
looks like an option and is none is refused; after -- everything is the prompt, a dash and an option's name too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import grpc

from jaxserve.config.sampling_fields import Flag, Ids, Number, SamplingField, Texts
from jaxserve.request import SAMPLING_FIELDS, SamplingParams
from jaxserve.serving.client_credentials import KEY_VARIABLE, Credentials
from jaxserve.serving.grpc_client import DEFAULT_ADDRESS, Client, join

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

_MARK = "="
"""Stands before the values of options on their way through argparse, which takes a value of two dashes away."""

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


class _PromptError(Exception):
    """A prompt that cannot be sent; the text is one line."""


@dataclasses.dataclass(frozen=True)
class _Options:
    """Holds the options of one run, which apply to every prompt."""

    params: SamplingParams
    fields: dict[str, Any]
    timeout: float | None
    escapes: bool
    newline: bool
    json: bool

    def prompt(self, text: str) -> str:
        """Returns the prompt to send for the user's input."""
        if self.escapes:
            text = unescape(text)
        if self.newline and not text.endswith("\n"):
            text += "\n"
        return text


def unescape(text: str) -> str:
    r"""Replaces the escapes \n, \t, \r and \\ by the characters they denote; any other backslash is kept."""
    return re.sub(r"\\([ntr\\])", lambda match: _ESCAPES[match.group(1)], text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the client; returns the exit code: 0, 1 when a request failed, 2 for faulty options, 130 after Ctrl-C."""
    parser, actions = _parser()
    try:
        others, prompt, literal = split_prompt(sys.argv[1:] if arguments is None else arguments, actions)
    except ValueError as error:
        parser.error(str(error))
    parsed = parser.parse_args(others)
    parsed.prompt, parsed.from_stdin = prompt, prompt is None or (prompt == "-" and not literal)
    try:
        options = _options(parsed)
        credentials = Credentials(parsed.api_key, parsed.tls, parsed.ca, parsed.certificate, parsed.private_key)
    except ValueError as error:
        parser.error(str(error))
    with contextlib.suppress(AttributeError, ValueError):  # a stand-in for stdout need not have it
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with Client(parsed.address, credentials) as client:
            if parsed.wait:
                client.wait_ready(parsed.wait)
            if parsed.prompt is None and not parsed.whole and sys.stdin.isatty():
                return _converse(client, options)
            return _answer_all(client, _prompts(parsed), options)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone; nothing is left to do or say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (OSError, _PromptError) as error:
        return _fail(str(error))
    except grpc.RpcError as error:
        return _fail(_describe(error, parsed.address))


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


def _answer_all(client: Client, prompts: Iterator[str], options: _Options) -> int:
    """Answers the prompts in order. One that the server refuses is reported, and the others are still answered."""
    code = 0
    for text in prompts:
        try:
            _answer(client, text, options)
        except grpc.RpcError as error:
            if _code(error) is grpc.StatusCode.UNAVAILABLE:
                raise
            code = _fail(_describe(error, client.address))
    return code


def _converse(client: Client, options: _Options) -> int:
    """Reads prompts from a terminal until Ctrl-D; Ctrl-C ends an answer, or the program where a prompt is expected."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and a history
    info = client.model_info()
    print(
        f"{info.name}, context {info.max_model_len} tokens. Ctrl-C ends an answer, Ctrl-D the program.", file=sys.stderr
    )
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return 0
        if not text:
            continue
        try:
            _answer(client, text, options)
        except KeyboardInterrupt:
            print("\n(cancelled)", file=sys.stderr)
        except _PromptError as error:
            _fail(str(error))
        except grpc.RpcError as error:
            _fail(_describe(error, client.address))


def _answer(client: Client, text: str, options: _Options) -> None:
    """Streams one answer to standard output."""
    prompt = options.prompt(text)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise _PromptError(f"the prompt is not valid UTF-8 at character {error.start}") from error
    chunks = []
    stream = client.generate(prompt, options.params, timeout=options.timeout, **options.fields)
    with contextlib.closing(stream):  # Ctrl-C leaves through here, which cancels the call
        for chunk in stream:
            chunks.append(chunk)
            if not options.json:
                print(chunk.text, end="", flush=True)
    completion = join(chunks)
    if options.json:
        record = dataclasses.asdict(completion) | {"finish_reason": completion.finish_reason.value}
        print(json.dumps({"prompt": prompt} | record, ensure_ascii=False), flush=True)
    elif not completion.text.endswith("\n"):
        print(flush=True)


def _prompts(parsed: argparse.Namespace) -> Iterator[str]:
    """Yields the prompts of the command line or of standard input, as they arrive."""
    if not parsed.from_stdin:
        yield parsed.prompt
    elif parsed.whole:
        yield _decoded(sys.stdin.buffer.read(), "standard input")
    else:
        for number, line in enumerate(sys.stdin.buffer, start=1):
            text = _decoded(line, f"line {number}").removesuffix("\n").removesuffix("\r")
            if text:
                yield text


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _PromptError(f"{where} is not valid UTF-8 at byte {error.start}") from error


def _options(parsed: argparse.Namespace) -> _Options:
    """Builds the options from the parsed arguments. Raises ValueError naming the option."""
    params: dict[str, Any] = {name: getattr(parsed, name) for name in SAMPLING_FIELDS}
    if parsed.escapes:
        params["stop"] = [unescape(text) for text in parsed.stop]
    if parsed.timeout is not None and not parsed.timeout > 0:
        raise ValueError(f"timeout is {parsed.timeout:g}; it must be above 0 seconds")
    if not -(2**31) <= parsed.priority < 2**31:
        raise ValueError(f"priority is {parsed.priority}; it must be from {-(2**31)} to {2**31 - 1}")
    return _Options(
        params=SamplingParams(**params),
        fields={"tenant": parsed.tenant, "priority": parsed.priority},
        timeout=parsed.timeout,
        escapes=parsed.escapes,
        newline=parsed.newline,
        json=parsed.json,
    )


def _parser() -> tuple[argparse.ArgumentParser, list[argparse.Action]]:
    """Returns the parser and its options."""
    description = (__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser(prog="jaxserve.client", description=description, add_help=False)
    actions = []

    def add(*names: str, **settings: Any) -> None:
        if settings.get("action") in (None, "append"):
            settings["type"] = _marked(settings.get("type", str))
        actions.append(parser.add_argument(*names, **settings))

    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="the prompt; '-' or a pipe: standard input, one prompt a line"
    )
    add("-h", "--help", action="help", help="show this and end")
    add("--address", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help="the server (default: %(default)s)")
    add(
        "--api-key",
        metavar="KEY",
        help="API key (default: the environment variable JAXSERVE_API_KEY, which others do "
        "not see in the list of processes)",
    )
    add("--tls", action="store_true", help="connect by TLS; the system's authorities vouch for the server")
    add("--ca", metavar="FILE", help="connect by TLS; the authorities of this PEM file vouch for the server")
    add("--certificate", metavar="FILE", help="connect by TLS and show this certificate; PEM")
    add("--private-key", metavar="FILE", help="of the certificate; PEM")
    add("--wait", type=float, default=0.0, metavar="SECONDS", help="wait so long for the server to become ready")
    add("--whole", action="store_true", help="all of standard input is one prompt")
    add("-e", "--escapes", action="store_true", help=r"\n, \t, \r and \\ in prompts and stop strings are escapes")
    add("-n", "--newline", action="store_true", help="end each prompt with a newline, as the tiny model's tasks do")
    add("--json", action="store_true", help="one JSON line an answer: ids, text, finish reason and usage")
    for name, field in SAMPLING_FIELDS.items():
        add(f"--{name.replace('_', '-')}", **_sampling_option(field))
    add("--tenant", default="", metavar="NAME", help="whom the work is counted for")
    add("--priority", type=int, default=0, metavar="N", help="a higher number is more urgent (default: 0)")
    add("--timeout", type=float, metavar="SECONDS", help="give up after so many seconds")
    return parser, actions


def _sampling_option(field: SamplingField) -> dict[str, Any]:
    """Returns argparse's arguments for a sampling parameter. Decoding is greedy by default, unlike the API's."""
    default = 0.0 if field.name == "temperature" else field.default
    match field.kind:
        case Flag():
            return {"action": "store_true", "help": field.meaning}
        case Texts() | Ids():
            kind, metavar = (str, "TEXT") if isinstance(field.kind, Texts) else (int, "ID")
            return {"action": "append", "default": [], "type": kind, "metavar": metavar, "help": field.meaning}
        case _:
            shown_default = "" if default is None else f" (default: {default:g})"
            kind = float if isinstance(field.kind, Number) else int
            return {"type": kind, "default": default, "metavar": "N", "help": field.meaning + shown_default}


def _code(error: Any) -> grpc.StatusCode:
    return error.code()


def _describe(error: Any, address: str) -> str:
    """Describes a failed call in one line."""
    code, details = _code(error), " ".join((error.details() or "").split())
    if code is grpc.StatusCode.UNAVAILABLE and re.search("failed to connect|connection refused|resol", details, re.I):
        return f"no server answers at {address}; start one with: python -m jaxserve.server"
    if code is grpc.StatusCode.UNAUTHENTICATED:
        details += f" (--api-key, or the environment variable {KEY_VARIABLE})"
    return f"{code.name}: {details}"


def _fail(message: str) -> int:
    sys.stdout.flush()
    print(f"jaxserve.client: {message}", file=sys.stderr)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
