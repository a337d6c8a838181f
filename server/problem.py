"""Names what can go wrong with a request in neutral codes, which each protocol translates to its own."""

from __future__ import annotations

import dataclasses
import enum

from jaxserve.config.shown import clipped
from jaxserve.frontend.cache_followers import FollowerError
from jaxserve.frontend.captures import CaptureBusyError, CaptureError
from jaxserve.frontend.delta import (
    Cause,
    DeadlineError,
    Delta,
    DuplicateRequestError,
    EngineDeadError,
    QueueFullError,
    rejection_reason,
)
from jaxserve.request import FinishReason
from jaxserve.request_checks import InfeasibleError

RETRY_SECONDS = 1.0
"""Seconds after which a client should retry when the queue is full and no rate of service is known."""

MAX_DETAILS = 800
"""Maximum characters of the client's line: gRPC's clients refuse trailers beyond 8 kB, and each may take nine bytes
there."""


class Code(enum.Enum):
    """Kinds of problems, by the names of gRPC's status codes."""

    INVALID_ARGUMENT = "invalid_argument"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    NOT_FOUND = "not_found"
    ALREADY_EXISTS = "already_exists"
    FAILED_PRECONDITION = "failed_precondition"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    UNIMPLEMENTED = "unimplemented"
    UNAVAILABLE = "unavailable"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


@dataclasses.dataclass(frozen=True)
class Problem:
    """Says why a request has no result.

    details: one line for the client. retry_seconds: when the client should try again; None leaves it to the client.
    """

    code: Code
    details: str
    retry_seconds: float | None = None


class UnauthenticatedError(RuntimeError):
    """The caller's credential is missing or wrong."""


class ForbiddenError(RuntimeError):
    """The caller is known, and may not do this."""


class CallerLimitError(RuntimeError):
    """The caller has reached a limit of its key. retry_seconds: when it should try again."""

    def __init__(self, text: str, retry_seconds: float):
        super().__init__(text)
        self.retry_seconds = retry_seconds


class NotFoundError(LookupError):
    """No unfinished request has this id."""


class UnavailableError(RuntimeError):
    """The server takes no requests, or cannot finish them: it is starting, draining, or its engine has died."""


class NoTokenizerError(RuntimeError):
    """Text must be encoded or decoded by a server that has no tokenizer."""


class UnimplementedError(RuntimeError):
    """A known protocol has this call, and this server does not answer it."""


class SlowReaderError(RuntimeError):
    """Too much output was queued for a client that does not read it."""


class RequestAbortedError(RuntimeError):
    """The client has ended the request from another call, and there is nothing of it to return."""


class RequestFailedError(RuntimeError):
    """The engine could not compute one request; others are not affected."""


# The first kind that fits counts, so a kind stands before those it is derived from.
_CODES: tuple[tuple[type[Exception], Code], ...] = (
    (InfeasibleError, Code.FAILED_PRECONDITION),
    (DuplicateRequestError, Code.ALREADY_EXISTS),
    (QueueFullError, Code.RESOURCE_EXHAUSTED),
    (DeadlineError, Code.DEADLINE_EXCEEDED),
    (EngineDeadError, Code.UNAVAILABLE),
    (FollowerError, Code.RESOURCE_EXHAUSTED),
    (CaptureBusyError, Code.ALREADY_EXISTS),
    (CaptureError, Code.FAILED_PRECONDITION),
    (SlowReaderError, Code.RESOURCE_EXHAUSTED),
    (UnavailableError, Code.UNAVAILABLE),
    (UnauthenticatedError, Code.UNAUTHENTICATED),
    (CallerLimitError, Code.RESOURCE_EXHAUSTED),
    (ForbiddenError, Code.PERMISSION_DENIED),
    (NotFoundError, Code.NOT_FOUND),
    (NoTokenizerError, Code.UNIMPLEMENTED),
    (UnimplementedError, Code.UNIMPLEMENTED),
    (RequestAbortedError, Code.CANCELLED),
    (RequestFailedError, Code.INTERNAL),
    (ValueError, Code.INVALID_ARGUMENT),
)


def problem_of(error: Exception) -> Problem | None:
    """Returns what to tell the client about this error, or None for one that only a bug of ours can cause."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            retry_seconds = getattr(error, "retry_seconds", None)
            if retry_seconds is None and isinstance(error, QueueFullError):
                retry_seconds = RETRY_SECONDS
            return Problem(code, " ".join(clipped(str(error), MAX_DETAILS).split()), retry_seconds)
    return None


REJECTIONS: tuple[tuple[type[Exception], str], ...] = (
    (UnavailableError, "unavailable"),
    (UnauthenticatedError, "unauthenticated"),
    (ForbiddenError, "forbidden"),
)
"""Why a port refuses a request, for the metrics, beside `delta.REJECTION_REASONS`."""


def rejection(error: Exception) -> str:
    """Returns in a word why a request is refused, for the metrics."""
    return next((reason for kind, reason in REJECTIONS if isinstance(error, kind)), rejection_reason(error))


def unforeseen(error: Exception) -> Problem:
    """Returns what to tell the client about a bug of ours: nothing of its text, which may hold what others sent."""
    return Problem(Code.INTERNAL, f"internal error: {type(error).__name__}")


def fails_alone(delta: Delta, samples: int) -> bool:
    """Tells whether a delta ends one of several samples that failed or ran out of time: what others have may still be
    unread, so that its error comes when all have ended."""
    return samples > 1 and delta.finish_reason in (FinishReason.ERROR, FinishReason.DEADLINE)


def check_delta(delta: Delta) -> None:
    """Raises the error that a last delta represents; returns when it is a result.

    A deadline, a slow reader and the end of the server are errors, and so is a request that failed. One that the client
    itself aborted is a result, cut short.
    """
    match delta.cause:
        case Cause.DEADLINE:
            raise DeadlineError(delta.error)
        case Cause.OPTIONS:
            raise ValueError(delta.error)
        case Cause.READER:
            raise SlowReaderError(delta.error)
        case Cause.ENGINE | Cause.CLOSING:
            raise UnavailableError(delta.error)
    if delta.finish_reason is FinishReason.ERROR:
        raise RequestFailedError(delta.error)
