"""Reads the rotary settings of a `config.json`. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxserve.models.layers.rope import KINDS, LLAMA3_FIELDS, RopeScaling
from jaxserve.models.value_checks import brief, check_number


def rope_settings(raw: Mapping[str, Any], context: int) -> tuple[Any, RopeScaling]:
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
    """Returns the rotary settings under either key. Both may be present only where they agree."""
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
        return RopeScaling(kind, **_numbers(fields, kind, LLAMA3_FIELDS))
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
    """Returns whether max_position_embeddings (`context`) of linear scaling already is the context after scaling."""
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
