"""Scales of quantized keys and values, one a layer and key-value head: from the checkpoint, or measured.

A pool stores x / scale, so a head's scale is the greatest magnitude that it shall hold over the greatest that the
pool's dtype has (448 for float8_e4m3fn, 127 for int8). A checkpoint that was calibrated with text has the better
scales; they take precedence.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.attention_backends import SCALE_PARTITION, Scales, dense_attend, rotated
from jaxserve.models.layers.matmul import Products
from jaxserve.models.layers.parameter import Params
from jaxserve.models.layers.self_attention import Cache, Rotation
from jaxserve.models.loading.safetensors_file import DTYPES, StoredTensor
from jaxserve.models.params import bind
from jaxserve.pallas_kernels.paged_attention.pool import largest
from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec

SEQUENCES, TOKENS = 8, 128
"""How many token sequences a measurement runs, and how long each is."""

MARGINS = {"float8_e4m3fn": 2.0, "int8": 1.25}
"""How far above the greatest magnitude measured saturation begins. Random tokens are not the text to come. A factor of
two costs a floating-point dtype nothing but its smallest numbers; int8 loses a third of a bit by its margin."""


@dataclasses.dataclass(frozen=True)
class KVScales:
    """Scales of a checkpoint.

    Attributes:
        dtype: name of the pool's dtype that they were made for.
        values: float32 [L, 2, K], of keys and of values of each layer and key-value head.

    Raises:
        ValueError: a scale is not a finite number above 0, or the shape is not [L, 2, K].
    """

    dtype: str
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.values.shape[1] != 2:
            raise ValueError(f"kv scales have shape {list(self.values.shape)}; it must be [layers, 2, kv_heads]")
        for layer, side, head in np.argwhere(~(np.isfinite(self.values) & (self.values > 0))):
            raise ValueError(
                f"kv scale of layer {layer}, {('keys', 'values')[side]}, head {head} is "
                f"{self.values[layer, side, head]}; it must be a finite number above 0"
            )

    def of(self, dtype: str) -> np.ndarray:
        """The scales, float32 [L, 2, K], with which a pool of `dtype` saturates at the same magnitudes."""
        if dtype == self.dtype:
            return self.values
        return (self.values * (largest(self.dtype) / largest(dtype))).astype(np.float32)


_KV_SCALE = re.compile(r"model\.layers\.(\d+)\.self_attn\.([a-z_.]+)")
_KV_SIDES = {
    "kv_scale": (0, 1),
    "k_scale": (0,),
    "v_scale": (1,),
    "attn.k_scale": (0,),
    "attn.v_scale": (1,),
    "k_proj.k_scale": (0,),
    "v_proj.v_scale": (1,),
    "k_proj.output_scale": (0,),
    "v_proj.output_scale": (1,),
}


def kv_scale(tensor: str) -> tuple[int, tuple[int, ...]] | None:
    """(layer, sides) of a tensor that scales quantized keys (side 0), values (1) or both; None for any other.

    The names are those that compressed-tensors, ModelOpt, Quark and early releases of vLLM's tools write.
    """
    found = _KV_SCALE.fullmatch(tensor)
    if found is None or found[2] not in _KV_SIDES:
        return None
    return int(found[1]), _KV_SIDES[found[2]]


def from_tensors(
    config: ModelConfig, stored: Mapping[str, StoredTensor], quantization: Mapping[str, Any] | None
) -> KVScales | None:
    """The scales among a checkpoint's tensors; None where it has none.

    Args:
        config: the architecture.
        stored: the checkpoint's tensors by name; one of scales holds one number, or one a head.
        quantization: `quantization_config` of config.json, which says what the scales are for.

    Raises:
        ValueError: a scale is malformed, is given twice, or is missing beside others.
    """
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    values = np.full((layers, 2, heads), np.nan, np.float32)
    source: dict[tuple[int, int], str] = {}
    places = {name: place for name in sorted(stored) if (place := kv_scale(name)) is not None}
    # A scale of keys or values alone takes precedence over one of both.
    for name, (layer, sides) in sorted(places.items(), key=lambda item: -len(item[1][1])):
        tensor = stored[name]
        if layer >= layers or tensor.dtype not in DTYPES or np.prod(tensor.shape) not in (1, heads):
            raise ValueError(
                f"checkpoint file {tensor.path}: tensor {name} has dtype {tensor.dtype} and shape "
                f"{list(tensor.shape)}; a kv scale is one floating-point number, or one for each of {heads} heads, of "
                f"one of {layers} layers"
            )
        for side in sides:
            if len(sides) == 1 and (layer, side) in source and len(places[source[layer, side]][1]) == 1:
                raise ValueError(f"checkpoint has kv scales {source[layer, side]} and {name}; only one may stay")
            source[layer, side] = name
            values[layer, side] = np.asarray(tensor.view(), np.float32).reshape(-1)
    if not source:
        return None
    for layer, side in np.ndindex(layers, 2):
        if (layer, side) not in source:
            raise ValueError(f"checkpoint has kv scales, but none for the {('keys', 'values')[side]} of layer {layer}")
    return KVScales(_dtype_of(quantization or {}), values)


def _dtype_of(quantization: Mapping[str, Any]) -> str:
    """What scales are for: `kv_cache_scheme` (compressed-tensors) or `kv_cache_quant_algo` (ModelOpt) says int8."""
    scheme = quantization.get("kv_cache_scheme")
    integers = isinstance(scheme, Mapping) and scheme.get("type") == "int"
    return "int8" if integers or quantization.get("kv_cache_quant_algo") == "INT8" else "float8_e4m3fn"


def save(scales: KVScales, path: pathlib.Path) -> None:
    """Writes scales as JSON; `read` reads them."""
    content = {"dtype": scales.dtype, "scales": scales.values.astype(np.float64).tolist()}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read(path: pathlib.Path, config: ModelConfig) -> KVScales:
    """The scales that `save` wrote; a ValueError names the file where they do not fit the architecture."""
    wanted = (config.num_hidden_layers, 2, config.num_key_value_heads)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        values = np.array(content["scales"], np.float32)
        if content["dtype"] not in MARGINS or values.shape != wanted:
            raise ValueError(f"dtype {content['dtype']!r} and shape {list(values.shape)}; expected {list(wanted)}")
        return KVScales(content["dtype"], values)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint file {path} is invalid: {error}") from error


def placed(values: np.ndarray, mesh: Mesh) -> list[Scales]:
    """Scales float32 [L, 2, K] on the mesh's devices, split by head: for each layer those of keys and of values."""
    sharding = NamedSharding(mesh, SCALE_PARTITION)
    return [(jax.device_put(k, sharding), jax.device_put(v, sharding)) for k, v in values]


def calibrate(
    config: ModelConfig, params: Params, dtype: str, mesh: Mesh, products: Products = Products()
) -> np.ndarray:
    """Measures scales: the greatest key and value of each head over fixed random tokens, times `MARGINS[dtype]`.

    Runs `SEQUENCES` sequences of `TOKENS` tokens, drawn once and for all from the whole vocabulary, densely through the
    model. Each starts with the model's first token, if it has one: its keys are often the greatest of all.

    Args:
        config: the architecture.
        params: on the mesh's devices.
        dtype: of the pool: "float8_e4m3fn" or "int8".
        mesh: with the axis `tensor`.
        products: as `jaxserve.models.params.bind` takes it.

    Returns:
        float32 [L, 2, K]. A head that is 0 throughout gets the scale 1.

    Raises:
        ValueError: a key or value is not finite.
    """
    tokens = calibration_tokens(config)

    def measure(params: Params, tokens: jax.Array) -> jax.Array:
        attend = dense_attend()

        def attend_and_measure(
            qkv: jax.Array,
            rotation: Rotation | None,
            cache: Cache,
            spec: AttentionSpec,
            sinks: jax.Array | None,
            dtype: np.dtype,
        ) -> tuple[jax.Array, Cache]:
            out, _ = attend(qkv, rotation, cache, spec, sinks, dtype)
            _, k, v = rotated(qkv, rotation, dtype)
            both = jnp.abs(jnp.stack([k, v], axis=2).astype(jnp.float32))
            # XLA's CPU backend may leave NaN out of a maximum. [S, T, 2, K, D] -> [2, K]
            return out, jnp.where(jnp.isnan(both), jnp.inf, both).max(axis=(0, 1, 4))

        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        caches = [None] * config.num_hidden_layers
        _, greatest = bind(config, params, products)(tokens, positions, caches, attend_and_measure)
        scales = jnp.stack(greatest) * (MARGINS[dtype] / largest(dtype))
        return jnp.where(scales == 0, 1.0, scales)

    scales = np.asarray(jax.jit(measure, out_shardings=NamedSharding(mesh, P()))(params, tokens))
    if not np.isfinite(scales).all():
        layer, side, head = np.argwhere(~np.isfinite(scales))[0]
        raise ValueError(
            f"scale of the {('keys', 'values')[side]} of layer {layer}, head {head}, was measured as "
            f"{scales[layer, side, head]}; scales are finite: check the checkpoint's weights, or take pages of the "
            "model's dtype"
        )
    return scales


def calibration_tokens(config: ModelConfig) -> np.ndarray:
    """int32 [SEQUENCES, TOKENS or the model's whole context], the same for the same vocabulary."""
    length = min(TOKENS, config.context_length)
    tokens = np.random.RandomState(0).randint(0, config.vocab_size, (SEQUENCES, length)).astype(np.int32)
    if config.bos_token_id is not None:
        tokens[:, 0] = config.bos_token_id
    return tokens
