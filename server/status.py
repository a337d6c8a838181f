"""What a failure is on the wire: one table from exceptions to gRPC status codes."""

from __future__ import annotations

import dataclasses

import grpc

from jaxserve.config.shown import clipped
from jaxserve.frontend.delta import Cause, DeadlineError, Delta, DuplicateRequestError, EngineDeadError, QueueFullError
from jaxserve.request import FinishReason, InfeasibleError

RETRY_PUSHBACK_MS = 1000
"""How long a client should wait before it tries again when the queue is full, in milliseconds."""

MAX_DETAILS = 800
"""Characters of the line for the client: clients refuse trailers beyond 8 kB, and each may take nine bytes there."""


class NotFoundError(LookupError):
    """There is no unfinished request with this id."""


class UnavailableError(RuntimeError):
    """The server takes no requests, or cannot finish them: it is starting, draining, or its engine has died."""


class NoTokenizerError(RuntimeError):
    """Tokenize or Detokenize was called on a server that has no tokenizer."""


class SlowReaderError(RuntimeError):
    """Too much output waited for the client to read it."""


class RequestFailedError(RuntimeError):
    """The engine could not compute one request; the others are not touched."""


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
    """The status that tells a client of this error, or None for one that only a fault of ours can cause."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            metadata = ()
            if kind is QueueFullError:
                metadata = (("grpc-retry-pushback-ms", str(RETRY_PUSHBACK_MS)),)
            return Status(code, " ".join(clipped(str(error), MAX_DETAILS).split()), metadata)
    return None


def check_delta(delta: Delta) -> None:
    """Raises the error that a last delta stands for; returns when it is an answer.

    A deadline, a slow reader and the end of the server are errors, and so is a request that failed. One that the client
    itself aborted is an answer, cut short.
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
