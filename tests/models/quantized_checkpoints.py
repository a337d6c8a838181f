"""Quantized checkpoints in every published layout, written by hand, beside what their formats say they mean."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tests.models.checkpoints import BASE, random_tensors, write_safetensors

RAW = BASE | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Rows of 128 and 256 numbers; 64 rows of keys are half a block."""

Tensors = dict[str, np.ndarray]

Write = Callable[[np.ndarray, int], tuple[Tensors, np.ndarray]]
"""Quantizes a matrix by a seed: its tensors by what stands behind the module's name, and the weights in float32."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A format: quantization_config, how a matrix is stored, and what the products round activations to."""

    config: dict[str, Any]
    write: Write
    activations: str = ""


def rounded(weight: np.ndarray, group: int, low: int, high: int, zeros: bool, seed: int) -> tuple[np.ndarray, ...]:
    """Whole numbers [N, K] from low to high, scales [N, G] that float16 holds, zeros [N, G]."""
    n, k = weight.shape
    parts = weight.reshape(n, k // group, group)
    scales = (np.abs(parts).max(axis=2) / ((high - low) / 2)).astype(np.float16).astype(np.float32)
    offsets = np.zeros(scales.shape, np.int64)
    if zeros:
        offsets = np.random.RandomState(seed).randint(-2, 3, scales.shape)
    numbers = np.clip(np.rint(parts / scales[..., None]) + offsets[..., None], low, high).astype(np.int64)
    return numbers.reshape(n, k), scales, offsets


def dequantized(numbers: np.ndarray, scales: np.ndarray, zeros: np.ndarray, index: np.ndarray) -> np.ndarray:
    """(number - zero) * scale, where index [K] names the group of each element: element by element, in float32."""
    return ((numbers - zeros[:, index]).astype(np.float32) * scales[:, index]).astype(np.float32)


def into_words(numbers: np.ndarray, bits: int, places: tuple[int, ...]) -> np.ndarray:
    """Numbers from 0 [M, L] in int32 [M, L / each], number i of a word at place places[i]."""
    each = 32 // bits
    padded = np.zeros((len(numbers), -(-numbers.shape[1] // each) * each), np.uint64)
    padded[:, : numbers.shape[1]] = numbers
    words = np.zeros((len(numbers), padded.shape[1] // each), np.uint64)
    for number, place in enumerate(places):
        words |= padded[:, number::each] << np.uint64(bits * place)
    return words.astype(np.uint32).view(np.int32)


def in_order(bits: int) -> tuple[int, ...]:
    return tuple(range(32 // bits))


def act_order(length: int, group: int) -> np.ndarray:
    """The group of each element, each group as often: the same for all matrices of one input."""
    index = np.repeat(np.arange(length // group), group)
    return np.random.RandomState(length).permutation(index)


# -- compressed-tensors ------------------------------------------------------------------------------------------------


def scheme(weights: dict[str, Any], layout: str, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    weights = {"dynamic": False, "observer": "minmax", "actorder": None, "block_structure": None, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
    }


def tokens(kind: str) -> dict[str, Any]:
    """Dynamic activations with a scale for each token."""
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True, "observer": None}


def fp8(per_tensor: bool, name: str = "weight_scale", scalar: bool = False) -> Write:
    def write(weight: np.ndarray, seed: int) -> tuple[Tensors, np.ndarray]:
        most = np.abs(weight).max(keepdims=True) if per_tensor else np.abs(weight).max(axis=1, keepdims=True)
        scales = (most / 448).astype(np.float32)
        numbers = np.clip(weight / scales, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        shape: tuple[int, ...] = () if scalar else (1,) if per_tensor else scales.shape
        return {"weight": numbers, name: scales.reshape(shape)}, numbers.astype(np.float32) * scales

    return write


def int8(weight: np.ndarray, seed: int) -> tuple[Tensors, np.ndarray]:
    numbers, scales, zeros = rounded(weight, weight.shape[1], -128, 127, False, seed)
    index = np.zeros(weight.shape[1], int)
    tensors = {"weight": numbers.astype(np.int8), "weight_scale": scales.astype(ml_dtypes.bfloat16)}
    scales = tensors["weight_scale"].astype(np.float32)
    return tensors, dequantized(numbers, scales, zeros, index)


def int4(group: int, zeros: bool, ordered: bool) -> Write:
    def write(weight: np.ndarray, seed: int) -> tuple[Tensors, np.ndarray]:
        n, k = weight.shape
        numbers, scales, offsets = rounded(weight, group, -8, 7, zeros, seed)
        index = act_order(k, group) if ordered else np.arange(k) // group
        tensors = {
            "weight_packed": into_words(numbers + 8, 4, in_order(4)),
            "weight_scale": scales.astype(np.float16),
            "weight_shape": np.array([n, k], np.int64),
        }
        if zeros:
            tensors["weight_zero_point"] = np.ascontiguousarray(into_words(offsets.T + 8, 4, in_order(4)).T)
        if ordered:
            tensors["weight_g_idx"] = index.astype(np.int32)
        return tensors, dequantized(numbers, scales, offsets, index)

    return write


# -- blocks, AWQ and GPTQ ----------------------------------------------------------------------------------------------


def blocks(weight: np.ndarray, seed: int) -> tuple[Tensors, np.ndarray]:
    n, k = weight.shape
    scales = np.empty((-(-n // 128), k // 128), np.float32)
    numbers, values = np.empty((n, k), ml_dtypes.float8_e4m3fn), np.empty((n, k), np.float32)
    for row, column in np.ndindex(scales.shape):
        place = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
        scales[row, column] = np.abs(weight[place]).max() / 448
        numbers[place] = (weight[place] / scales[row, column]).astype(ml_dtypes.float8_e4m3fn)
        values[place] = numbers[place].astype(np.float32) * scales[row, column]
    return {"weight": numbers, "weight_scale_inv": scales}, values


def awq(group: int) -> Write:
    def write(weight: np.ndarray, seed: int) -> tuple[Tensors, np.ndarray]:
        numbers, scales, zeros = rounded(weight, group, 0, 15, True, seed)
        zeros = zeros + 8
        numbers = np.clip(numbers + 8 * (weight > 0), 0, 15)  # any numbers: what they mean is compared
        places = (0, 4, 1, 5, 2, 6, 3, 7)
        tensors = {
            "qweight": into_words(numbers.T, 4, places),
            "qzeros": into_words(zeros.T, 4, places),
            "scales": scales.T.astype(np.float16),
        }
        return tensors, dequantized(numbers, scales, zeros, np.arange(weight.shape[1]) // group)

    return write


def gptq(bits: int, group: int, symmetric: bool, ordered: bool, version: int = 1) -> Write:
    def write(weight: np.ndarray, seed: int) -> tuple[Tensors, np.ndarray]:
        middle = 1 << (bits - 1)
        numbers, scales, zeros = rounded(weight, group, -middle, middle - 1, not symmetric, seed)
        numbers, zeros = numbers + middle, zeros + middle
        index = act_order(weight.shape[1], group) if ordered else np.arange(weight.shape[1]) // group
        tensors = {
            "qweight": np.ascontiguousarray(into_words(numbers, bits, in_order(bits)).T),
            "qzeros": into_words(zeros.T - (version == 1), bits, in_order(bits)),
            "scales": scales.T.astype(np.float16),
            "g_idx": index.astype(np.int32),
        }
        return tensors, dequantized(numbers, scales, zeros, index)

    return write


def gptq_config(bits: int, group: int, symmetric: bool, ordered: bool, layout: str = "gptq") -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "damp_percent": 0.01,
        "desc_act": ordered,
        "static_groups": False,
        "sym": symmetric,
        "true_sequential": True,
        "checkpoint_format": layout,
    }


GROUP4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

FORMATS: dict[str, Format] = {
    "ct_fp8_tensor": Format(scheme(FP8 | {"strategy": "tensor"}, "float-quantized"), fp8(True)),
    "ct_fp8_channel": Format(
        scheme(FP8 | {"strategy": "channel"}, "float-quantized", tokens("float")), fp8(False), "fp8"
    ),
    "ct_int8": Format(
        scheme({"num_bits": 8, "type": "int", "strategy": "channel"}, "int-quantized", tokens("int")), int8, "int8"
    ),
    "ct_int4": Format(scheme(GROUP4 | {"symmetric": True}, "pack-quantized"), int4(32, False, False)),
    "ct_int4_zeros": Format(scheme(GROUP4 | {"symmetric": False}, "pack-quantized"), int4(32, True, False)),
    "ct_int4_order": Format(
        scheme(GROUP4 | {"symmetric": True, "actorder": "group"}, "pack-quantized"), int4(32, False, True)
    ),
    "fp8_blocks": Format(BLOCKS | {"modules_to_not_convert": ["lm_head"]}, blocks),
    "fp8_scalar": Format({"quant_method": "fp8", "activation_scheme": "static"}, fp8(True, scalar=True)),
    "awq": Format({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}, awq(64)),
    "gptq": Format(gptq_config(4, 64, True, False), gptq(4, 64, True, False)),
    "gptq_order": Format(gptq_config(4, 64, False, True), gptq(4, 64, False, True)),
    "gptq_int8": Format(gptq_config(8, 32, False, False, "gptq_v2"), gptq(8, 32, False, False, 2)),
}


def is_matrix(name: str) -> bool:
    return "_proj." in name


def made(form: Format, raw: dict[str, Any] = RAW, skipped: tuple[str, ...] = ()) -> tuple[Tensors, Tensors]:
    """(tensors of a quantized checkpoint, those of the same one dequantized in float32)."""
    stored: Tensors = {}
    plain: Tensors = {}
    for number, (name, array) in enumerate(random_tensors(raw, 4).items()):
        module = name.removesuffix(".weight")
        if not is_matrix(name) or module in skipped:
            stored[name] = plain[name] = array
            continue
        parts, plain[name] = form.write(array, number)
        stored |= {f"{module}.{part}": value for part, value in parts.items()}
    return stored, plain


def write(directory: pathlib.Path, config: dict[str, Any] | None, tensors: Tensors, **fields: Any) -> pathlib.Path:
    """Writes a checkpoint with this quantization_config."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = RAW | fields | ({} if config is None else {"quantization_config": config})
    (directory / "config.json").write_text(json.dumps(raw))
    write_safetensors(directory / "model.safetensors", {name: np.asarray(array) for name, array in tensors.items()})
    return directory


def example(name: str) -> tuple[Tensors, np.ndarray]:
    """One matrix [24, 64] in a format: its tensors, and the weights."""
    return FORMATS[name].write(np.random.RandomState(9).standard_normal((24, 64)).astype(np.float32), 9)
