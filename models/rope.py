"""Rotary embeddings: how their frequencies are stretched, and what a Hugging Face configuration says of it.

Imports no jax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.models.json_files import brief

KINDS = ("default", "linear", "llama3")

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def check_number(name: str, value: Any) -> None:
    """Raises ValueError where a value is no finite number above 0."""
    # The comparison comes last: no float holds a whole number of more than 308 digits.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf or value > 1e308:
        raise ValueError(f"{name} is {brief(value)}; it must be a finite number above 0")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    kind `linear` divides every frequency by `factor`; kind `llama3` divides only the long wavelengths and blends
    in between (Llama 3.1 model card; `transformers.modeling_rope_utils` is the reference the tests compare with).

    stretched: the model's max_position_embeddings is the context after scaling. It is so of `llama3` anyway; that of
        `linear` is usually the context before it.
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
        for name in _LLAMA3:
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
        """The same scaling with defaults in the fields that its kind does not read: equal ones compute the same."""
        if self.factor == 1.0:
            return RopeScaling()  # either kind then leaves every frequency as it is
        if self.kind == "llama3":
            return dataclasses.replace(self, stretched=False)  # it says nothing there
        return RopeScaling(self.kind, self.factor, stretched=self.stretched)

    @property
    def context_factor(self) -> float:
        """How many times max_position_embeddings the context is."""
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


def from_hf(raw: Mapping[str, Any], context: int) -> tuple[Any, RopeScaling]:
    """Reads the base (theta) and the scaling of a `config.json`.

    transformers 5 writes `rope_parameters`, earlier releases `rope_scaling` with a `rope_theta` beside it.

    Args:
        raw: the content of the file.
        context: max_position_embeddings; it stands in for original_max_position_embeddings, as in transformers.

    Raises:
        ValueError: the settings are malformed, contradict each other, or ask for what is not supported.
    """
    fields = _fields(raw)
    theta = fields.get("rope_theta")
    beside = raw.get("rope_theta")
    if theta is not None and beside is not None and theta != beside:
        raise ValueError(
            f"config.json rope_theta is {beside!r}, and {theta!r} among the rotary settings; they contradict each other"
        )
    theta = beside if theta is None else theta
    return (10000.0 if theta is None else theta), _scaling(raw, fields, context)


def _fields(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings of either name. Both may be there only where they agree."""
    given = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)}
    for name, fields in given.items():
        if not isinstance(fields, dict):
            raise ValueError(f"config.json {name} is {brief(fields)}; it must be an object")
        for key, value in fields.items():
            if isinstance(value, dict):
                raise ValueError(f"config.json {name} has settings for {key!r} alone; all layers must be rotated alike")
        partial = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        _check_whole_heads(partial)
    _check_whole_heads(raw.get("partial_rotary_factor"))
    if len(given) == 2:
        one, other = given["rope_scaling"], given["rope_parameters"]
        for key in one.keys() & other.keys():
            if one[key] != other[key]:
                raise ValueError(
                    f"config.json rope_scaling {key} is {one[key]!r} and rope_parameters {key} is {other[key]!r}; "
                    "they contradict each other"
                )
        return {**other, **one}
    return next(iter(given.values()), {})


def _check_whole_heads(partial: Any) -> None:
    if partial not in (None, 1, 1.0):
        raise ValueError(f"config.json partial_rotary_factor is {partial!r}; only whole heads are rotated")


def _scaling(raw: Mapping[str, Any], fields: Mapping[str, Any], context: int) -> RopeScaling:
    new, old = fields.get("rope_type"), fields.get("type")
    if new and old and new != old:
        raise ValueError(
            f"config.json rope_scaling rope_type is {new!r} and type is {old!r}; they contradict each other"
        )
    kind = new or old or "default"
    if kind == "llama3":
        fields = {**fields, "original_max_position_embeddings": _original(raw, fields, context)}
        return RopeScaling(kind, **_numbers(fields, kind, _LLAMA3))
    if kind == "linear":
        scaling = RopeScaling(kind, **_numbers(fields, kind, ("factor",)))
        stretched = _is_stretched(_original(raw, fields, context), scaling.factor, context)
        return dataclasses.replace(scaling, stretched=stretched)
    factor = fields.get("factor")
    return RopeScaling(kind) if factor is None or kind not in KINDS else RopeScaling(kind, factor)


def _original(raw: Mapping[str, Any], fields: Mapping[str, Any], context: int) -> Any:
    own, original = fields.get("original_max_position_embeddings"), raw.get("original_max_position_embeddings")
    if own is not None and original is not None and own != original:
        raise ValueError(
            f"config.json original_max_position_embeddings is {original!r}, and {own!r} among the rotary settings; "
            "they contradict each other"
        )
    original = own if original is None else original
    return context if original is None else original


def _is_stretched(original: Any, factor: float, context: int) -> bool:
    """Whether max_position_embeddings (`context`) of linear scaling is the context after it already."""
    check_number("config.json original_max_position_embeddings", original)
    if original == context:
        return False
    if abs(original * factor - context) < 1:  # a factor may have been rounded
        return True
    raise ValueError(
        f"config.json original_max_position_embeddings is {original}, max_position_embeddings {context} and the factor "
        f"of linear scaling {factor}; the second must be the first, or the first times the factor"
    )


def _numbers(fields: Mapping[str, Any], kind: str, names: tuple[str, ...]) -> dict[str, Any]:
    for name in names:
        if fields.get(name) is None:
            raise ValueError(f"config.json rope_scaling has no {name}; kind {kind!r} needs it")
    return {name: fields[name] for name in names}
