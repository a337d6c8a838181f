"""Reads what a `config.json` says of a model as a whole, and writes it. Imports no jax."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from jaxserve.models.families.family import Family
from jaxserve.models.layers.rope import READ_FIELDS, RopeScaling
from jaxserve.models.loading.config_keys import OTHER_KEYS, ConfigKeys, required_count
from jaxserve.models.loading.json_files import read_object
from jaxserve.models.registry import ARCHITECTURES
from jaxserve.models.value_checks import brief

T = TypeVar("T")

_CONTEXT_KEYS = ("max_sequence_length", "max_seq_length", "max_seq_len", "seq_length", "n_positions")
"""Keys under which a `config.json` may give the context length besides max_position_embeddings."""

WHOLE = "jaxserve_config"
"""Key of a `config.json` that holds every field of a `ModelConfig`, for layers that no other keys describe."""


def architecture_name(raw: Mapping[str, Any]) -> str:
    """Returns the architecture; checked first, because for another architecture no other key need have the same
    meaning.
    """
    names = raw.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        kind = f" (model_type is {brief(raw['model_type'])})" if raw.get("model_type") else ""
        raise ValueError(
            f"config.json architectures is {brief(names)}; exactly one name is needed; known architectures are "
            f"{', '.join(sorted(ARCHITECTURES))}{kind}"
        )
    if names[0] not in ARCHITECTURES and raw.get("vision_config"):
        raise ValueError(
            f"model architecture is {brief(names[0])}, with a vision tower; its text part is not known to stand alone; "
            f"known architectures are {', '.join(sorted(ARCHITECTURES))}"
        )
    return names[0]


def context_and_scaling(raw: Mapping[str, Any], scaling: RopeScaling) -> tuple[int, RopeScaling]:
    """Returns max_position_embeddings, or the context length under another key, and the scaling that applies to it.

    Where scaling multiplies max_position_embeddings, a limit of at most that bounds the context before scaling, and a
    larger one the context after it.
    """
    context = required_count(raw, "max_position_embeddings")
    bounds = [required_count(raw, name) for name in _CONTEXT_KEYS if raw.get(name) is not None]
    before = min([context, *bounds])
    after = min((bound for bound in bounds if bound > context), default=None)
    if scaling.kind == "yarn":
        whole = max(context, int(scaling.original_max_position_embeddings * scaling.factor))
        return min([whole, *bounds]), scaling
    if after is None or after >= before * scaling.context_factor:
        return before, scaling
    return after, dataclasses.replace(scaling, stretched=True)


def other_limits(raw: Mapping[str, Any], limits: tuple[int, int], directory: pathlib.Path) -> list[str]:
    """Returns a log line where other keys that give the context length disagree with it.

    A tokenizer's model_max_length is often that of a training run, or absurd, so it is only logged.

    Args:
        raw: the content of config.json.
        limits: the context before scaling, and the context.
        directory: of the checkpoint.
    """
    keys = ("max_position_embeddings", *_CONTEXT_KEYS)
    found = {name: raw[name] for name in keys if raw.get(name) is not None}
    path = directory / "tokenizer_config.json"
    longest = read_object(path).get("model_max_length") if path.is_file() else None
    if isinstance(longest, int | float) and 0 < longest < 2**31:
        found["model_max_length (of tokenizer_config.json)"] = longest
    if all(value in limits for value in found.values()):
        return []
    told = ", ".join(f"{name} {value}" for name, value in found.items())
    return [f"the files of {directory} have {told}; the context is {limits[1]} tokens"]


def unread_keys(keys: ConfigKeys, family: Family) -> list[str]:
    """Returns a log line where config.json has settings that the family does not know.

    Raises ValueError where another architecture would compute something different because of them, unless the family
    allows it.
    """
    unread = keys.unread()
    refused = [name for name in unread if name in OTHER_KEYS and not family.ignores_others]
    if refused:
        told = ", ".join(f"{name} {brief(keys[name])}" for name in refused)
        raise ValueError(
            f"config.json has {told}, by which models compute something else and which {family.architecture} does not "
            "know; if the checkpoint was made without it, set it to null"
        )
    lines = []
    if unread:
        lines.append(f"config.json has {', '.join(unread)}, which {family.architecture} does not know; not used")
    if keys.get("model_type") not in (None, family.model_type):
        lines.append(
            f"config.json model_type is {brief(keys['model_type'])}; the architecture {family.architecture} counts"
        )
    return lines


def read_whole(content: Any, kind: type[T]) -> T:
    """Reads what stands under `WHOLE`, a `ModelConfig`, which is `kind`. Raises ValueError where it is none."""
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"config.json {WHOLE} is malformed: {error}") from error


def written_keys(config: Any, family: Family) -> dict[str, Any]:
    """Returns fields of a `config.json` for a `ModelConfig`; not all layers can be described so."""
    raw: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("architecture", "rope_scaling", "eos_token_ids", "layers", "quantization")
    }
    raw |= {
        "architectures": [config.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "eos_token_id": list(config.eos_token_ids) or None,
        "rope_scaling": None,
    }
    if config.sliding_window is not None:
        kinds = ("full_attention", "sliding_attention")
        windows = [layer.attention.sliding_window is not None for layer in config.layer_specs]
        # Some families have no layer_types, and read the window for all layers.
        told = {"max_window_layers": 0} if all(windows) else {"layer_types": [kinds[each] for each in windows]}
        raw |= {"use_sliding_window": True, **told}
    scaling: RopeScaling = config.rope_scaling
    if scaling.kind != "default":
        raw["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        fields = (name for name in READ_FIELDS[scaling.kind] if name != "stretched")
        raw["rope_scaling"] |= {name: getattr(scaling, name) for name in fields}
    for name in ("short_factor", "long_factor") if scaling.kind == "longrope" else ():
        raw["rope_scaling"][name] = list(getattr(scaling, name))
    if scaling.kind == "linear" and scaling.stretched:
        original = config.max_position_embeddings / scaling.factor
        raw["rope_scaling"]["original_max_position_embeddings"] = original
    return raw
