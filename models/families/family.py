"""Defines how a model family maps the keys of its `config.json` to layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.models.families.tensor_names import TensorNames
from jaxserve.models.layer_specs import LayerSpec


@dataclasses.dataclass(frozen=True)
class Family:
    """Describes one architecture that can be served.

    Attributes:
        architecture: its name in `architectures` of a `config.json`.
        model_type: its name in `model_type`.
        layers: maps keys of a `config.json` to the layers, first to last; raises ValueError naming a key whose value
            it cannot serve. `ModelConfig` also calls it with its own fields, which have the same names.
        defaults: values of keys that a `config.json` leaves out, as in the family's class of transformers.
        ignores_others: a checkpoint may hold keys by which other architectures compute something else; a line then
            says that they are not used. Otherwise they are refused.
        partial_rotation: a share of each head may be rotated (`partial_rotary_factor`).
        fields: maps the keys to further fields of `ModelConfig`, by their names; None for a family without.
        key_names: the family's names of keys that other families name otherwise.
        inert: keys that affect no logits, besides those that are inert for all families.
        names: of the tensors of its checkpoints.
        rope_theta: base of rotary embeddings where no key tells it.
        rope_keys: settings among the rotary ones that `layers` reads.
        dequantized: values of `quant_method` in `quantization_config` for which loading dequantizes the tensors.
        nested_rope: layers of full attention have rotary settings of their own (`rope_parameters` may be nested).
        scaled_context: max_position_embeddings is the context after linear scaling.
    """

    architecture: str
    model_type: str
    layers: Callable[[Mapping[str, Any]], tuple[LayerSpec, ...]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignores_others: bool = False
    partial_rotation: bool = False
    fields: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    key_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    names: TensorNames = TensorNames()
    rope_theta: float = 10000.0
    rope_keys: frozenset[str] = frozenset()
    dequantized: frozenset[str] = frozenset()
    nested_rope: bool = False
    scaled_context: bool = False
