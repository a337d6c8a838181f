"""Defines requests and their outcomes: sampling parameters, options, statuses, finish reasons.

Standard library only. A `SamplingParams` validates itself where it is made, so nothing invalid travels further;
what depends on the model (vocabulary, context, pool) is checked by `validate_request`.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field

from jaxserve.config.beam_fields import MOST_PENALTY, EarlyStopping, FlagOrWord, check_beam_fields
from jaxserve.config.id_checks import first_wrong_id
from jaxserve.config.keywords import refuses_unknown_keywords
from jaxserve.config.logprobs_config import MAX_LOGPROBS
from jaxserve.config.parallel_samples import DEFAULT_MAX_N, MAX_SAMPLES
from jaxserve.config.sampling_fields import (
    MAX_INT32,
    Biases,
    Flag,
    Ids,
    Number,
    OneOf,
    SamplingField,
    SlotValue,
    Texts,
    Whole,
    fields_of,
    sampling,
)
from jaxserve.config.shown import shown
from jaxserve.structured_outputs import GRAMMAR_FAILED, StructuredOutputs, StructuredOutputsParams

MAX_ID_LENGTH = 256
MAX_STOP_TOKEN_IDS = 16
MAX_PROMPT_LOGPROBS = 2**24
"""Maximum number of log-probabilities of a prompt, those of the likeliest ids included: they come in one message."""
STOP_WIDTH = 32
"""Maximum number of stop token ids in a slot: the model's own and the client's."""
MAX_BIASES = 1024
ALLOWED_WIDTH = 1024
"""Maximum number of allowed token ids in a slot; more of them are a mask, which the host writes for each step."""
MAX_ALLOWED = 2**18
MAX_BAD_WORDS = 256


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


class RequestOutputKind(enum.Enum):
    """Enumerates what each update of a request holds; names and values are vLLM's.

    CUMULATIVE: all of the output so far. DELTA: what is new. FINAL_ONLY: everything, in one update at the end.
    """

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


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


class InfeasibleError(ValueError):
    """Signals a well-formed request that this server could never run, however long it waits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSampling:
    """Defines the sampling parameters that the device stores for each row: the table that slots, layout and packing
    follow.

    A field is a row: name, type and default, and in its metadata what is allowed, what it means and how a slot holds
    it. `SamplingParams` adds what only the host looks at.
    """

    temperature: float = field(
        default=1.0,
        metadata=sampling(
            Number(0.0, 100.0),
            "0 takes the likeliest token (greedy); else logits are divided by it",
            SlotValue("float32"),
        ),
    )
    top_k: int = field(
        default=0,
        metadata=sampling(
            Whole(-1, MAX_INT32), "draw from the k likeliest tokens; 0 or -1: from all", SlotValue("int32", least=0)
        ),
    )
    top_p: float = field(
        default=1.0,
        metadata=sampling(
            Number(0.0, 1.0, open_low=True),
            "draw from the smallest set of tokens whose probability reaches it",
            SlotValue("float32", idle=1.0),
        ),
    )
    min_p: float = field(
        default=0.0,
        metadata=sampling(
            Number(0.0, 1.0), "draw no token less likely than it times the likeliest", SlotValue("float32")
        ),
    )
    typical_p: float = field(
        default=1.0,
        metadata=sampling(
            Number(0.0, 1.0, open_low=True),
            "draw from the tokens whose information is closest to the distribution's entropy, as many as it takes to "
            "reach this probability; after the other filters",
            SlotValue("float32", idle=1.0),
        ),
    )
    presence_penalty: float = field(
        default=0.0,
        metadata=sampling(
            Number(-2.0, 2.0), "subtracted from the logits of tokens that the output has", SlotValue("float32")
        ),
    )
    frequency_penalty: float = field(
        default=0.0,
        metadata=sampling(
            Number(-2.0, 2.0),
            "subtracted from a token's logit for each time that the output has it",
            SlotValue("float32"),
        ),
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata=sampling(
            Number(0.0, 1000.0, open_low=True),
            "divides positive logits of tokens that prompt or output have, and multiplies negative ones",
            SlotValue("float32", idle=1.0),
        ),
    )
    logit_bias: tuple[tuple[int, float], ...] = field(
        default=(),
        metadata=sampling(
            Biases(MAX_BIASES, -100.0, 100.0),
            "added to the logits of these tokens",
            SlotValue("int32", width=2 * MAX_BIASES, idle=-1, apart=True),
        ),
    )
    allowed_token_ids: tuple[int, ...] | None = field(
        default=None,
        metadata=sampling(
            Ids(MAX_ALLOWED, least_items=1),
            "draw no token but these",
            SlotValue("int32", width=ALLOWED_WIDTH, idle=-1, apart=True),
        ),
    )
    seed: int | None = field(
        default=None,
        metadata=sampling(
            Whole(-(2**63), 2**63 - 1),
            "fixes the random draws, which depend on (seed, position) alone; none: the server draws a seed",
            SlotValue("uint32", width=2),
        ),
    )
    stop_token_ids: tuple[int, ...] = field(
        default=(),
        metadata=sampling(
            Ids(MAX_STOP_TOKEN_IDS),
            "token ids that end the output, besides the model's own",
            SlotValue("int32", width=STOP_WIDTH, idle=-1),
        ),
    )

    @property
    def penalized(self) -> bool:
        """Tells whether logits depend on the tokens so far, so that the request needs a penalty row."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


@refuses_unknown_keywords
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams(RowSampling):
    """Controls how tokens are sampled and when generation stops. Names are vLLM's.

    What a field means and takes is said where it is defined, and in docs/sampling.md, which follows from that. Raises
    ValueError, where it is made, naming the field, its value and the limit.
    """

    n: int = field(
        default=1,
        metadata=sampling(
            Whole(1, MAX_SAMPLES),
            "samples of the prompt, which is computed once; sample i is drawn as with seed + i; `max_n` bounds them",
        ),
    )
    max_tokens: int | None = field(
        default=None,
        metadata=sampling(
            Whole(1, MAX_INT32),
            "output tokens at most; none: the checkpoint's max_new_tokens where it has one, else the rest of the "
            "context, or of the page pool where that is smaller",
        ),
    )
    min_tokens: int = field(
        default=0,
        metadata=sampling(
            Whole(0, MAX_INT32),
            "before so many output tokens, stop token ids cannot be drawn and stop strings do not count",
        ),
    )
    # Stop strings are looked for in what is generated, which includes special tokens, although the text does not show
    # them; not in the prompt.
    stop: tuple[str, ...] = field(
        default=(),
        metadata=sampling(
            Texts(16, 256),
            "strings that end the text, and are part of it only with include_stop_str_in_output; looked for in special "
            "tokens too",
        ),
    )
    bad_words: tuple[str, ...] = field(
        default=(),
        metadata=sampling(
            Texts(MAX_BAD_WORDS, 256),
            "texts whose tokens the output never has in a row, with a space before the text and without: the token "
            "that would complete one is not drawn",
        ),
    )
    ignore_eos: bool = field(
        default=False, metadata=sampling(Flag(), "the model's own end-of-sequence ids are ordinary tokens")
    )
    include_stop_str_in_output: bool = field(
        default=False,
        metadata=sampling(Flag(), "the text includes the stop string, or the text of the stop token, that ended it"),
    )
    skip_special_tokens: bool = field(
        default=True, metadata=sampling(Flag(), "the text leaves out special tokens (`<|im_end|>`)")
    )
    spaces_between_special_tokens: bool = field(
        default=True,
        metadata=sampling(
            Flag(),
            "with skip_special_tokens off: added tokens that follow one another stand apart where the tokenizer's "
            "decoder puts spaces before tokens",
        ),
    )
    detokenize: bool = field(
        default=True, metadata=sampling(Flag(), "the output has text; off: token ids alone, and no stop strings")
    )
    logprobs: int | None = field(
        default=None,
        metadata=sampling(
            Whole(-1, MAX_INT32),
            "returns each output token's log-probability and rank, and those of so many of the likeliest ids; -1: as "
            "many as the server's `max_logprobs`",
        ),
    )
    prompt_logprobs: int | None = field(
        default=None,
        metadata=sampling(Whole(-1, MAX_INT32), "the same of each prompt token but the first"),
    )
    truncate_prompt_tokens: int | None = field(
        default=None,
        metadata=sampling(
            Whole(-1, MAX_INT32, without=(0,)),
            "only so many tokens at the end of the prompt are kept, -1: as many as the model and max_tokens leave room "
            "for; the output says how many were cut; none: a prompt that is too long is refused",
        ),
    )
    output_kind: RequestOutputKind | None = field(
        default=None,
        metadata=sampling(
            OneOf(RequestOutputKind),
            "what each update of a stream holds: all of the output so far, what is new, or all of it in one update at "
            "the end; none: cumulative in Python, delta elsewhere",
        ),
    )
    structured_outputs: StructuredOutputsParams | None = field(
        default=None,
        metadata=sampling(
            StructuredOutputs(), "a grammar that the output follows, see [structured outputs](structured_outputs.md)"
        ),
    )
    use_beam_search: bool = field(
        default=False,
        metadata=sampling(
            Flag(), "searches for the n likeliest outputs instead of drawing, see [beam search](beam_search.md)"
        ),
    )
    length_penalty: float = field(
        default=1.0,
        metadata=sampling(
            Number(-MOST_PENALTY, MOST_PENALTY),
            "of a beam search: outputs are ordered by the sum of their log-probabilities over their length to this "
            "power",
        ),
    )
    early_stopping: EarlyStopping | None = field(
        default=None,
        metadata=sampling(
            FlagOrWord(EarlyStopping),
            "of a beam search: by which of transformers' rules it ends; none: by vLLM's",
        ),
    )

    def __post_init__(self) -> None:
        for name, row in SAMPLING_FIELDS.items():
            object.__setattr__(self, name, row.checked(getattr(self, name)))
        check_beam_fields(self, SAMPLING_FIELDS)
        if self.n > 1 and self.temperature == 0 and not self.use_beam_search:
            raise ValueError(
                f"n is {self.n} and temperature is 0; all samples would be the same: set n to 1 or raise temperature"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; it must be at most max_tokens {self.max_tokens}")
        if self.stop and not self.detokenize:
            raise ValueError(
                f"stop is {shown(self.stop)} and detokenize is False; stop strings are looked for in the text: leave "
                "one of them out, or use stop_token_ids"
            )


ROW_FIELDS: Mapping[str, SlotValue] = {
    name: row.slot for name, row in fields_of(RowSampling).items() if row.slot is not None
}
"""Slot representation of each parameter of `RowSampling`."""

PENALTY_ROW = "penalty_row"
"""Name of the slots' field that holds the request's penalty row, -1 without one; the scheduler chooses it."""


def counted(name: str) -> str:
    """Returns the name of the slots' field that holds how many elements of an `apart` field count."""
    return f"num_{name}"


APART_FIELDS: Mapping[str, SlotValue] = {name: value for name, value in ROW_FIELDS.items() if value.apart}
"""Fields of `ROW_FIELDS` that a program of their own writes."""

ADMITTED_FIELDS: Mapping[str, SlotValue] = {
    **{name: value for name, value in ROW_FIELDS.items() if not value.apart},
    **{counted(name): SlotValue("int32") for name in APART_FIELDS},
    PENALTY_ROW: SlotValue("int32", idle=-1),
}
"""Fields of a slot that the forward program writes whenever a request gets it."""

SAMPLING_FIELDS: Mapping[str, SamplingField] = fields_of(SamplingParams)
"""All sampling parameters, by name."""


@dataclasses.dataclass(frozen=True)
class ModelLimits:
    """Holds the limits of a running engine that a request is checked against.

    vocab_size: token ids lie in [0, vocab_size).
    max_model_len: prompt and output tokens of one request together, at most.
    pool_tokens: tokens that the whole page pool can hold for one request.
    max_prompt_len: prompt tokens at most (less than max_model_len only when chunked prefill is off).
    eos_token_ids: the model's own stop ids.
    default_max_tokens: of requests that set none, as far as there is room; None: all of the room.
    max_logprobs: likeliest ids of one position that a request may ask for.
    logprobs_mode: what log-probabilities are, as `LogprobsConfig.logprobs_mode`.
    max_n: samples of one request, at most. embedding_size: numbers in an embedding, unless fewer are asked for.
    pooling, normalize: how embeddings are made where a request does not say.
    """

    vocab_size: int
    max_model_len: int
    pool_tokens: int
    max_prompt_len: int
    eos_token_ids: tuple[int, ...]
    default_max_tokens: int | None = None
    max_logprobs: int = MAX_LOGPROBS
    logprobs_mode: str = "raw_logprobs"
    max_n: int = DEFAULT_MAX_N
    embedding_size: int = 0
    pooling: Pooling = Pooling.LAST
    normalize: bool = True

    def room(self, length: int, min_tokens: int) -> int:
        """Returns the output tokens of a request that sets no limit, behind a prompt of `length` tokens."""
        rest = self.max_model_len - length
        return rest if self.default_max_tokens is None else min(rest, max(self.default_max_tokens, min_tokens))

    def most_prompt_tokens(self, max_tokens: int) -> int:
        """Returns the longest prompt beside `max_tokens` output tokens; below 1 where there is no room for one."""
        return min(self.max_prompt_len, self.max_model_len - max_tokens, self.pool_tokens - max_tokens + 1)

    def resolved_logprobs(self, wanted: int | None) -> int | None:
        """Returns how many of the likeliest ids a checked `logprobs` or `prompt_logprobs` asks for."""
        return self.max_logprobs if wanted == -1 else wanted


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


def check_logprobs(params: SamplingParams, limits: ModelLimits, name_of_output: str = "logprobs") -> None:
    """Checks what a request asks for of log-probabilities, in constant time. Raises ValueError naming the field.

    name_of_output: the field that the client gave for `logprobs`.
    """
    for name, wanted in ((name_of_output, params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if wanted is not None and wanted > limits.max_logprobs:
            raise ValueError(
                f"{name} is {wanted}; this server returns at most max_logprobs {limits.max_logprobs} ids: ask for "
                "fewer, or raise LogprobsConfig.max_logprobs"
            )


def check_samples(params: SamplingParams, limits: ModelLimits) -> None:
    """Checks how many samples are asked for, before anything is done for one. Raises ValueError."""
    if params.n > limits.max_n:
        raise ValueError(
            f"n is {params.n}; at most {limits.max_n} samples of one request are allowed (max_n, and max_num_seqs + "
            "max_num_waiting): lower it or send several requests"
        )


def validate_request(prompt_token_ids: Sequence[int], params: SamplingParams, limits: ModelLimits) -> int:
    """Checks a prompt and its parameters against the engine; returns the resolved max_tokens.

    The prompt's length is checked before its ids. Raises ValueError (the client's fault) or InfeasibleError (fits the
    context, never the pool), each naming the field, its value and the limit.
    """
    check_samples(params, limits)
    max_tokens = check_length(len(prompt_token_ids), params, limits)
    check_logprobs(params, limits)
    width = limits.resolved_logprobs(params.prompt_logprobs)
    if width is not None and (total := len(prompt_token_ids) * (1 + width)) > MAX_PROMPT_LOGPROBS:
        raise ValueError(
            f"prompt_logprobs is {params.prompt_logprobs}; for {len(prompt_token_ids)} tokens, with {width} ids each, "
            f"these are {total} values, and at most {MAX_PROMPT_LOGPROBS} are allowed: ask for fewer ids"
        )
    check_token_ids(prompt_token_ids, limits)
    _check_ids(params, limits)
    return max_tokens


def check_token_ids(token_ids: Sequence[int], limits: ModelLimits) -> None:
    """Checks that the ids of a prompt are in the vocabulary. Raises ValueError."""
    if (index := first_wrong_id(token_ids, limits.vocab_size)) is not None:
        raise ValueError(
            f"prompt_token_ids[{index}] is {shown(token_ids[index])}; token ids must be whole numbers from 0 to "
            f"{limits.vocab_size - 1}"
        )


def _check_ids(params: SamplingParams, limits: ModelLimits) -> None:
    """Checks the token ids of sampling parameters against the vocabulary and each other."""
    for name, ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("logit_bias", [token_id for token_id, _ in params.logit_bias]),
    ):
        if ids and max(ids) >= limits.vocab_size:
            raise ValueError(f"{name} has {max(ids)}; token ids must be from 0 to {limits.vocab_size - 1}")
    stop = {*params.stop_token_ids, *(() if params.ignore_eos else limits.eos_token_ids)}
    if params.min_tokens and params.allowed_token_ids is not None and stop.issuperset(params.allowed_token_ids):
        raise ValueError(
            f"min_tokens is {params.min_tokens} and allowed_token_ids has only stop tokens, which cannot be drawn "
            "before that: allow another token, or lower min_tokens to 0"
        )


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
    max_tokens = limits.room(length, params.min_tokens) if params.max_tokens is None else params.max_tokens
    together = f"{prompt} and max_tokens is {max_tokens}; together {'' if known else 'at least '}{length + max_tokens}"
    if length + max_tokens > limits.max_model_len:
        raise ValueError(
            f"{together} exceed max_model_len {limits.max_model_len}: lower max_tokens or shorten the prompt"
        )
    if params.min_tokens > max_tokens:
        raise ValueError(f"min_tokens is {params.min_tokens}; only max_tokens {max_tokens} can be generated")
    if length + max_tokens - 1 > limits.pool_tokens:
        if params.max_tokens is None and length + max(params.min_tokens, 1) - 1 <= limits.pool_tokens:
            return limits.pool_tokens - length + 1
        raise InfeasibleError(
            f"{together} exceed the page pool of {limits.pool_tokens} tokens: lower max_tokens or give the server more "
            "pages"
        )
    return max_tokens
