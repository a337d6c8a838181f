"""Finds the language model of a checkpoint that has other parts, such as a vision tower. Imports no jax."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxserve.models.families.tensor_names import TensorNames
from jaxserve.models.loading.json_files import read_object
from jaxserve.models.registry import FAMILIES
from jaxserve.models.value_checks import brief

WRAPPERS = (
    "Gemma3ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
)
"""Architectures whose language model computes for a text what it would compute alone."""

_SHARED = (
    "bos_token_id", "compression_config", "dtype", "eos_token_id", "quantization_config", "tie_word_embeddings",
    "torch_dtype",
)  # fmt: skip
"""Keys that stand beside `text_config` and count for the language model, where it has none of its own."""

_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_OTHER_PARTS = tuple(
    f"{prefix}{part}"
    for prefix in ("", "model.")
    for part in ("vision_tower.", "vision_model.", "multi_modal_projector.", "image_newline")
)


def text_part(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """Returns the `config.json` of the language model alone, and a log line where there are other parts.

    Raises ValueError where a vision tower belongs to a model whose language model is not known to stand alone.
    """
    names = raw.get("architectures") or []
    text = raw.get("text_config")
    if names and isinstance(names, list) and names[0] in WRAPPERS and isinstance(text, dict):
        kinds = {family.model_type: family.architecture for family in FAMILIES}
        architecture = kinds.get(text.get("model_type", ""))
        if architecture is None:
            raise ValueError(
                f"model architecture is {names[0]!r} with a text_config of model_type {brief(text.get('model_type'))}; "
                f"known architectures are {', '.join(sorted(kinds.values()))}"
            )
        shared = {name: raw[name] for name in _SHARED if name in raw and name not in text}
        line = f"the text part ({architecture}) of {names[0]} is served; its other parts are not read"
        return {**shared, **text, "architectures": [architecture]}, [line]
    return raw, []


def text_names(directory: pathlib.Path, names: TensorNames) -> TensorNames:
    """Returns the names of a family's tensors as this checkpoint has them."""
    path = directory / "config.json"
    if not path.is_file() or not text_part(read_object(path))[1]:
        return names
    return dataclasses.replace(names, prefixes=(*_PREFIXES, *names.prefixes), other_parts=_OTHER_PARTS)
