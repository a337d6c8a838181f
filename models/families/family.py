"""Defines how a model family maps the keys of its `config.json` to layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

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
    """

    architecture: str
    model_type: str
    layers: Callable[[Mapping[str, Any]], tuple[LayerSpec, ...]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignores_others: bool = False
    partial_rotation: bool = False
