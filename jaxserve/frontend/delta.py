"""Defines the updates that a front end sends about a request, and the errors with which it refuses one."""

from __future__ import annotations

import dataclasses
import enum

from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import FinishReason
from jaxserve.request_checks import InfeasibleError


class FrontEndError(RuntimeError):
    """A valid request cannot be accepted now; the text is one line."""


class DuplicateRequestError(FrontEndError):
    """An unfinished request has this id."""


class QueueFullError(FrontEndError):
    """A limit of unfinished requests, of a tenant, or of text waiting to be tokenized is reached; retry later.

    retry_seconds: when there should be room; None where that is unknown.
    """

    def __init__(self, text: str, retry_seconds: float | None = None):
        super().__init__(text)
        self.retry_seconds = retry_seconds


class DeadlineError(FrontEndError):
    """The deadline has passed before the request began, or is out of reach."""


class EngineDeadError(FrontEndError):
    """The engine has ended, or is about to: no further requests are accepted."""


# The first kind that fits counts, so a kind stands before those it is derived from.
_REJECTIONS: tuple[tuple[type[Exception], str], ...] = (
    (InfeasibleError, "infeasible"),
    (DuplicateRequestError, "duplicate"),
    (QueueFullError, "queue_full"),
    (DeadlineError, "deadline"),
    (EngineDeadError, "unavailable"),
    (ValueError, "invalid"),
    (Exception, "other"),
)
REJECTION_REASONS = tuple(reason for _, reason in _REJECTIONS)
"""Why a request may be refused, for the metrics."""


def rejection_reason(error: Exception) -> str:
    """Returns which of REJECTION_REASONS an error stands for."""
    return next(reason for kind, reason in _REJECTIONS if isinstance(error, kind))


class Cause(enum.Enum):
    """Reason why a request ended with ABORT, DEADLINE or ERROR.

    CLIENT: `abort` was called, or the stream was closed. READER: too much output waited to be read. DEADLINE: its
    deadline passed, or was out of reach. OPTIONS: what this request asks for turned out to be impossible. REQUEST: it
    failed for another reason, others go on. ENGINE: the engine failed, and
    with it every request. CLOSING: the front end closed first.
    """

    CLIENT = "client"
    READER = "reader"
    DEADLINE = "deadline"
    OPTIONS = "options"
    REQUEST = "request"
    ENGINE = "engine"
    CLOSING = "closing"


@dataclasses.dataclass(frozen=True, eq=False)
class PromptLogprobs:
    """Holds the log-probabilities of the last tokens of a prompt.

    token_ids: the whole prompt. columns: of its last tokens; of all but the first, unless only a continuation is
    scored.
    """

    token_ids: tuple[int, ...]
    columns: LogprobColumns

    @property
    def start(self) -> int:
        """Returns the index of the first token that has a log-probability."""
        return len(self.token_ids) - len(self.columns)


@dataclasses.dataclass(frozen=True)
class Delta:
    """Carries an update of one sample of a request. Exactly one delta of a sample, its last, has a finish reason.

    The text continues the prompt's: both together are the text of all tokens, and a character that the prompt leaves
    incomplete is in the output. Text may lag behind token ids: it is held back while it may still become a stop string
    or a whole character. A token id that ended the output is in token_ids, its text is not in text; what a stop string
    cuts off is in neither.

    Attributes:
        owner: whose request it is; request ids are unique for each owner.
        token_ids: new since the previous delta.
        text: new since the previous delta.
        error: one line; set when finish_reason is ABORT, DEADLINE or ERROR.
        cause: set when finish_reason is ABORT, DEADLINE or ERROR.
        stop_string: the stop string that ended the output.
        prompt_tokens: of the whole prompt.
        truncated_tokens: cut off the beginning of the prompt, as truncate_prompt_tokens asks; not in prompt_tokens.
        cached_tokens: of the whole prompt.
        output_tokens: of the sample so far, these included.
        logprobs: of token_ids, where the request wants them.
        prompt_logprobs: of the prompt, where the request wants them; with the first delta of the first sample that has
            any content.
        index: of the sample.
        samples_left: samples of the request that go on.
        embedding: of a request for one, in its only delta if it succeeds: float32 numbers, in little-endian order.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    error: str = ""
    cause: Cause | None = None
    stop_string: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    owner: str = ""
    logprobs: LogprobColumns | None = None
    prompt_logprobs: PromptLogprobs | None = None
    truncated_tokens: int = 0
    index: int = 0
    samples_left: int = 0
    embedding: bytes = b""

    @property
    def ends_request(self) -> bool:
        """Tells whether it is the last delta of the whole request."""
        return self.finish_reason is not None and not self.samples_left
