"""Reads the per-layer sliding windows of a `config.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.models.loading.config_keys import flag, optional_count, required_count
from jaxserve.models.value_checks import brief

_TYPES = ("full_attention", "sliding_attention")


def layer_windows(keys: Mapping[str, Any], default: Sequence[str] | None = None) -> tuple[int | None, ...]:
    """Returns the window of each layer, from `layer_types` if given, else from `max_window_layers`.

    default: what stands for `layer_types`, in families without `max_window_layers`.

    Raises ValueError where the keys contradict each other or name another type of attention.
    """
    count = required_count(keys, "num_hidden_layers")
    windowed = flag(keys, "use_sliding_window")
    # transformers writes 0 for a window that is off (Qwen2-MoE).
    window = optional_count(keys, "sliding_window") if windowed or keys.get("sliding_window") != 0 else None
    if not windowed:
        window = None
    types, full = keys.get("layer_types"), keys.get("max_window_layers")
    if types is None and default is not None:
        types = list(default)
    elif types is None:
        if window is None:
            return (None,) * count
        if not isinstance(full, int) or isinstance(full, bool) or full < 0:
            raise ValueError(f"config.json max_window_layers is {brief(full)}; it must be a whole number of at least 0")
        types = [_TYPES[number >= full] for number in range(count)]
    _check_types(types, count)
    if window is None and _TYPES[1] in types:
        raise ValueError(
            "config.json layer_types has sliding_attention, which needs use_sliding_window true and a sliding_window; "
            f"they are {brief(keys.get('use_sliding_window'))} and {brief(keys.get('sliding_window'))}"
        )
    return tuple(window if kind == _TYPES[1] else None for kind in types)


def listed_windows(keys: Mapping[str, Any], pattern: int = 0) -> tuple[int | None, ...]:
    """Returns the window of each layer for families without `use_sliding_window`, from `layer_types` if given.

    pattern: without `layer_types`, every so manyth layer has full attention; 0 for none, or for all of them where there
        is no `sliding_window`.

    Raises ValueError where the keys contradict each other or name another type of attention.
    """
    count = required_count(keys, "num_hidden_layers")
    window = optional_count(keys, "sliding_window")
    types = keys.get("layer_types")
    if types is None:
        types = [
            _TYPES[window is not None and not (pattern and (number + 1) % pattern == 0)] for number in range(count)
        ]
    _check_types(types, count)
    if window is None and _TYPES[1] in types:
        raise ValueError("config.json layer_types has sliding_attention, which needs a sliding_window; it is None")
    return tuple(window if kind == _TYPES[1] else None for kind in types)


def _check_types(types: Any, count: int) -> None:
    if not isinstance(types, list) or len(types) != count or any(kind not in _TYPES for kind in types):
        raise ValueError(
            f"config.json layer_types is {brief(types)}; it must list {' or '.join(_TYPES)} for each of "
            f"num_hidden_layers {count}"
        )
