"""Defines requests and their outcomes: options, statuses, finish reasons, and the request as the engine receives it."""

from __future__ import annotations

import dataclasses
import enum
import sys
from dataclasses import field

from jaxserve.config.sampling_fields import MAX_INT32
from jaxserve.config.shown import shown
from jaxserve.sampling_params import RowSampling
from jaxserve.structured_outputs import GRAMMAR_FAILED

MAX_ID_LENGTH = 256


class FinishReason(enum.Enum):
    """Enumerates the reasons why a request ended; the values are the words that clients see.

    DEADLINE: its deadline passed, or was out of reach before anything was computed for it.
    """

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"


COMPLETED = frozenset({FinishReason.STOP.value, FinishReason.LENGTH.value})
"""Finish reasons of requests that got all of their tokens."""


class RequestStatus(enum.Enum):
    """Enumerates the states of a request.

    PREEMPTED waits like WAITING, in front of it, with its tokens kept; SWAPPED too, with its pages kept in host memory.
    ENDING has its last token sampled, but its id is not read yet, or its batch not at its end: it holds neither slot
    nor pages.
    """

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    SWAPPED = "swapped"
    ENDING = "ending"
    FINISHED = "finished"


class Pooling(enum.Enum):
    """Enumerates how the hidden states of a prompt's tokens make one vector: that of the last or of the first (cls)
    token, or the mean of all.
    """

    LAST = "last"
    MEAN = "mean"
    CLS = "cls"


NO_TOKEN_LEFT = "allowed_token_ids, bad_words and structured_outputs together leave no token to draw: relax one of them"
"""Error line of a request that ended because its options contradict one another."""


def is_of_options(error: str) -> bool:
    """Tells whether the error line of a request that failed in the engine is about what the client asks for."""
    return error == NO_TOKEN_LEFT or error.startswith(GRAMMAR_FAILED)


def check_identity(name: str, value: str) -> None:
    """Checks the length of a client-chosen name (request id, tenant, cache salt), and refuses invalid Unicode."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}; it must be text")
    if len(value) > MAX_ID_LENGTH:
        raise ValueError(f"{name} has {len(value)} characters; at most {MAX_ID_LENGTH} are allowed")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name} is {shown(value)}; it must be valid Unicode")


def _is_time(value: object) -> bool:
    """Tells whether the value is a number of seconds that can be compared with a clock."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # also no for NaN, and yes for whole numbers that a float can hold


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """Holds whom a request is for, how urgent it is and what it shares: one value, unchanged from the front end to the
    scheduler.

    tenant: the tenant that service is counted for. priority: higher is more urgent. deadline: seconds of `time.time`,
    or None.
    cache_salt: requests of a tenant share cached pages only with the same salt. prefix_caching: it reads and fills the
    prefix cache; off, it does neither.

    Raises ValueError, where it is made, naming the field, its value and the limit.
    """

    tenant: str = ""
    priority: int = 0
    deadline: float | None = None
    cache_salt: str = ""
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        check_identity("tenant", self.tenant)
        check_identity("cache_salt", self.cache_salt)
        priority, deadline = self.priority, self.deadline
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_INT32:
            raise ValueError(
                f"priority is {shown(priority)}; it must be a whole number from {-MAX_INT32} to {MAX_INT32}"
            )
        if deadline is not None and not _is_time(deadline):
            raise ValueError(f"deadline is {shown(deadline)}; it must be a finite number of seconds")
        if not isinstance(self.prefix_caching, bool):
            raise ValueError(f"prefix_caching is {shown(self.prefix_caching)}; it must be true or false")


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(RequestOptions))
"""Names of the options, which every protocol gives them."""


@dataclasses.dataclass(frozen=True)
class EngineRequest(RowSampling):
    """Represents a validated request as the engine receives it: token ids, resolved parameters and options.

    max_tokens and seed are resolved (never None). stop_token_ids include the model's own unless ignore_eos.
    Stop strings are handled by the front end. arrival_time: seconds of `time.time`. needed_tokens: output tokens
    without which it cannot be complete, whatever is sampled. bad_words_token_ids: sequences that the output must not
    have; each token that would complete one is forbidden. logprobs, prompt_logprobs: resolved (never -1).
    prompt_logprobs_start: index of the first prompt token of which they are wanted; the first token of all has none.
    grammar: of its output, as llguidance takes it; empty where it has none.
    pooling: the request asks for the pooled hidden states of its prompt, and generates nothing; it then counts as one
    of a single output token.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = field(default=0.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    min_tokens: int = 0
    options: RequestOptions = RequestOptions()
    arrival_time: float = 0.0
    needed_tokens: int = 1
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 1
    grammar: str = ""
    pooling: Pooling | None = None

    def sample(self, index: int, request_id: str) -> EngineRequest:
        """Returns the request of another sample of the prompt, which the first one scores where that is wanted: its
        seed is `index` more, in 64 bits."""
        seed = _signed(self.seed + index)
        return dataclasses.replace(self, request_id=request_id, seed=seed, prompt_logprobs=None)


def _signed(number: int) -> int:
    """Returns the number of 64 bits that is equal to it modulo 2^64, and at least -2^63."""
    return (number + 2**63) % 2**64 - 2**63
