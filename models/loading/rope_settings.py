"""Reads the rotary settings of a `config.json`. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxserve.models.layers.rope import KINDS, LLAMA3_FIELDS, LONGROPE_FIELDS, YARN_FIELDS, RopeScaling
from jaxserve.models.loading.config_keys import LARGEST
from jaxserve.models.value_checks import brief, check_count, check_number

_KNOWN = frozenset(
    ("rope_theta", "rope_type", "type", "partial_rotary_factor", "mscale", "mscale_all_dim")
    + LLAMA3_FIELDS
    + YARN_FIELDS
    + LONGROPE_FIELDS
)
"""Settings that some kind of scaling reads; a kind ignores those of others, as transformers does."""

_INERT = frozenset(("finetuned", "max_position_embeddings"))
"""Settings that describe a checkpoint and that nothing reads."""


def rope_settings(
    raw: Mapping[str, Any],
    context: int,
    layer_type: str | None = None,
    default: float = 10000.0,
    others: frozenset[str] = frozenset(),
) -> tuple[Any, RopeScaling]:
    """Reads the base (theta) and the scaling of a `config.json`.

    transformers 5 writes `rope_parameters`, earlier releases `rope_scaling` with a `rope_theta` beside it.

    Args:
        raw: the content of the file.
        context: max_position_embeddings; it stands in for original_max_position_embeddings, as in transformers.
        layer_type: of the layers whose settings are read, where a family has several ("full_attention"); None where
            all layers must be rotated alike.
        default: base where no key tells it.
        others: settings that the family reads itself.

    Raises:
        ValueError: the settings are malformed, contradict each other, or ask for what is not supported.
    """
    fields = _fields(raw, layer_type, _KNOWN | _INERT | others)
    theta = fields.get("rope_theta")
    # It is the base of layers with full attention, where another type of layers has settings of its own.
    beside = raw.get("rope_theta") if layer_type in (None, "full_attention") else None
    if theta is not None and beside is not None and theta != beside:
        raise ValueError(
            f"config.json rope_theta is {beside!r}, and {theta!r} among the rotary settings; they contradict each other"
        )
    theta = beside if theta is None else theta
    return (default if theta is None else theta), _scaling(raw, fields, context)


def rotary_size(raw: Mapping[str, Any], head_dim: int, *, partial: bool) -> int:
    """Returns how many elements of a head are rotated: all of them, or where `partial` is set the share
    `partial_rotary_factor`.

    Raises ValueError where that is no even number from 2 to the size of a head, or two keys contradict each other.
    """
    given = [raw.get("partial_rotary_factor")]
    given += [fields.get("partial_rotary_factor") for fields in _given(raw).values() if isinstance(fields, dict)]
    found = {value for value in given if value is not None}
    if len(found) > 1:
        raise ValueError(
            f"config.json partial_rotary_factor is {' and '.join(map(repr, sorted(found, key=repr)))}; they contradict "
            "each other"
        )
    share = next(iter(found), 1.0)
    if share == 1:
        return head_dim
    if not partial:
        raise ValueError(f"config.json partial_rotary_factor is {share!r}; only whole heads are rotated")
    check_count("config.json head_dim", head_dim, LARGEST["head_dim"])
    check_number("config.json partial_rotary_factor", share)
    size = int(head_dim * share)
    if share > 1 or size % 2 or size < 2:
        raise ValueError(
            f"config.json partial_rotary_factor is {share!r}; of a head of {head_dim} elements it must leave an even "
            "number from 2 to all of them"
        )
    return size


def layer_type_settings(raw: Mapping[str, Any], layer_type: str) -> Mapping[str, Any] | None:
    """Returns the rotary settings of one type of layers; None where none are told for it alone."""
    for fields in _given(raw).values():
        if isinstance(fields, dict) and isinstance(fields.get(layer_type), dict):
            return fields[layer_type]
    return None


def _given(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)}


def _fields(raw: Mapping[str, Any], layer_type: str | None, known: frozenset[str]) -> Mapping[str, Any]:
    """Returns the rotary settings under either key. Both may be present only where they agree."""
    given = _given(raw)
    for name, fields in given.items():
        if not isinstance(fields, dict):
            raise ValueError(f"config.json {name} is {brief(fields)}; it must be an object")
        nested = [key for key, value in fields.items() if isinstance(value, dict)]
        if nested and layer_type is None:
            raise ValueError(
                f"config.json {name} has settings for {nested[0]!r} alone; all layers must be rotated alike"
            )
        if nested:
            given[name] = fields.get(layer_type) or {}
        for key, value in given[name].items():
            if key not in known and value not in (None, False, 0):
                raise ValueError(
                    f"config.json {name} has {key} {brief(value)}, which is not known; if the checkpoint was made "
                    "without it, remove it"
                )
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


def _scaling(raw: Mapping[str, Any], fields: Mapping[str, Any], context: int) -> RopeScaling:
    new, old = fields.get("rope_type"), fields.get("type")
    if new and old and new != old:
        raise ValueError(
            f"config.json rope_scaling rope_type is {new!r} and type is {old!r}; they contradict each other"
        )
    kind = new or old or "default"
    kind = "longrope" if kind == "su" else kind  # its first name
    if kind == "llama3":
        fields = {**fields, "original_max_position_embeddings": _original(raw, fields, context)}
        return RopeScaling(kind, **_numbers(fields, kind, LLAMA3_FIELDS))
    if kind in ("yarn", "longrope"):
        return _with_attention_factor(raw, fields, kind, context)
    if kind == "dynamic":
        return RopeScaling(kind, **_numbers(fields, kind, ("factor",)), original_max_position_embeddings=context)
    if kind == "linear":
        scaling = RopeScaling(kind, **_numbers(fields, kind, ("factor",)))
        stretched = _is_stretched(_original(raw, fields, context), scaling.factor, context)
        return dataclasses.replace(scaling, stretched=stretched)
    factor = fields.get("factor")
    return RopeScaling(kind) if factor is None or kind not in KINDS else RopeScaling(kind, factor)


def _with_attention_factor(raw: Mapping[str, Any], fields: Mapping[str, Any], kind: str, context: int) -> RopeScaling:
    """Returns scaling of the kinds `yarn` and `longrope`, with the attention factor that follows from the others."""
    original = _original(raw, fields, context)
    check_number("config.json original_max_position_embeddings", original)
    factor = fields.get("factor")
    factor = max(1.0, context / original) if factor is None else factor
    check_number("rope_scaling factor", factor)
    if kind == "longrope":
        of_kind: dict[str, Any] = {name: _number_list(fields, name) for name in ("short_factor", "long_factor")}
        follows = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    else:
        given = ("beta_fast", "beta_slow", "truncate")
        of_kind = {name: fields[name] for name in given if fields.get(name) is not None}
        scales = [fields.get(name) for name in ("mscale", "mscale_all_dim")]
        for name, value in zip(("mscale", "mscale_all_dim"), scales, strict=True):
            if value:
                check_number(f"rope_scaling {name}", value)
        magnitudes = [0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0 for scale in scales if scale]
        both = len(magnitudes) == 2
        follows = magnitudes[0] / magnitudes[1] if both else 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    told = fields.get("attention_factor")
    return RopeScaling(
        kind,
        factor,
        original_max_position_embeddings=original,
        attention_factor=follows if told is None else told,
        stretched=True,
        **of_kind,
    )


def _number_list(fields: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = fields.get(name)
    if not isinstance(values, list):
        raise ValueError(f"config.json rope_scaling {name} is {brief(values)}; kind 'longrope' needs a list of numbers")
    for value in values:
        check_number(f"rope_scaling {name}", value)
    return tuple(map(float, values))


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
