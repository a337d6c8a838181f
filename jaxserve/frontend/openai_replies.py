"""Writes parsed replies in OpenAI's shapes: as a message, and as the deltas of a stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from jaxserve.frontend.chat_format import ReplyPlan
from jaxserve.frontend.openai_responses import Answer
from jaxserve.frontend.parsers.pieces import CallArguments, CallStart, Content, Piece, Reasoning


class ReplyMessage:
    """Collects one reply as the message of a choice."""

    def __init__(self, plan: ReplyPlan):
        self._plan = plan
        self._parser = plan.parser()
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, list[str]]] = []

    def add(self, text: str) -> None:
        """Takes the next text of the reply."""
        self._take(self._parser.feed(text))

    def finish(self, answer: Answer) -> Answer:
        """Returns the answer with the message that its text stands for, and its finish reason. Nothing may be added
        afterwards.
        """
        self._take(self._parser.finish())
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if self._calls or reasoning else ""),
        }
        if reasoning and self._plan.shows_reasoning:
            message |= _reasoning(reasoning)
        if self._calls:
            message["tool_calls"] = [
                {
                    "id": self._plan.call_id(),
                    "type": "function",
                    "function": {"name": name, "arguments": "".join(parts)},
                }
                for name, parts in self._calls
            ]
        reason = self._plan.finish_reason(answer.finish_reason, len(self._calls))
        return dataclasses.replace(answer, message=message, finish_reason=reason)

    def _take(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            match piece:
                case Content(text):
                    self._content.append(text)
                case Reasoning(text):
                    self._reasoning.append(text)
                case CallStart(name):
                    self._calls.append((name, []))
                case CallArguments(text):
                    self._calls[-1][1].append(text)


class ReplyDeltas:
    """Makes the deltas of one choice of a stream."""

    def __init__(self, plan: ReplyPlan):
        self._plan = plan
        self._parser = plan.parser()
        self._num_calls = 0

    def of(self, text: str) -> list[dict[str, Any]]:
        """Takes the next text of the reply and returns the deltas that are certain now."""
        return self._deltas(self._parser.feed(text))

    def finish(self, reason: str) -> tuple[list[dict[str, Any]], str]:
        """Returns the last deltas and the choice's finish reason. reason: of the output."""
        deltas = self._deltas(self._parser.finish())
        return deltas, self._plan.finish_reason(reason, self._num_calls)

    def _deltas(self, pieces: Iterable[Piece]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for piece in pieces:
            match piece:
                case Content(text):
                    deltas.append({"content": text})
                case Reasoning(text):
                    if self._plan.shows_reasoning:
                        deltas.append(_reasoning(text))
                case CallStart(name):
                    function = {"name": name, "arguments": ""}
                    call = {"index": self._num_calls, "id": self._plan.call_id(), "type": "function"}
                    deltas.append({"tool_calls": [{**call, "function": function}]})
                    self._num_calls += 1
                case CallArguments(text):
                    deltas.append({"tool_calls": [{"index": self._num_calls - 1, "function": {"arguments": text}}]})
        return deltas


def _reasoning(text: str) -> dict[str, str]:
    """Returns reasoning under both of its names: DeepSeek's, and the one that vLLM has had since."""
    return {"reasoning_content": text, "reasoning": text}
