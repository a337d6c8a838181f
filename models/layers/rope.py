"""Computes the frequencies of rotary embeddings, scaled where the context was extended. Imports no jax."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxserve.models.value_checks import brief, check_number

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""Fields of `RopeScaling` that kind `llama3` reads."""

YARN_FIELDS = (
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate",
)  # fmt: skip
LONGROPE_FIELDS = ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor")

READ_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor", "stretched"),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": YARN_FIELDS,
    "longrope": LONGROPE_FIELDS[1:],
    "llama3": LLAMA3_FIELDS,
}
"""Fields of `RopeScaling` that decide what each kind computes."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Describes how rotary frequencies are scaled beyond the trained context.

    kind `linear` divides every frequency by `factor`; kind `llama3` divides only the long wavelengths and blends in
    between (Llama 3.1 model card); kind `yarn` blends by the turns in the original context (arXiv 2309.00071); kind
    `dynamic` raises the base, and kind `longrope` divides each frequency by a factor of its own
    (`transformers.modeling_rope_utils` is the reference that the tests compare with). Transformers rotates each token
    of the last two by the length that its sequence has at that moment. Here the frequencies are those of the context
    that is served, so that a token does not depend on how its sequence was cut into steps.

    Attributes:
        kind: of `KINDS`.
        factor: by which the context grew.
        low_freq_factor: turns in the original context below which `llama3` divides a frequency.
        high_freq_factor: turns above which it leaves a frequency as it is.
        original_max_position_embeddings: context before scaling.
        stretched: the model's max_position_embeddings is the context after scaling. This holds for all kinds but
            `linear`, where it usually is the context before scaling, and `dynamic`.
        attention_factor: multiplies cosines and sines (`yarn`, `longrope`).
        beta_fast: turns in the original context above which `yarn` leaves a frequency as it is.
        beta_slow: turns below which it divides a frequency.
        truncate: the bounds that follow from the betas are rounded to whole frequencies (`yarn`).
        short_factor: divisor of each frequency where the context is at most the original one (`longrope`).
        long_factor: divisor of each frequency where it is longer.
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    stretched: bool = False
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rope_scaling kind is {brief(self.kind)}; supported kinds are {', '.join(KINDS)}")
        for name in (*LLAMA3_FIELDS, "attention_factor", "beta_fast", "beta_slow"):
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
        if self.kind == "yarn" and not self.beta_slow < self.beta_fast:
            raise ValueError(f"rope_scaling beta_slow is {self.beta_slow}; it must be below beta_fast {self.beta_fast}")
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope_scaling truncate is {brief(self.truncate)}; it must be true or false")
        for name in ("short_factor", "long_factor"):
            for value in getattr(self, name):
                check_number(f"rope_scaling {name}", value)

    @property
    def normalized(self) -> RopeScaling:
        """Returns this scaling with defaults in the fields that its kind does not read: equal ones compute the same."""
        if self.factor == self.attention_factor == 1.0 and self.kind != "longrope":
            return RopeScaling()  # every frequency then stays as it is
        return RopeScaling(self.kind, **{name: getattr(self, name) for name in READ_FIELDS[self.kind]})

    @property
    def context_factor(self) -> float:
        """Factor by which the context exceeds max_position_embeddings."""
        return self.factor if self.kind == "linear" and not self.stretched else 1.0

    def check_size(self, size: int) -> None:
        """Raises ValueError where there is no divisor for each of the size / 2 frequencies of `longrope`."""
        for name in ("short_factor", "long_factor") if self.kind == "longrope" else ():
            if len(getattr(self, name)) != size // 2:
                raise ValueError(
                    f"rope_scaling {name} has {len(getattr(self, name))} numbers; kind 'longrope' needs one for each "
                    f"pair of the {size} rotated elements of a head, which are {size // 2}"
                )


@dataclasses.dataclass(frozen=True)
class Rope:
    """Describes a rotary embedding.

    Attributes:
        theta: base of the wavelengths.
        scaling: of its frequencies.
    """

    theta: float = 10000.0
    scaling: RopeScaling = RopeScaling()

    def __post_init__(self) -> None:
        check_number("rope theta", self.theta)


def head_order(head_dim: int, size: int) -> tuple[int, ...] | None:
    """Returns the order of a head's elements in which element i is rotated together with element i + head_dim / 2.

    Checkpoints pair element i with element i + size / 2, where the first `size` elements are rotated. The others come
    in pairs too, whose angle is 0. Queries and keys in the same order have the same products.

    Args:
        head_dim: elements of a head.
        size: how many of them are rotated, an even number.

    Returns:
        The element of a checkpoint for each place; None where all are rotated, which changes nothing.
    """
    if size == head_dim:
        return None
    turned, still = range(size), range(size, head_dim)
    halves = [(part[: len(part) // 2], part[len(part) // 2 :]) for part in (turned, still)]
    return tuple(number for half in (0, 1) for part in halves for number in part[half])


def rope_frequencies(size: int, theta: float, scaling: RopeScaling, context: int = 1) -> np.ndarray:
    """Computes the inverse wavelengths in radians per position, float32 [size / 2].

    They are computed on the host in float64 and rounded once, so that they are constants of the program and the same on
    every device.

    Args:
        size: rotated elements of a head.
        theta: base of the wavelengths.
        scaling: see `RopeScaling`.
        context: longest sequence that is served, in positions; `dynamic` and `longrope` depend on it.
    """
    original = scaling.original_max_position_embeddings
    if scaling.kind == "dynamic" and context > original:
        theta *= (scaling.factor * context / original - (scaling.factor - 1)) ** (size / (size - 2))
    freq = 1.0 / theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
    if scaling.kind == "linear":
        freq = freq / scaling.factor
    if scaling.kind == "longrope":
        freq = freq / np.array(scaling.long_factor if context > original else scaling.short_factor)
    if scaling.kind == "llama3":
        # Share of the unscaled frequency: 0 for waves longer than original / low, 1 for those shorter than original /
        # high.
        turns = original * freq / (2 * math.pi)
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        share = np.clip(share, 0.0, 1.0)
        freq = (1 - share) * freq / scaling.factor + share * freq
    if scaling.kind == "yarn":
        share = _yarn_share(size, theta, scaling)
        freq = (1 - share) * freq / scaling.factor + share * freq
    return freq.astype(np.float32)


def _yarn_share(size: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Returns the share of each unscaled frequency, float64 [size / 2]: 1 for the shortest waves, 0 for the longest."""

    def place(turns: float) -> float:
        """Index of the frequency with so many turns in the original context."""
        return size * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (np.arange(size // 2) - low) / (high - low if high != low else 0.001)
    return 1 - np.clip(ramp, 0.0, 1.0)
