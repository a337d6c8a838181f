"""What a client asks for and what becomes of it: sampling parameters, requests, statuses, finish reasons.

Standard library only. A `SamplingParams` validates itself where it is made, so nothing invalid travels further;
what depends on the model (vocabulary, context, pool) is checked by `validate_request`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence

from jaxserve.config.shown import shown

MAX_INT32 = 2**31 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
MAX_STOP_TOKEN_IDS = 16
MAX_ID_LENGTH = 256


class FinishReason(enum.Enum):
    """Why a request's last token is its last; the values are the words that clients see."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


COMPLETED = frozenset({FinishReason.STOP.value, FinishReason.LENGTH.value})
"""The words of requests that got all of their tokens."""


class RequestStatus(enum.Enum):
    """Where a request stands.

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


class InfeasibleError(ValueError):
    """A well-formed request that this server could never run, however long it waits."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Names are vLLM's.

    temperature: 0 is greedy; else logits are divided by it.
    top_k: keep the k most likely tokens; 0 or -1 keeps all.
    top_p: keep the smallest set of tokens whose probability reaches top_p.
    min_p: drop tokens less likely than min_p times the likeliest.
    seed: fixes the random draw, which depends on (seed, position) alone; None lets the server draw a seed.
    max_tokens: output tokens at most; None is the rest of the context, or of the page pool where that is smaller.
    min_tokens: stop token ids cannot be drawn, and stop strings do not count, before this many output tokens.
    stop: strings that end the text; they are not part of it. They are looked for in what is generated, which includes
        special tokens ("<|im_end|>"), although the text does not show them; not in the prompt.
    stop_token_ids: token ids that end the output, besides the model's own.
    ignore_eos: the model's own end-of-sequence ids are ordinary tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", _as_tuple("stop", self.stop, MAX_STOP_STRINGS, "strings"))
        ids = _as_tuple("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS, "ids")
        object.__setattr__(self, "stop_token_ids", ids)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_whole("top_k", self.top_k, -1, MAX_INT32)
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, 2**63 - 1)
        if self.max_tokens is not None:
            _check_whole("max_tokens", self.max_tokens, 1, MAX_INT32)
        _check_whole("min_tokens", self.min_tokens, 0, MAX_INT32)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; it must be at most max_tokens {self.max_tokens}")
        _check_stop_strings(self.stop)
        for token_id in self.stop_token_ids:
            _check_whole("stop_token_ids", token_id, 0, MAX_INT32)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos is {shown(self.ignore_eos)}; it must be true or false")


@dataclasses.dataclass(frozen=True)
class ModelLimits:
    """The figures of a running engine that a request is checked against.

    vocab_size: token ids lie in [0, vocab_size).
    max_model_len: prompt and output tokens of one request together, at most.
    pool_tokens: tokens that the whole page pool can hold for one request.
    max_prompt_len: prompt tokens at most (less than max_model_len only when chunked prefill is off).
    eos_token_ids: the model's own stop ids.
    """

    vocab_size: int
    max_model_len: int
    pool_tokens: int
    max_prompt_len: int
    eos_token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """A validated request as the engine receives it: token ids, resolved parameters, and whose it is.

    max_tokens and seed are resolved (never None). stop_token_ids include the model's own unless ignore_eos.
    Stop strings are the front end's business and are not here.
    tenant: whom service is counted for. priority: higher is more urgent. deadline: seconds of `time.time`, or None.
    cache_salt: requests share cached pages only with the same salt. arrival_time: seconds of `time.time`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None
    cache_salt: str = ""
    arrival_time: float = 0.0


def validate_request(prompt_token_ids: Sequence[int], params: SamplingParams, limits: ModelLimits) -> int:
    """Checks a prompt and its parameters against the engine; returns the resolved max_tokens.

    The prompt's length is looked at before its ids. Raises ValueError (the client's fault) or InfeasibleError (fits the
    context, never the pool), each naming the field, its value and the limit.
    """
    max_tokens = check_length(len(prompt_token_ids), params, limits)
    for index, token_id in enumerate(prompt_token_ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < limits.vocab_size:
            raise ValueError(
                f"prompt_token_ids[{index}] is {shown(token_id)}; token ids must be whole numbers from 0 to "
                f"{limits.vocab_size - 1}"
            )
    for token_id in params.stop_token_ids:
        if token_id >= limits.vocab_size:
            raise ValueError(f"stop_token_ids has {token_id}; token ids must be from 0 to {limits.vocab_size - 1}")
    return max_tokens


def check_length(length: int, params: SamplingParams, limits: ModelLimits, *, size: str = "") -> int:
    """Checks how long a prompt is; returns the resolved max_tokens. Raises as `validate_request` does.

    size: of a text that is not encoded to its end, as "9 characters"; `length` is then the fewest tokens that it can
    have. What is refused for that number is refused for every larger one.
    """
    known = not size
    prompt = f"prompt has {'' if known else f'{size}, at least '}{length} tokens"
    if known and not length:
        raise ValueError("prompt is empty; at least one token is needed")
    if length >= limits.max_model_len:
        raise ValueError(
            f"{prompt}; with at least one output token it must fit max_model_len {limits.max_model_len}: shorten the "
            "prompt"
        )
    if length > limits.max_prompt_len:
        raise ValueError(
            f"{prompt}; without chunked prefill at most max_num_batched_tokens {limits.max_prompt_len} are allowed: "
            "shorten it or enable chunked prefill"
        )
    max_tokens = limits.max_model_len - length if params.max_tokens is None else params.max_tokens
    together = f"{prompt} and max_tokens is {max_tokens}; together {'' if known else 'at least '}{length + max_tokens}"
    if length + max_tokens > limits.max_model_len:
        raise ValueError(
            f"{together} exceed max_model_len {limits.max_model_len}: lower max_tokens or shorten the prompt"
        )
    if params.min_tokens > max_tokens:
        raise ValueError(f"min_tokens is {params.min_tokens}; only max_tokens {max_tokens} can be generated")
    if length + max_tokens - 1 > limits.pool_tokens:
        if params.max_tokens is None and length + params.min_tokens <= limits.pool_tokens:
            return limits.pool_tokens - length + 1
        raise InfeasibleError(
            f"{together} exceed the page pool of {limits.pool_tokens} tokens: lower max_tokens or give the server more "
            "pages"
        )
    return max_tokens


def check_count(name: str, count: int, limit: int, things: str) -> None:
    """Bounds how many items a client's list has, before any of them is looked at."""
    if count > limit:
        raise ValueError(f"{name} has {count} {things}; at most {limit} are allowed")


def check_identity(name: str, value: str) -> None:
    """Bounds a client-chosen name (request id, tenant, cache salt)."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}; it must be text")
    if len(value) > MAX_ID_LENGTH:
        raise ValueError(f"{name} has {len(value)} characters; at most {MAX_ID_LENGTH} are allowed")


def _as_tuple(name: str, value: object, limit: int, things: str) -> tuple:
    """A list, tuple or range of at most `limit` things as a tuple; None is none."""
    if value is None:
        return ()
    if not isinstance(value, Sequence):
        raise ValueError(f"{name} is {shown(value)}; it must be a list")
    check_count(name, len(value), limit, things)
    return tuple(value)


def _check_number(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {shown(value)}; it must be a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {shown(value)}; it must be a finite number")
    _check_digits(name, value, high)
    if not (low < value if open_low else low <= value) or value > high:
        raise ValueError(
            f"{name} is {value}; it must be {'above' if open_low else 'at least'} {low:g} and at most {high:g}"
        )


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {shown(value)}; it must be a whole number")
    _check_digits(name, value, high)
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be from {low} to {high}")


def _check_digits(name: str, value: float, high: float) -> None:
    """Refuses whole numbers too long to be compared with a float or printed."""
    if isinstance(value, int) and value.bit_length() > 64:
        raise ValueError(f"{name} is a whole number of {value.bit_length()} bits; it must be at most {high:g}")


def _check_stop_strings(stop: tuple[str, ...]) -> None:
    for text in stop:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop has {shown(text)}; each stop must be a string of at least one character")
        if len(text) > MAX_STOP_STRING_LENGTH:
            raise ValueError(
                f"stop has a string of {len(text)} characters; at most {MAX_STOP_STRING_LENGTH} are allowed"
            )
