"""Encodes an EngineConfig as msgpack, for other processes of this engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from jaxserve.config.settings import EngineConfig


def config_to_bytes(config: EngineConfig) -> bytes:
    """Encodes the nested fields by name as msgpack."""
    return msgspec.msgpack.encode(config)


def config_from_bytes(data: bytes) -> EngineConfig:
    """Decodes and validates a configuration; raises ValueError when `data` is not one."""
    values = msgspec.msgpack.decode(data)
    config = msgspec.convert(values, EngineConfig)
    _refuse_unknown(config, values)
    return config


def _refuse_unknown(config: Any, values: dict[str, Any]) -> None:
    """Raises ValueError for fields that a config does not have: msgspec passes over those of a dataclass."""
    known = {field.name for field in dataclasses.fields(config)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{type(config).__name__} has unknown fields {unknown}")
    for name, value in values.items():
        nested = getattr(config, name)
        if dataclasses.is_dataclass(nested):
            _refuse_unknown(nested, value)
