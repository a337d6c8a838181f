"""Reads what a `config.json` says of MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.layer_specs import MLPSpec
from jaxserve.models.loading.config_keys import optional, required_count
from jaxserve.models.value_checks import brief

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""Activations by the names that transformers has for them; several are one function."""


def activation(keys: Mapping[str, Any], name: str = "hidden_act", default: str = "silu") -> str:
    """Returns the activation that a key names, as `MLPSpec` has it. Raises ValueError where it is not known."""
    value = optional(keys, name, default)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise ValueError(f"config.json {name} is {brief(value)}; it must be one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def gated_mlp(keys: Mapping[str, Any], *, bias: bool = False) -> MLPSpec:
    """Returns the gated MLP of `intermediate_size` and `hidden_act`."""
    return MLPSpec(required_count(keys, "intermediate_size"), bias=bias, activation=activation(keys))
