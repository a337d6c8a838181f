"""Writes the events of a stream by hand: only the text of a chunk is encoded, all around it was made once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from jaxserve.frontend.delta import Delta, PromptLogprobs
from jaxserve.frontend.openai import CHAT_URL
from jaxserve.frontend.openai_logprobs import LogprobShapes
from jaxserve.frontend.openai_responses import Answer, response_id, usage
from jaxserve.logprob_columns import LogprobColumns

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


class StreamHead:
    """Holds what all events of one response begin with. include_usage: the stream ends with the usage."""

    def __init__(self, url: str, request_id: str, model: str, created: int, include_usage: bool):
        self.is_chat = url == CHAT_URL
        kind = b"chat.completion.chunk" if self.is_chat else b"text_completion"
        self.prefix = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
            _encode(response_id(url, request_id)),
            kind,
            created,
            _encode(model),
        )
        self.include_usage = include_usage
        self.suffix = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def end(self, answers: Sequence[Answer]) -> bytes:
        """Returns the events behind the last chunk. answers: of all choices; their texts do not count."""
        if not self.include_usage:
            return DONE
        return self.prefix + b'],"usage":' + _encode(usage(answers)) + b"}\n\n" + DONE


class ChoiceEvents:
    """Makes the events of one choice of a response.

    Args:
        head: of the response.
        index: of the choice.
        shows_all: also deltas without text make events.
        token_ids: events have the token ids, too.
        logprobs: makes the log-probabilities of the events' tokens; None where there are none.
        cumulative: each event has all of the output so far.
    """

    def __init__(
        self,
        head: StreamHead,
        index: int,
        *,
        shows_all: bool = False,
        token_ids: bool = False,
        logprobs: LogprobShapes | None = None,
        cumulative: bool = False,
    ):
        self._chat = head.is_chat
        begin = b'{"index":%d,' % index
        self._begin = head.prefix + begin + (b'"delta":{"content":' if self._chat else b'"text":')
        # The first chunk of a chat has the role.
        self._first = head.prefix + begin + b'"delta":{"role":"assistant","content":' if self._chat else self._begin
        self._close = (b"}" if self._chat else b"") + b',"logprobs":'
        self._behind = head.suffix
        self._middle = self._close + b'null,"finish_reason":null}' + head.suffix
        self._begun = False
        self._shows_all = shows_all or token_ids or logprobs is not None
        self._token_ids = token_ids
        self._logprobs = logprobs
        self._cumulative = cumulative
        self._offset = 0  # length of the spelled tokens before those of the next event

    def of(self, delta: Delta) -> bytes:
        """Returns the event of a delta; empty for one that has nothing to show."""
        text = delta.text
        if not text and delta.finish_reason is None and not self._shows_all:
            return b""
        begin = self._begin if self._begun else self._first
        self._begun = True
        if delta.finish_reason is None and not self._token_ids and self._logprobs is None:
            return begin + _encode(text) + self._middle
        return self._full(begin, text, delta)

    def _full(self, begin: bytes, text: str, delta: Delta) -> bytes:
        reason: Any = None if delta.finish_reason is None else delta.finish_reason.value
        ids = b',"token_ids":' + _encode(delta.token_ids) if self._token_ids else b""
        logprobs = b"null"
        if self._logprobs is not None and delta.logprobs is not None and delta.token_ids:
            logprobs = _encode(self._logprobs.of(delta.logprobs, delta.token_ids, self._offset))
            if not self._cumulative:
                self._offset += self._logprobs.length(delta.token_ids)
        end = b',"finish_reason":' + _encode(reason) + ids + b"}"
        return begin + _encode(text) + self._close + logprobs + end + self._behind

    def echo(self, text: str, prompt: PromptLogprobs | None = None) -> bytes:
        """Returns the event with which a choice begins that shows its prompt. prompt: its log-probabilities."""
        self._begun = True
        if self._logprobs is None or prompt is None:
            return self._first + _encode(text) + self._middle
        logprobs = _encode(self._logprobs.of(LogprobColumns.unknown(0, 0), (), prompt=prompt))
        self._offset += self._logprobs.length(prompt.token_ids)
        return self._first + _encode(text) + self._close + logprobs + b',"finish_reason":null}' + self._behind
