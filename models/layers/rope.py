"""Computes the frequencies of rotary embeddings, scaled where the context was extended. Imports no jax."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxserve.models.value_checks import brief, check_number

KINDS = ("default", "linear", "llama3")

LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""Fields of `RopeScaling` that kind `llama3` reads."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Describes how rotary frequencies are scaled beyond the trained context.

    kind `linear` divides every frequency by `factor`; kind `llama3` divides only the long wavelengths and blends in
    between (Llama 3.1 model card; `transformers.modeling_rope_utils` is the reference the tests compare with).

    stretched: the model's max_position_embeddings is the context after scaling. This always holds for `llama3`; for
        `linear` it is usually the context before scaling.
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    stretched: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rope_scaling kind is {brief(self.kind)}; supported kinds are {', '.join(KINDS)}")
        for name in LLAMA3_FIELDS:
            check_number(f"rope_scaling {name}", getattr(self, name))
        if self.factor < 1.0:
            raise ValueError(f"rope_scaling factor is {self.factor}; it must be at least 1")
        if self.kind == "default" and self.factor != 1.0:
            raise ValueError(f"rope_scaling factor is {self.factor}; kind 'default' has none, so it must be 1")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling low_freq_factor is {self.low_freq_factor}; it must be below "
                f"high_freq_factor {self.high_freq_factor}"
            )

    @property
    def normalized(self) -> RopeScaling:
        """Returns this scaling with defaults in the fields that its kind does not read: equal ones compute the same."""
        if self.factor == 1.0:
            return RopeScaling()  # either kind then leaves every frequency as it is
        if self.kind == "llama3":
            return dataclasses.replace(self, stretched=False)  # it says nothing there
        return RopeScaling(self.kind, self.factor, stretched=self.stretched)

    @property
    def context_factor(self) -> float:
        """Factor by which the context exceeds max_position_embeddings."""
        return self.factor if self.kind == "linear" and not self.stretched else 1.0


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Computes the inverse wavelengths in radians per position, float32 [D / 2].

    They are computed on the host in float64 and rounded once, so that they are constants of the program and the same on
    every device. Kinds of scaling: see `RopeScaling`.
    """
    freq = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling.kind == "linear":
        freq = freq / scaling.factor
    if scaling.kind == "llama3":
        # Share of the unscaled frequency: 0 for waves longer than original / low, 1 for those shorter than original /
        # high.
        turns = scaling.original_max_position_embeddings * freq / (2 * math.pi)
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        share = np.clip(share, 0.0, 1.0)
        freq = (1 - share) * freq / scaling.factor + share * freq
    return freq.astype(np.float32)
