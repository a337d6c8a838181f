"""Maps exceptions to gRPC status codes, in one table."""

from __future__ import annotations

import dataclasses

import grpc

from jaxserve.config.shown import clipped
from jaxserve.frontend.delta import Cause, DeadlineError, Delta, DuplicateRequestError, EngineDeadError, QueueFullError
from jaxserve.request import FinishReason, InfeasibleError

RETRY_PUSHBACK_MS = 1000
"""Milliseconds after which a client should retry when the queue is full."""

MAX_DETAILS = 800
"""Maximum characters of the client's line: clients refuse trailers beyond 8 kB, and each may take nine bytes there."""


class NotFoundError(LookupError):
    """No unfinished request has this id."""


class UnavailableError(RuntimeError):
    """The server takes no requests, or cannot finish them: it is starting, draining, or its engine has died."""


class NoTokenizerError(RuntimeError):
    """Tokenize or Detokenize was called on a server that has no tokenizer."""


class SlowReaderError(RuntimeError):
    """Too much output was queued for a client that does not read it."""


class RequestFailedError(RuntimeError):
    """The engine could not compute one request; others are not affected."""


@dataclasses.dataclass(frozen=True)
class Status:
    """A gRPC status: its code, one line for the client, and trailing metadata."""

    code: grpc.StatusCode
    details: str
    metadata: tuple[tuple[str, str], ...] = ()


# The first kind that fits counts, so a kind stands before those it is derived from.
_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (InfeasibleError, grpc.StatusCode.FAILED_PRECONDITION),
    (DuplicateRequestError, grpc.StatusCode.ALREADY_EXISTS),
    (QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (EngineDeadError, grpc.StatusCode.UNAVAILABLE),
    (SlowReaderError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (NoTokenizerError, grpc.StatusCode.UNIMPLEMENTED),
    (RequestFailedError, grpc.StatusCode.INTERNAL),
    (ValueError, grpc.StatusCode.INVALID_ARGUMENT),
)


def status_of(error: Exception) -> Status | None:
    """Returns the status to send for this error, or None for one that only a bug of ours can cause."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            metadata = ()
            if kind is QueueFullError:
                metadata = (("grpc-retry-pushback-ms", str(RETRY_PUSHBACK_MS)),)
            return Status(code, " ".join(clipped(str(error), MAX_DETAILS).split()), metadata)
    return None


def check_delta(delta: Delta) -> None:
    """Raises the error that a last delta represents; returns when it is a result.

    A deadline, a slow reader and the end of the server are errors, and so is a request that failed. One that the client
    itself aborted is a result, cut short.
    """
    match delta.cause:
        case Cause.DEADLINE:
            raise DeadlineError(delta.error)
        case Cause.READER:
            raise SlowReaderError(delta.error)
        case Cause.ENGINE | Cause.CLOSING:
            raise UnavailableError(delta.error)
    if delta.finish_reason is FinishReason.ERROR:
        raise RequestFailedError(delta.error)
