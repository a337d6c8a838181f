"""Configures the log-probabilities that requests may ask for, as a frozen dataclass that validates itself.

Standard library only; docs/logprobs.md says what each mode gives.
"""

from __future__ import annotations

import dataclasses

from jaxserve.config.checks import at_least, one_of

LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")
"""vLLM's names. Raw values are the model's own; processed ones are those that a token is drawn from."""

MAX_LOGPROBS = 20
"""Default of `LogprobsConfig.max_logprobs`, which is vLLM's."""


@dataclasses.dataclass(frozen=True)
class LogprobsConfig:
    """Configures log-probabilities. Names are vLLM's.

    max_logprobs: the likeliest token ids of one position that a request may ask for, at most; what `logprobs` and
    `prompt_logprobs` of -1 mean. It is a width of the programs: the larger, the more a step that wants any returns.
    logprobs_mode: what the values of output tokens are, one of LOGPROBS_MODES. Those of prompt tokens are always
    `raw_logprobs`.
    """

    max_logprobs: int = MAX_LOGPROBS
    logprobs_mode: str = "raw_logprobs"

    def __post_init__(self) -> None:
        at_least("max_logprobs", self.max_logprobs, 0)
        one_of("logprobs_mode", self.logprobs_mode, LOGPROBS_MODES)
