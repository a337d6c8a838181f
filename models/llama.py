"""Llama-architecture decoder in flax nnx.

The model computes hidden states for any packing of tokens; how queries and keys are rotated, and how keys and values
are stored and attended to, is the caller's: `attend` is called once a layer with that layer's cache. Training passes
dense causal attention, serving passes paged attention (models/attention.py). Letters in shapes: T tokens, H hidden, I
intermediate, K key-value heads, G query heads per key-value head, D head dimension, V vocabulary. `...` is any leading
axes.

Weights keep Hugging Face's [out, in] order and are contracted on their last axis, which is the fast layout of a
CPU dot and free on a GPU. Q, K and V are one matrix whose outer axis is the key-value head, so that tensor
parallelism splits it (and the attention that follows) by key-value heads alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.models import products
from jaxserve.models.config import ModelConfig
from jaxserve.models.products import Products, contract
from jaxserve.models.rope import rope_frequencies
from jaxserve.models.stored import EMBEDDING, HEAD, ROTARY_BUFFER
from jaxserve.models.weights import Params, Path, Slice, get, put

Cache = Any
Attend = Callable[[jax.Array, jax.Array, jax.Array, Cache, np.dtype], tuple[jax.Array, Cache]]
"""(qkv [..., K, G + 2, D], cos [..., D / 2], sin [..., D / 2], cache, dtype) -> (out [..., K, G, D], new cache).

For each key-value head qkv holds its queries, its key and its value, not yet rotated, in the dtype of the projection's
products; they are rounded to dtype, which is the result's too, after the rotation. The cache is the layer's. cos and
sin are float32.
"""


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Fused QKV projection, the caller's rotary embedding and attention, output projection."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, products: Products, rngs: nnx.Rngs):
        kv_heads, group, dim, hidden = (
            config.num_key_value_heads,
            config.group_size,
            config.head_dim,
            config.hidden_size,
        )
        self.products = products
        self.qkv = nnx.Param(_normal(rngs, (kv_heads, group + 2, dim, hidden), hidden, dtype))
        self.out = nnx.Param(_normal(rngs, (hidden, kv_heads, group, dim), kv_heads * group * dim, dtype))
        self.qkv_bias = nnx.Param(jnp.zeros((kv_heads, group + 2, dim), dtype)) if config.attention_bias else None
        self.out_bias = nnx.Param(jnp.zeros((hidden,), dtype)) if config.attention_bias else None

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, cache: Cache, attend: Attend
    ) -> tuple[jax.Array, Cache]:
        qkv = self.products.contract(x, self.qkv[...])  # [..., K, G + 2, D]
        if self.qkv_bias is not None:
            qkv += self.qkv_bias[...].astype(qkv.dtype)
        attended, cache = attend(qkv, cos, sin, cache, x.dtype)
        y = self.products.contract(attended, self.out[...], axes=3)
        if self.out_bias is not None:
            y += self.out_bias[...].astype(y.dtype)
        return y.astype(x.dtype), cache


class MLP(nnx.Module):
    """SwiGLU with the gate and up projections fused: gate_up [2, I, H], down [H, I]."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, products: Products, rngs: nnx.Rngs):
        hidden, wide = config.hidden_size, config.intermediate_size
        self.products = products
        self.gate_up = nnx.Param(_normal(rngs, (2, wide, hidden), hidden, dtype))
        self.down = nnx.Param(_normal(rngs, (hidden, wide), wide, dtype))
        self.gate_up_bias = nnx.Param(jnp.zeros((2, wide), dtype)) if config.mlp_bias else None
        self.down_bias = nnx.Param(jnp.zeros((hidden,), dtype)) if config.mlp_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        bias = None if self.gate_up_bias is None else self.gate_up_bias[...]
        y = self.products.contract(self.products.swiglu(x, self.gate_up[...], bias), self.down[...])
        if self.down_bias is not None:
            y += self.down_bias[...].astype(y.dtype)
        return y.astype(x.dtype)


class Layer(nnx.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, products: Products, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, dtype, products, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, products, rngs)

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, cache: Cache, attend: Attend
    ) -> tuple[jax.Array, Cache]:
        attended, cache = self.attention(self.attention_norm(x), cos, sin, cache, attend)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nnx.Module):
    """Tokens to hidden states, and hidden states to logits.

    dtype: of the parameters and the residual stream. products: how layers multiply by their weights; see
    `jaxserve.models.params.products_for`. Logits are float32 whatever it is.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, products: Products, rngs: nnx.Rngs):
        self.config = config
        self.products = products
        self.embedding = nnx.Param(_normal(rngs, (config.vocab_size, config.hidden_size), 2500, dtype))
        self.layers = nnx.List([Layer(config, dtype, products, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.head = (
            None
            if config.tie_word_embeddings
            else nnx.Param(_normal(rngs, (config.vocab_size, config.hidden_size), config.hidden_size, dtype))
        )

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, caches: Sequence[Cache], attend: Attend
    ) -> tuple[jax.Array, list[Cache]]:
        """Hidden states after the final norm.

        tokens: int32 [...]; ids below vocab_size (the caller's duty: a gather clamps in silence).
        positions: int32 [...], the place of each token in its own sequence.
        caches: one per layer, handed to `attend` and returned as it returned them.
        Returns (hidden [..., H] in the weights' dtype, caches).
        """
        config = self.config
        freq = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        angles = positions[..., None].astype(jnp.float32) * freq
        # Without the barrier XLA's CPU backend computes them again in every layer, for every head.
        cos, sin = jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))
        x = self.embedding[...][tokens]
        updated = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer(x, cos, sin, cache, attend)
            updated.append(cache)
        return self.norm(x), updated

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., V] for hidden [..., H]."""
        if self.head is None:
            return contract(hidden, self.embedding[...])
        return Products(packed=self.products.packed).contract(hidden, self.head[...])


PARTITION: dict[str, P] = {
    "embedding": P("tensor", None),
    "head": P("tensor", None),
    "qkv": P("tensor", None, None, None),
    "qkv_bias": P("tensor", None, None),
    "out": P(None, "tensor", None, None),
    "out_bias": P(None),
    "gate_up": P(None, "tensor", None),
    "gate_up_bias": P(None, "tensor"),
    "down": P(None, "tensor"),
    "down_bias": P(None),
    "scale": P(None),
}
"""Where each parameter lives on a mesh with the axis `tensor`, by the last name of its path."""

SPLIT_FIELDS = ("num_key_value_heads", "intermediate_size")
"""Sizes that the number of devices on the axis `tensor` must divide."""

CONTRACTED_AXES = {"out": 3}
"""How many trailing axes of a matrix are summed over, where that is not one."""


def packable(config: ModelConfig, dtype: np.dtype) -> bool:
    """Whether this CPU has kernels for the weights, packed (see `jaxserve.models.products`)."""
    hidden, wide = config.hidden_size, config.intermediate_size
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    matrices = {
        "qkv": ((heads + 2 * kv_heads) * dim, hidden),
        "out": (hidden, heads * dim),
        "gate_up": (wide, hidden),
        "down": (hidden, wide),
    }
    if not config.tie_word_embeddings:
        matrices["head"] = (config.vocab_size, hidden)
    return products.packable(dtype, matrices.values(), biased=config.mlp_bias)


def pack(config: ModelConfig, params: Params) -> None:
    """Puts each matrix in the order of the packed kernels, one at a time and in its place in `params`.

    A tied embedding stays as it is: it is looked up by rows.
    """
    paths: list[tuple[Path, int]] = []
    for number in range(config.num_hidden_layers):
        paths += [(("layers", number, *path), axes) for path, axes in _PACKED]
    if not config.tie_word_embeddings:
        paths.append((("head",), 1))
    for path, axes in paths:
        put(params, path, products.packed(get(params, path), axes))


_PACKED: tuple[tuple[Path, int], ...] = (
    (("attention", "qkv"), 1),
    (("attention", "out"), 3),
    (("mlp", "gate_up"), 0),
    (("mlp", "down"), 1),
)
"""The matrices of a layer and how many axes of each are summed over; 0 marks gate and up."""


def hf_weights(config: ModelConfig) -> dict[Path, tuple[Slice, ...]]:
    """The Hugging Face tensors that make up each parameter; together the slices of a parameter cover it once."""
    vocab, hidden = config.vocab_size, config.hidden_size
    weights: dict[Path, tuple[Slice, ...]] = {
        ("embedding",): (Slice(EMBEDDING, (vocab, hidden)),),
        ("norm", "scale"): (Slice("model.norm.weight", (hidden,)),),
    }
    if not config.tie_word_embeddings:
        weights["head",] = (Slice(HEAD, (vocab, hidden)),)
    for number in range(config.num_hidden_layers):
        for path, slices in _layer_weights(config, f"model.layers.{number}.").items():
            weights["layers", number, *path] = slices
    return weights


def _layer_weights(config: ModelConfig, prefix: str) -> dict[Path, tuple[Slice, ...]]:
    hidden, wide, group = config.hidden_size, config.intermediate_size, config.group_size
    q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    # Query head h of Hugging Face is query h % G of key-value head h // G: reshaping [K * G * D] puts it there.
    parts = (
        ("q_proj", q_size, (slice(None), slice(0, group))),
        ("k_proj", kv_size, (slice(None), group)),
        ("v_proj", kv_size, (slice(None), group + 1)),
    )
    weights: dict[Path, tuple[Slice, ...]] = {
        ("attention_norm", "scale"): (Slice(prefix + "input_layernorm.weight", (hidden,)),),
        ("mlp_norm", "scale"): (Slice(prefix + "post_attention_layernorm.weight", (hidden,)),),
        ("attention", "qkv"): tuple(
            Slice(f"{attention}{name}.weight", (size, hidden), index) for name, size, index in parts
        ),
        ("attention", "out"): (Slice(attention + "o_proj.weight", (hidden, q_size)),),
        ("mlp", "gate_up"): (
            Slice(mlp + "gate_proj.weight", (wide, hidden), (0,)),
            Slice(mlp + "up_proj.weight", (wide, hidden), (1,)),
        ),
        ("mlp", "down"): (Slice(mlp + "down_proj.weight", (hidden, wide)),),
    }
    if config.attention_bias:
        weights["attention", "qkv_bias"] = tuple(
            Slice(f"{attention}{name}.bias", (size,), index) for name, size, index in parts
        )
        weights["attention", "out_bias"] = (Slice(attention + "o_proj.bias", (hidden,)),)
    if config.mlp_bias:
        weights["mlp", "gate_up_bias"] = (
            Slice(mlp + "gate_proj.bias", (wide,), (0,)),
            Slice(mlp + "up_proj.bias", (wide,), (1,)),
        )
        weights["mlp", "down_bias"] = (Slice(mlp + "down_proj.bias", (hidden,)),)
    return weights


def unneeded(config: ModelConfig, tensor: str) -> bool:
    """Whether a checkpoint may hold this tensor though no parameter takes it."""
    if tensor == HEAD:
        return config.tie_word_embeddings  # a duplicate of the embedding: they were compared
    if kv_scale(tensor) is not None:
        return True  # a setting of quantised pages, not of the model
    return tensor.endswith(ROTARY_BUFFER)


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
    """(layer, sides) of a tensor that scales quantised keys (side 0), values (1) or both; None for any other.

    The names are those that compressed-tensors, ModelOpt, Quark and early releases of vLLM's tools write.
    """
    found = _KV_SCALE.fullmatch(tensor)
    if found is None or found[2] not in _KV_SIDES:
        return None
    return int(found[1]), _KV_SIDES[found[2]]


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> jax.Array:
    return (jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(fan_in)).astype(dtype)
