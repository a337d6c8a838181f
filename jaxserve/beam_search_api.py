"""Defines what `LLM.beam_search` takes and returns. Names are vLLM's; no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxserve.config.beam_fields import EarlyStopping
from jaxserve.config.keywords import refuses_unknown_keywords
from jaxserve.frontend.beams import check_search, num_candidates, stop_tokens
from jaxserve.frontend.logprob_outputs import PositionLogprobs, position_logprobs
from jaxserve.frontend.offline import FinishedSample
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.request import FinishReason
from jaxserve.request_checks import ModelLimits
from jaxserve.sampling_params import SamplingParams


@refuses_unknown_keywords
@dataclasses.dataclass(frozen=True)
class BeamSearchParams:
    """Controls a beam search. Raises ValueError, where it is made, naming the field, its value and the limit.

    Attributes:
        beam_width: beams that are continued at each step, and outputs.
        max_tokens: of each output.
        ignore_eos: the model's own end-of-sequence ids are ordinary tokens.
        temperature: divides logits where the server's log-probabilities are processed ones; raw ones do not depend on
            it.
        length_penalty: outputs are ordered by the sum of their log-probabilities over their length to this power.
        include_stop_str_in_output: texts have that of the token that ended them.
        early_stopping: none ends the search by vLLM's rule; True, False and "never" by transformers'. An addition to
            vLLM's names.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    early_stopping: bool | str | EarlyStopping | None = None

    def __post_init__(self) -> None:
        self.sampling_params()

    def sampling_params(self) -> SamplingParams:
        """Returns the sampling parameters that ask for the search."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        width = values.pop("beam_width")
        try:
            return SamplingParams(n=width, use_beam_search=True, **values)
        except ValueError as error:
            text = str(error)
            raise ValueError(f"beam_width{text[1:]}" if text.startswith("n ") else text) from None


@dataclasses.dataclass
class BeamSearchSequence:
    """Holds one output of a beam search.

    Attributes:
        tokens: of the prompt and of the output, the token that ended it included.
        logprobs: of each output token, by token id: its own, and those of the likeliest.
        cum_logprob: the sum of the output tokens' own.
        text: of prompt and output; None without a tokenizer.
        finish_reason: "stop" or "length"; "deadline", "abort" or "error" where the search did not come to its end: the
            output is then what there was of it.
        stop_reason: the token id that ended it, where one did.
    """

    tokens: list[int]
    logprobs: list[PositionLogprobs]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclasses.dataclass
class BeamSearchOutput:
    """Holds the outputs of one prompt, the best first, as many as the beam is wide.

    error: one line where the search did not come to its end.
    """

    sequences: list[BeamSearchSequence]
    error: str = ""


def search_params(params: BeamSearchParams, limits: ModelLimits) -> SamplingParams:
    """Returns the sampling parameters of a search, with the log-probabilities that it looks at. Raises ValueError for a
    beam that is too wide."""
    asked = params.sampling_params()
    check_search(asked, limits, "beam_width")
    return dataclasses.replace(asked, logprobs=num_candidates(asked.n, len(stop_tokens(asked, limits))))


def search_output(
    prompt_token_ids: tuple[int, ...], samples: Sequence[FinishedSample], tokenizer: Tokenizer | None
) -> BeamSearchOutput:
    """Makes the output of a search from the samples of its request, each with log-probabilities."""
    # A character that the prompt leaves incomplete is in the output's text.
    prompt = "" if tokenizer is None else tokenizer.decode(prompt_token_ids).rstrip("\ufffd")
    sequences = []
    for sample in samples:
        assert sample.logprobs is not None, "a search asks for log-probabilities"
        stopped = sample.finish_reason is FinishReason.STOP
        sequences.append(
            BeamSearchSequence(
                tokens=[*prompt_token_ids, *sample.token_ids],
                logprobs=position_logprobs(sample.logprobs, sample.token_ids, tokenizer),
                cum_logprob=sum(sample.logprobs.values.tolist()),
                text=None if tokenizer is None else prompt + sample.text,
                finish_reason=sample.finish_reason.value,
                stop_reason=sample.token_ids[-1] if stopped else None,
            )
        )
    return BeamSearchOutput(sequences, next((sample.error for sample in samples if sample.error), ""))
