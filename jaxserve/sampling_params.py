"""Defines the sampling parameters: fields, ranges, meanings and how the device stores them.

A `SamplingParams` validates itself where it is made, so nothing invalid travels further.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import field

from jaxserve.config.beam_fields import MOST_PENALTY, EarlyStopping, FlagOrWord, check_beam_fields
from jaxserve.config.keywords import refuses_unknown_keywords
from jaxserve.config.parallel_samples import MAX_SAMPLES
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
from jaxserve.structured_outputs import StructuredOutputs, StructuredOutputsParams

MAX_STOP_TOKEN_IDS = 16
STOP_WIDTH = 32
"""Maximum number of stop token ids in a slot: the model's own and the client's."""
MAX_BIASES = 1024
ALLOWED_WIDTH = 1024
"""Maximum number of allowed token ids in a slot; more of them are a mask, which the host writes for each step."""
MAX_ALLOWED = 2**18
MAX_BAD_WORDS = 256


class RequestOutputKind(enum.Enum):
    """Enumerates what each update of a request holds; names and values are vLLM's.

    CUMULATIVE: all of the output so far. DELTA: what is new. FINAL_ONLY: everything, in one update at the end.
    """

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


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
