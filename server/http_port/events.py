"""Writes the events of a stream by hand: only the text of a chunk is encoded, all around it was made once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from jaxserve.frontend.chat_format import ReplyPlan
from jaxserve.frontend.delta import Delta
from jaxserve.frontend.openai import CHAT_URL
from jaxserve.frontend.openai_replies import ReplyDeltas
from jaxserve.frontend.openai_responses import Answer, response_id, usage

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
    """

    def __init__(self, head: StreamHead, index: int, *, shows_all: bool = False, token_ids: bool = False):
        self._chat = head.is_chat
        begin = b'{"index":%d,' % index
        self._begin = head.prefix + begin + (b'"delta":{"content":' if self._chat else b'"text":')
        # The first chunk of a chat has the role.
        self._first = head.prefix + begin + b'"delta":{"role":"assistant","content":' if self._chat else self._begin
        self._rest = (b"}" if self._chat else b"") + b',"logprobs":null,"finish_reason":'
        self._behind = head.suffix
        self._middle = self._rest + b"null}" + head.suffix
        self._begun = False
        self._shows_all = shows_all or token_ids
        self._token_ids = token_ids

    def of(self, delta: Delta) -> bytes:
        """Returns the event of a delta; empty for one that has nothing to show."""
        text = delta.text
        if not text and delta.finish_reason is None and not self._shows_all:
            return b""
        begin = self._begin if self._begun else self._first
        self._begun = True
        if delta.finish_reason is None and not self._token_ids:
            return begin + _encode(text) + self._middle
        return self._full(begin, text, delta)

    def _full(self, begin: bytes, text: str, delta: Delta) -> bytes:
        reason: Any = None if delta.finish_reason is None else delta.finish_reason.value
        ids = b',"token_ids":' + _encode(delta.token_ids) if self._token_ids else b""
        return begin + _encode(text) + self._rest + _encode(reason) + ids + b"}" + self._behind

    def echo(self, text: str) -> bytes:
        """Returns the event with which a choice begins that shows its prompt."""
        self._begun = True
        return self._first + _encode(text) + self._middle


class ReplyEvents:
    """Makes the events of one choice of a chat whose replies are parsed: as `ChoiceEvents`, with other deltas.

    Args:
        head: of the response.
        index: of the choice.
        plan: how the reply is parsed.
        token_ids: events have the token ids, too.
    """

    def __init__(self, head: StreamHead, index: int, plan: ReplyPlan, *, token_ids: bool = False):
        self._begin = head.prefix + b'{"index":%d,"delta":' % index
        self._behind = head.suffix
        self._deltas = ReplyDeltas(plan)
        self._role: dict[str, Any] = {"role": "assistant"}  # of the first delta
        self._token_ids = token_ids

    def of(self, delta: Delta) -> bytes:
        """Returns the events of a delta; empty for one that makes nothing certain."""
        parts, reason = self._deltas.of(delta.text), None
        if delta.finish_reason is not None:
            last, reason = self._deltas.finish(delta.finish_reason.value)
            parts += last
        if not parts and (reason is not None or (self._token_ids and delta.token_ids)):
            parts = [{}]
        if parts and self._role:
            parts[0] = self._role | parts[0]
            self._role = {}
        events = [self._event(part, None, None) for part in parts[:-1]]
        events += [self._event(part, reason, delta) for part in parts[-1:]]
        return b"".join(events)

    def _event(self, part: dict[str, Any], reason: str | None, delta: Delta | None) -> bytes:
        """Returns one event. delta: that of which it is the last."""
        ids = b',"token_ids":' + _encode(delta.token_ids) if delta is not None and self._token_ids else b""
        rest = b',"logprobs":null,"finish_reason":' + _encode(reason) + ids + b"}"
        return self._begin + _encode(part) + rest + self._behind
