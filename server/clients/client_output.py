"""Prints what the command line client has to say: text for people, or JSON lines for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from jaxserve.serving.clients.client_failures import Failure
from jaxserve.serving.clients.client_results import Chunk, Completion, chunk_record
from jaxserve.serving.clients.embed_requests import Embeddings


class TextOutput:
    """Prints answers as their text arrives; errors and notes go to standard error."""

    def __init__(self) -> None:
        self._open_line = False

    def chunk(self, chunk: Chunk) -> None:
        """Prints what is new of an answer."""
        if chunk.text:
            print(chunk.text, end="", flush=True)
            self._open_line = not chunk.text.endswith("\n")

    def answer(self, prompt: str, completion: Completion) -> None:
        """Ends an answer's last line."""
        if self._open_line or not completion.text:
            print(flush=True)
        self._open_line = False

    def embedding(self, prompt: str, found: Embeddings) -> None:
        """Prints an embedding as a line of JSON."""
        print(json.dumps(found.embeddings[0]), flush=True)

    def failure(self, failure: Failure, prompt: str | None = None) -> None:
        """Prints an error, on a line of its own where an answer has begun on a terminal."""
        self._end_line()
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

    def chunk(self, chunk: Chunk) -> None:
        """Prints a piece of an answer, where these are wanted."""
        if self._events and chunk.finish_reason is None:
            record = chunk_record(chunk)
            self._print("chunk", {name: record[name] for name in ("request_id", "token_ids", "text")})

    def answer(self, prompt: str, completion: Completion) -> None:
        """Prints an answer."""
        record = dataclasses.asdict(completion) | {"finish_reason": completion.finish_reason.value}
        self._print("answer", {"prompt": prompt} | record)

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
