"""Reads the tensors that stand for a quantized matrix in a checkpoint, in each of the published layouts.

Every layout is read into the one that `jaxserve.models.layers.quantized` describes: numbers by rows of the matrix, with
the scales and zeros of each row. Imports no jax.

| layout | tensors of a module | source |
|---|---|---|
| plain | weight [N, K], weight_scale, weight_zero_point | compressed-tensors, compressors/naive_quantized |
| packed | weight_packed int32 [N, K / 8], weight_scale, weight_zero_point [N / 8, G] | compressors/pack_quantized |
| inverse | weight [N, K], weight_scale_inv [N / rows, K / columns] | transformers, integrations/finegrained_fp8.py |
| awq | qweight int32 [K, N / 8], qzeros [G, N / 8], scales [G, N] | AutoAWQ, awq/utils/packing_utils.py |
| gptq, gptq_v2 | qweight int32 [K / 8, N], qzeros [G, N / 8], scales [G, N], g_idx [K] | AutoGPTQ, nn_modules/qlinear |

With 8 bits, an int32 of packed and gptq holds 4 numbers instead of 8.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxserve.models.loading.quantize import in_pairs
from jaxserve.models.loading.safetensors_file import DTYPES, StoredTensor
from jaxserve.models.quantization import Scheme, Target

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which 4 bits of an int32 hold each of 8 columns."""

_STEP = 256
"""Rows of int32 that are unpacked at a time."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Describes one tensor of a layout: name behind the module's, dtypes, possible shapes, and whether it may lack."""

    suffix: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """Stands for the matrix [N, K] of a module.

    Attributes:
        name: of the tensor that is not stored.
        target: how it is quantized.
        shape: (N, K).
        stored: its tensors, by what stands behind the module's name.
    """

    name: str
    target: Target
    shape: tuple[int, ...]
    stored: Mapping[str, StoredTensor]

    dtype = "BF16"

    @property
    def scheme(self) -> Scheme:
        """What its numbers are."""
        assert self.target.scheme is not None
        return self.target.scheme

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The stored tensors."""
        return tuple(self.stored.values())

    @property
    def path(self) -> pathlib.Path:
        """File of its numbers."""
        return next(iter(self.stored.values())).path

    @property
    def groups(self) -> int:
        """Number of groups of a row."""
        return 1 if self.scheme.group is None else self.shape[1] // self.scheme.group

    def numbers(self) -> np.ndarray:
        """Returns the numbers: float8_e4m3fn or int8 [N, K], or of int4 two in a byte, uint8 [N, K / 2]."""
        bits = 4 if self.scheme.kind == "int4" else 8
        if self.target.stored in ("plain", "inverse"):
            numbers = self.stored["weight"].view()
            if self.scheme.kind == "fp8" and ((numbers.view(np.uint8) & 0x7F) == 0x7F).any():
                raise ValueError(f"checkpoint file {self.path}: tensor {self.name} has numbers that are not finite")
            return numbers
        if self.target.stored == "awq":
            return _from_awq(self.stored["qweight"].view(), self.shape)
        if self.target.stored == "packed":
            by_rows = self.stored["weight_packed"].view()
        else:
            by_rows = np.ascontiguousarray(self.stored["qweight"].view().T)
        # Their bytes are in the order of the numbers, the first of two in the lower half.
        numbers = by_rows.view(np.uint8)[:, : self.shape[1] * bits // 8]
        numbers = numbers if bits == 4 else (numbers ^ 0x80).view(np.int8)
        order = self.order()
        if order is None:
            return numbers
        if bits == 8:
            return numbers[:, order]
        return np.concatenate([in_pairs(_apart(rows)[:, order]) for rows in _blocks(numbers)])

    def scales(self) -> np.ndarray:
        """Returns the scales, float32 [N, groups]."""
        if self.target.stored in ("awq", "gptq", "gptq_v2"):
            return self.stored["scales"].view().astype(np.float32).T
        name = next(name for name in ("weight_scale", "weight_scale_inv") if name in self.stored)
        scales = np.asarray(self.stored[name].view(), np.float32)
        rows, groups = self.shape[0], self.groups
        if self.target.block is not None:
            scales = np.repeat(scales, self.target.block[0], axis=0)[:rows]
        elif scales.size == 1:
            scales = np.broadcast_to(scales.reshape(1, 1), (rows, groups))
        scales = scales.reshape(rows, groups)
        if not np.isfinite(scales).all():
            raise ValueError(f"checkpoint file {self.path}: scales of {self.name} are not finite")
        return scales

    def zeros(self) -> np.ndarray | None:
        """Returns the zeros, int16 [N, groups]; None where all are 0."""
        bits, rows = (4 if self.scheme.kind == "int4" else 8), self.shape[0]
        if self.target.stored in ("plain", "inverse", "packed"):
            if not self.scheme.zeros:
                return None
            stored = self.stored["weight_zero_point"].view()
            if self.target.stored == "plain":
                zeros = stored.astype(np.int16).reshape(-1, self.groups)
                return np.broadcast_to(zeros, (rows, self.groups))
            zeros = _unpacked(np.ascontiguousarray(stored.T), bits, range(32 // bits))[:, :rows].T
        else:
            places = _AWQ_PLACES if self.target.stored == "awq" else range(32 // bits)
            zeros = _unpacked(self.stored["qzeros"].view(), bits, places)[:, :rows].T + (self.target.stored == "gptq")
        zeros = zeros.astype(np.int16) - (0 if bits == 4 else 128)
        middle = 8 if bits == 4 else 0
        if not self.scheme.zeros and (zeros != middle).any():
            raise ValueError(
                f"checkpoint file {self.path}: zeros of {self.name} are not all {1 << (bits - 1)}, which sym true means"
            )
        return zeros if self.scheme.zeros else None

    def order(self) -> np.ndarray | None:
        """Returns the element that each number is for, int32 [K], groups one after the other; None for all in order.

        Raises ValueError, one line, where the index of groups is malformed.
        """
        if not self.scheme.ordered:
            return None
        length, group = self.shape[1], self.scheme.group or self.shape[1]
        name = next((name for name in ("g_idx", "weight_g_idx") if name in self.stored), None)
        if name is None:
            return np.arange(length, dtype=np.int32)
        index = self.stored[name].view()
        if index.min() < 0 or not np.array_equal(np.bincount(index), np.full(length // group, group)):
            raise ValueError(
                f"checkpoint file {self.path}: tensor {self.stored[name].name} must name each of {length // group} "
                f"groups {group} times"
            )
        return np.argsort(index, kind="stable").astype(np.int32)

    def values(self, source: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the weights that a `Source` takes, float32 of a shape: where they are not held as they are stored."""
        return source.values(self.dequantized(), shape)

    def dequantized(self) -> np.ndarray:
        """Returns the weights, float32 [N, K]."""
        numbers = self.numbers()
        numbers = _apart(numbers) if self.scheme.kind == "int4" else numbers
        values = numbers.astype(np.float32).reshape(self.shape[0], self.groups, -1)
        zeros = self.zeros()
        if zeros is not None:
            values -= zeros.astype(np.float32)[..., None]
        elif self.scheme.kind == "int4":
            values -= 8
        values = (values * self.scales()[..., None]).reshape(self.shape)
        order = self.order()
        if order is None:
            return values
        natural = np.empty_like(values)
        natural[:, order] = values
        return natural


def find(
    get: Callable[[str], StoredTensor | None], name: str, shape: tuple[int, ...], target: Target
) -> QuantizedTensor:
    """Returns what stands for a tensor that is quantized.

    Args:
        get: returns a stored tensor by its name.
        name: of the tensor as it would be if it were not quantized.
        shape: of that.
        target: how it is quantized.

    Raises:
        ValueError: one line, where a part is missing or malformed.
    """
    module = name.removesuffix(".weight")
    assert target.scheme is not None
    if target.scheme.group is not None and shape[1] % target.scheme.group:
        raise ValueError(
            f"checkpoint tensor {name} has {shape[1]} numbers in a row; quantization in groups of "
            f"{target.scheme.group} needs a multiple"
        )
    found: dict[str, StoredTensor] = {}
    for part in _layout(target, *shape):
        suffix = part.suffix
        tensor = get(f"{module}.{suffix}")
        if tensor is None and suffix == "weight_scale_inv":
            suffix = "weight_scale"  # as vLLM's tools write it
            tensor = get(f"{module}.{suffix}")
        if tensor is None:
            if part.optional:
                continue
            raise ValueError(
                f"checkpoint has no tensor {module}.{part.suffix}; quantization_config says that {module} is quantized "
                f"({target.scheme.text})"
            )
        if tensor.dtype not in part.dtypes or tensor.shape not in part.shapes:
            raise ValueError(
                f"checkpoint file {tensor.path}: tensor {tensor.name} has dtype {tensor.dtype} and shape "
                f"{list(tensor.shape)}; quantization_config asks for {' or '.join(part.dtypes)} and "
                f"{' or '.join(str(list(one)) for one in part.shapes)}"
            )
        found[suffix] = tensor
    return QuantizedTensor(name, target, shape, found)


@functools.lru_cache(maxsize=256)
def _layout(target: Target, n: int, k: int) -> tuple[Part, ...]:
    """Returns the tensors of a matrix [n, k], that of its numbers first."""
    scheme = target.scheme
    assert scheme is not None
    floats, ints = tuple(DTYPES), ("I32",)
    each = 8 if scheme.kind == "int4" else 4
    groups = 1 if scheme.group is None else k // scheme.group
    if target.stored in ("awq", "gptq", "gptq_v2"):
        matrix = (k, n // each) if target.stored == "awq" else (k // each, n)
        index = Part("g_idx", ints, ((k,),), optional=not scheme.ordered)
        return (
            Part("qweight", ints, (matrix,)),
            Part("scales", floats, ((groups, n),)),
            Part("qzeros", ints, ((groups, n // each),)),
            *(() if target.stored == "awq" else (index,)),
        )
    if target.block is not None:
        scales: tuple[tuple[int, ...], ...] = ((math.ceil(n / target.block[0]), groups),)
    else:
        scales = ((n, groups), *(((n,), (1,), ()) if groups == 1 else ()))
    numbers = ("F8_E4M3",) if scheme.kind == "fp8" else ("I8",)
    if target.stored == "inverse":
        static = (
            Part("input_scale", floats, ((), (1,)), optional=True),
            Part("activation_scale", floats, ((), (1,)), optional=True),
        )
        return Part("weight", numbers, ((n, k),)), Part("weight_scale_inv", floats, scales), *static
    unused = (
        Part("weight_shape", ("I64", "I32"), ((2,),), optional=True),
        Part("input_scale", floats, ((), (1,), (1, 1)), optional=True),
    )
    if target.stored == "plain":
        zeros = Part("weight_zero_point", ("I8",), scales, optional=not scheme.zeros)
        return Part("weight", numbers, ((n, k),)), Part("weight_scale", floats, scales), zeros, *unused
    zeros = Part("weight_zero_point", ints, ((math.ceil(n / each), groups),), optional=not scheme.zeros)
    return (
        Part("weight_packed", ints, ((n, math.ceil(k / each)),)),
        Part("weight_scale", floats, scales),
        zeros,
        Part("weight_g_idx", ints, ((k,),), optional=not scheme.ordered),
        *unused,
    )


def _blocks(numbers: np.ndarray) -> list[np.ndarray]:
    return [numbers[first : first + _STEP] for first in range(0, len(numbers), _STEP)]


def _apart(pairs: np.ndarray) -> np.ndarray:
    """Returns numbers that share bytes, uint8 [N, K / 2], each in a byte: [N, K]."""
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(pairs), -1)


def _unpacked(words: np.ndarray, bits: int, places: Any) -> np.ndarray:
    """Returns the numbers of rows of int32, uint8 [N, K]: of each word those at `places`, counted in numbers."""
    mask = np.int32((1 << bits) - 1)
    parts = [((words >> np.int32(bits * place)) & mask).astype(np.uint8) for place in places]
    return np.stack(parts, axis=-1).reshape(len(words), -1)


def _from_awq(words: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the numbers of AWQ's int32 [K, N / 8], two in a byte: uint8 [N, K / 2]."""
    numbers = np.empty((shape[0], shape[1] // 2), np.uint8)
    for first in range(0, words.shape[1], _STEP):
        columns = _unpacked(words[:, first : first + _STEP], 4, _AWQ_PLACES).T
        numbers[8 * first : 8 * first + len(columns)] = in_pairs(columns)
    return numbers
