"""What a front end tells a client about a request, and the errors with which it refuses one."""

from __future__ import annotations

import dataclasses
import enum

from jaxserve.request import FinishReason


class FrontEndError(RuntimeError):
    """A valid request that is not accepted now; the text is one line."""


class DuplicateRequestError(FrontEndError):
    """A request with this id is unfinished."""


class QueueFullError(FrontEndError):
    """As many requests are unfinished, or as much text waits to be tokenized, as may be; try again later."""


class DeadlineError(FrontEndError):
    """The deadline has passed before the request began."""


class EngineDeadError(FrontEndError):
    """The engine has ended, or is about to: no request is accepted any more."""


class Cause(enum.Enum):
    """Why a request ended with ABORT or ERROR.

    CLIENT: `abort` was called, or the stream was closed. READER: too much output waited to be read. DEADLINE: its
    deadline passed. REQUEST: this request failed, others go on. ENGINE: the engine failed, and with it every request.
    CLOSING: the front end closed first.
    """

    CLIENT = "client"
    READER = "reader"
    DEADLINE = "deadline"
    REQUEST = "request"
    ENGINE = "engine"
    CLOSING = "closing"


@dataclasses.dataclass(frozen=True)
class Delta:
    """News of one request. Exactly one delta of a request, its last, has a finish reason.

    token_ids, text: new since the delta before. The text continues the prompt's: both together are the text of all
    tokens, and a character that the prompt leaves incomplete is in the output. Text may lag behind token ids: it is
    held back while it may still become a stop string or a whole character. A token id that ended the output is in
    token_ids, its text is not in text; what a stop string cuts off is in neither.
    error, cause: set when finish_reason is ABORT or ERROR; error is one line.
    prompt_tokens, cached_tokens: of the whole prompt. output_tokens: so far, these included.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    error: str = ""
    cause: Cause | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
