"""An EngineConfig as msgpack, for other processes of this engine."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import msgpack

from jaxserve.config.settings import EngineConfig


def config_to_bytes(config: EngineConfig) -> bytes:
    """msgpack of the nested fields by name."""
    packed = msgpack.packb(dataclasses.asdict(config))
    assert packed is not None  # the package's stubs allow None
    return packed


def config_from_bytes(data: bytes) -> EngineConfig:
    """The configuration in `data`, validated anew; raises ValueError where it is not one."""
    return _build(EngineConfig, msgpack.unpackb(data, use_list=False))


def _build(kind: type, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(f"{kind.__name__} has unknown fields {sorted(unknown)}")
    return kind(**{name: _field(hints[name], value) for name, value in values.items()})


def _field(hint: Any, value: Any) -> Any:
    """A nested dataclass is built from its dict; anything else is already what it should be."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    nested = [option for option in options if dataclasses.is_dataclass(option)]
    return _build(typing.cast(type, nested[0]), value) if nested and isinstance(value, dict) else value
