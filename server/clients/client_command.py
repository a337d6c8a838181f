"""Answers prompts on the command line: one, those of standard input, or a dialogue; each on its own or as a chat."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from jaxserve.serving.clients.client_failures import FAILURES, Failure, failure_of
from jaxserve.serving.clients.client_output import JsonOutput, Output, TextOutput
from jaxserve.serving.clients.client_results import Chunk, Conversation, holds_news, join_samples
from jaxserve.serving.clients.client_target import AnyClient, ServerTarget

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_COMMANDS = ("/reset", "/quit", "/help")
_HELP = "/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C cancels an answer."


class _PromptError(Exception):
    """A prompt that cannot be sent; the text is one line."""


@dataclasses.dataclass(frozen=True)
class ClientOptions:
    """Holds the options of one run, which apply to every prompt.

    Attributes:
        params: plain values of the sampling parameters that are given; the server has its own defaults of the others.
        fields: tenant and priority.
        timeout: seconds for each answer, or None.
        prompt: the prompt of the command line; None reads standard input.
        dialogue: prompts are asked for where standard input is a terminal.
        whole: all of standard input is one prompt; else each line is.
        escapes: prompts have escapes such as backslash and n.
        newline: each prompt ends with a newline.
        chat: prompts are turns of one conversation, which the model's chat template renders.
        system: system prompt of the conversation; "" is none.
        json: answers and errors are JSON lines. json_events: also each piece of an answer.
        wait: seconds to wait until the server is ready.
    """

    params: Mapping[str, Any]
    fields: Mapping[str, Any]
    timeout: float | None = None
    prompt: str | None = None
    dialogue: bool = False
    whole: bool = False
    escapes: bool = False
    newline: bool = False
    chat: bool = False
    system: str = ""
    json: bool = False
    json_events: bool = False
    wait: float = 0.0


def unescape(text: str) -> str:
    r"""Replaces the escapes \n, \t, \r and \\ by the characters they denote; any other backslash is kept."""
    return re.sub(r"\\([ntr\\])", lambda match: _ESCAPES[match.group(1)], text)


def run_client(target: ServerTarget, options: ClientOptions) -> int:
    """Answers the prompts; returns the exit code: 0, 1 when a request failed, 130 after Ctrl-C."""
    with contextlib.suppress(AttributeError, ValueError):  # a stand-in for stdout need not have it
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    output = JsonOutput(options.json_events) if options.json or options.json_events else TextOutput()
    try:
        with target.open() as client:
            if options.wait:
                client.wait_ready(options.wait)
            answers = _Answers(client, options, output)
            if options.dialogue and sys.stdin.isatty():
                return _converse(answers, client, target, options, output)
            return _answer_all(answers, _prompts(options), target, output)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone; nothing is left to do or say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except _PromptError as error:
        output.failure(Failure("INVALID_ARGUMENT", str(error)))
    except TimeoutError as error:
        output.failure(Failure("UNAVAILABLE", str(error)))
    except FAILURES as error:
        output.failure(failure_of(error, target))
    return EXIT_FAILED


class _Answers:
    """Streams answers to the output, and in a chat keeps the conversation."""

    def __init__(self, client: AnyClient, options: ClientOptions, output: Output):
        self._client = client
        self._options = options
        self._output = output
        self._turns: list[dict[str, str]] = []
        self.commands = _COMMANDS if options.chat else ()

    def reset(self) -> None:
        """Forgets the conversation."""
        self._turns = []

    def answer(self, text: str) -> None:
        """Streams the answer to one prompt. A turn that fails or is canceled leaves no trace in the conversation."""
        options = self._options
        prompt = self._prompt(text)
        question = {"role": "user", "content": prompt}
        sent: str | Conversation = prompt
        if options.chat:
            system = [{"role": "system", "content": options.system}] if options.system else []
            sent = Conversation([*system, *self._turns, question])
        chunks: list[Chunk] = []
        news = holds_news(options.params)
        is_one = options.params is None or options.params.get("n", 1) == 1
        stream = self._client.generate(sent, options.params, timeout=options.timeout, **options.fields)
        with contextlib.closing(stream):  # Ctrl-C leaves through here, which cancels the call
            for chunk in stream:
                if not news:
                    chunks = [one for one in chunks if one.index != chunk.index]
                chunks.append(chunk)
                if is_one:
                    self._output.chunk(chunk, news)
        completions = join_samples(chunks, options.params)
        for completion in completions:
            if not is_one:  # samples arrive side by side, and are shown one after the other
                for chunk in chunks:
                    if chunk.index == completion.index:
                        self._output.chunk(chunk, news)
            self._output.answer(prompt, completion)
        if options.chat:
            self._turns += [question, {"role": "assistant", "content": completions[0].text}]

    def _prompt(self, text: str) -> str:
        """Returns the prompt to send for the user's input."""
        if self._options.escapes:
            text = unescape(text)
        if self._options.newline and not text.endswith("\n"):
            text += "\n"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _PromptError(f"the prompt is not valid UTF-8 at character {error.start}") from error
        return text


def _answer_all(answers: _Answers, prompts: Iterator[str], target: ServerTarget, output: Output) -> int:
    """Answers the prompts in order. One that the server refuses is reported, and the others are still answered."""
    code = 0
    for text in prompts:
        if text in answers.commands:
            if text == "/quit":
                break
            _obey(text, answers, output)
            continue
        try:
            answers.answer(text)
        except FAILURES as error:
            failure = failure_of(error, target)
            output.failure(failure, text)
            code = EXIT_FAILED
            if failure.unreachable:
                break
    return code


def _converse(
    answers: _Answers, client: AnyClient, target: ServerTarget, options: ClientOptions, output: Output
) -> int:
    """Reads prompts from a terminal until Ctrl-D; Ctrl-C ends an answer, or the program where a prompt is expected."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and a history
    info = client.model_info()
    keys = _HELP if options.chat else "Ctrl-C ends an answer, Ctrl-D the program."
    output.note(f"{info.name}, context {info.max_model_len} tokens. {keys}")
    question = "" if isinstance(output, JsonOutput) else "> "
    while True:
        try:
            text = input(question)
        except EOFError:
            output.note("")
            return 0
        if not text:
            continue
        if text in answers.commands:
            if text == "/quit":
                return 0
            _obey(text, answers, output)
            continue
        try:
            answers.answer(text)
        except KeyboardInterrupt:
            output.note("(canceled)")
        except _PromptError as error:
            output.failure(Failure("INVALID_ARGUMENT", str(error)), text)
        except FAILURES as error:
            output.failure(failure_of(error, target), text)


def _obey(command: str, answers: _Answers, output: Output) -> None:
    if command == "/reset":
        answers.reset()
        output.note("(the conversation is forgotten)")
    else:
        output.note(_HELP)


def _prompts(options: ClientOptions) -> Iterator[str]:
    """Yields the prompts of the command line or of standard input, as they arrive."""
    if options.prompt is not None:
        yield options.prompt
    elif options.whole:
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
