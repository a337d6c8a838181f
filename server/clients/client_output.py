"""Prints what the command line client has to say: text for people, or JSON lines for programs."""

from __future__ import annotations

import json
import sys
from typing import Any

from jaxserve.serving.clients.client_failures import Failure
from jaxserve.serving.clients.client_results import Chunk, Completion, record_of
from jaxserve.serving.clients.embed_requests import Embeddings

_OF_THE_END = ("finish_reason", "usage")
"""Fields of a chunk that only the last one has."""


class TextOutput:
    """Prints answers as their text arrives; errors and notes go to standard error."""

    def __init__(self) -> None:
        self._open_line = False
        self._num_shown = 0

    def chunk(self, chunk: Chunk, news: bool) -> None:
        """Prints what is new of an answer. news: the chunk holds that; else all of the answer so far."""
        text = chunk.text if news else chunk.text[self._num_shown :]
        if text:
            print(text, end="", flush=True)
            self._open_line = not text.endswith("\n")
            self._num_shown += len(text)

    def answer(self, prompt: str, completion: Completion) -> None:
        """Ends an answer's last line."""
        if self._open_line or not completion.text:
            print(flush=True)
        self._open_line = False
        self._num_shown = 0

    def embedding(self, prompt: str, found: Embeddings) -> None:
        """Prints an embedding as a line of JSON."""
        print(json.dumps(found.embeddings[0]), flush=True)

    def failure(self, failure: Failure, prompt: str | None = None) -> None:
        """Prints an error, on a line of its own where an answer has begun on a terminal."""
        self._end_line()
        self._num_shown = 0
        print(f"jaxserve.client: {failure.line}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Tells a person something that is no answer."""
        self._end_line()
        print(text, file=sys.stderr, flush=True)

    def _end_line(self) -> None:
        if self._open_line and sys.stdout.isatty():
            print()
        sys.stdout.flush()
        self._open_line = False


class JsonOutput:
    """Prints a line of JSON for each answer and each error, all to standard output.

    events: also prints a line for each piece of an answer as it arrives; every line then names its event.
    """

    def __init__(self, events: bool = False):
        self._events = events

    def chunk(self, chunk: Chunk, news: bool) -> None:
        """Prints a piece of an answer, where these are wanted. news: does not matter here."""
        if self._events and chunk.finish_reason is None:
            record = record_of(chunk)
            self._print("chunk", {name: value for name, value in record.items() if name not in _OF_THE_END})

    def answer(self, prompt: str, completion: Completion) -> None:
        """Prints an answer."""
        self._print("answer", {"prompt": prompt} | record_of(completion))

    def embedding(self, prompt: str, found: Embeddings) -> None:
        """Prints an embedding."""
        record = {"embedding": found.embeddings[0], "usage": {"prompt_tokens": found.prompt_tokens}}
        self._print("embedding", {"prompt": prompt} | record)

    def failure(self, failure: Failure, prompt: str | None = None) -> None:
        """Prints an error, with its prompt where it concerns one."""
        self._print("error", ({} if prompt is None else {"prompt": prompt}) | failure.record())

    def note(self, text: str) -> None:
        """Says nothing: notes are for people."""

    def _print(self, event: str, record: dict[str, Any]) -> None:
        print(json.dumps(({"event": event} if self._events else {}) | record, ensure_ascii=False), flush=True)


Output = TextOutput | JsonOutput
