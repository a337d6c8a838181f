"""Reads what a `config.json` says of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.layer_specs import RouterSpec
from jaxserve.models.loading.config_keys import optional
from jaxserve.models.value_checks import brief, check_count

INERT = frozenset({"router_aux_loss_coef", "router_jitter_noise"})
"""Keys of training."""

_COUNTS = ("num_local_experts", "num_experts")
_PER_TOKEN = ("num_experts_per_tok", "experts_per_token")


def num_experts(keys: Mapping[str, Any], default: int) -> int:
    """Returns the number of experts of a layer, under either of its names; default: where no key tells it."""
    name, count = _agreed(keys, _COUNTS, default)
    check_count(f"config.json {name}", count)
    return count


def router(keys: Mapping[str, Any], *, count: int, per_token: int, **fields: Any) -> RouterSpec:
    """Returns how tokens choose experts. Raises ValueError, naming the key, where they cannot.

    Args:
        keys: of the file.
        count: number of experts where no key tells it.
        per_token: experts of a token where no key tells it.
        fields: further fields of `RouterSpec`.
    """
    count = num_experts(keys, count)
    name, chosen = _agreed(keys, _PER_TOKEN, per_token)
    check_count(f"config.json {name}", chosen)
    if chosen > count:
        told = next((each for each in _COUNTS if keys.get(each) is not None), _COUNTS[0])
        raise ValueError(f"config.json {name} is {chosen}; it must be at most {told} {count}")
    return RouterSpec(count, chosen, **fields)


def sparse_layers(keys: Mapping[str, Any], count: int) -> list[bool]:
    """Returns whether each of `count` layers has experts, from `mlp_only_layers` and `decoder_sparse_step`."""
    step, dense = optional(keys, "decoder_sparse_step", 1), optional(keys, "mlp_only_layers", [])
    check_count("config.json decoder_sparse_step", step)
    if not isinstance(dense, list) or any(type(number) is not int or not 0 <= number < count for number in dense):
        raise ValueError(
            f"config.json mlp_only_layers is {brief(dense)}; it must list numbers of layers, from 0 to below "
            f"num_hidden_layers {count}"
        )
    return [number not in dense and (number + 1) % step == 0 for number in range(count)]


def _agreed(keys: Mapping[str, Any], names: tuple[str, ...], default: int) -> tuple[str, Any]:
    """Returns the name and the value that is given under one of several names, or under several that agree."""
    given = [(name, keys[name]) for name in names if keys.get(name) is not None]
    if any(value != given[0][1] for _, value in given):
        told = " and ".join(f"{name} {brief(value)}" for name, value in given)
        raise ValueError(f"config.json has {told}; they contradict each other")
    return given[0] if given else (names[0], default)
