"""Fills parameters from a checkpoint's tensors and places them on their devices."""

from __future__ import annotations

import dataclasses
import logging
import math
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxserve.models.layers.parameter import Parameter, Params, Source
from jaxserve.models.layers.quantized import Quantized
from jaxserve.models.loading.quantize import quantized
from jaxserve.models.loading.quantized_tensors import QuantizedTensor
from jaxserve.models.loading.safetensors_file import StoredTensor, stored_bytes

PROGRESS_SECONDS = 10.0
"""Seconds between lines that tell the progress of loading."""

_log = logging.getLogger(__name__)


def filled(leaf: jax.ShapeDtypeStruct, sources: tuple[Source, ...], stored: Mapping[str, Any]) -> jax.Array:
    """Assembles one parameter on its devices.

    Args:
        leaf: its shape, dtype and sharding.
        sources: what fills it.
        stored: what `values` of each source's tensor is asked of, by the name of the tensor.
    """
    buffer = np.empty(leaf.shape, leaf.dtype)
    for source in sources:
        target = source.target(buffer)
        # Converts in small blocks from the mapped file to its place, with no array in between.
        np.copyto(target, stored[source.tensor].values(source, target.shape), casting="unsafe")
    return _placed(buffer, leaf)


def filled_quantized(leaf: Quantized, parameter: Parameter, stored: Mapping[str, Any]) -> Quantized:
    """Assembles one quantized parameter on its devices: as it is stored, or of plain tensors, which are quantized.

    Arguments are those of `filled`.
    """
    assert parameter.scheme is not None
    arrays = {name: getattr(leaf, name) for name in ("values", "scales", "zeros", "order")}
    made = {name: np.empty(one.shape, one.dtype) for name, one in arrays.items() if one is not None}
    for source in parameter.sources:
        for name, array in _parts(stored[source.tensor], source, parameter).items():
            if name == "order":
                made[name][...] = array
            else:
                target = source.target(made[name])
                np.copyto(target, array.reshape(target.shape))
    return dataclasses.replace(leaf, **{name: _placed(buffer, arrays[name]) for name, buffer in made.items()})


def _parts(stored: Any, source: Source, parameter: Parameter) -> dict[str, np.ndarray]:
    """Returns what a source puts into each array of a quantized parameter."""
    assert parameter.scheme is not None
    shape = list(parameter.shape)
    if source.axis is not None:
        shape[source.axis] = source.stop - source.start
    outs = shape[: len(shape) - parameter.contracted]
    if not isinstance(stored, QuantizedTensor):
        weights = stored.values(source, tuple(shape)).reshape(math.prod(outs), -1)
        numbers, scales = quantized(weights, parameter.scheme)
        return {"values": numbers, "scales": scales}
    arrays = {"values": stored.numbers(), "scales": stored.scales(), "zeros": stored.zeros()}
    parts = {
        name: source.values(array, (*outs, array.shape[-1])) for name, array in arrays.items() if array is not None
    }
    order = stored.order()
    return parts if order is None else {**parts, "order": order}


def _placed(buffer: np.ndarray, leaf: Any) -> jax.Array:
    # Without the wait, buffers would queue up faster than a device takes them.
    return jax.block_until_ready(jax.device_put(buffer, leaf.sharding))


class LoadProgress:
    """Logs how much of a checkpoint has been read, and how fast."""

    def __init__(self, directory: pathlib.Path, parts: set[StoredTensor]):
        """Starts the clock. parts: all tensors that will be read."""
        self._directory = directory
        self._left = parts
        self._total = sum(map(stored_bytes, parts))
        self._read = 0
        self._began = self._told = time.monotonic()

    def add(self, parts: Iterable[StoredTensor]) -> None:
        """Counts tensors that have been read, each of them once."""
        for part in set(parts) & self._left:
            self._left.discard(part)
            self._read += stored_bytes(part)
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS:
            self._told = now
            _log.info("weights: %.2f of %.2f GB read, %s", self._read / 1e9, self._total / 1e9, self._rate(now))

    def finish(self, params: Params) -> None:
        """Tells what was read and what it became."""
        now, placed = time.monotonic(), sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        _log.info(
            "weights: %.2f GB read from %s in %.1f s, %s; %.2f GB on devices",
            self._read / 1e9,
            self._directory,
            now - self._began,
            self._rate(now),
            placed / 1e9,
        )

    def _rate(self, now: float) -> str:
        return f"{self._read / 1e6 / max(now - self._began, 1e-9):.0f} MB/s"
