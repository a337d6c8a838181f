"""Implements the decoder in flax nnx, assembled from the list of layers of a model's configuration.

The model computes hidden states for any packing of tokens; how keys and values are stored and attended to is the
caller's: `attend` is called once a layer, in order, with that layer's cache. Training passes dense causal attention,
serving passes paged attention (models/layers/attention_backends.py). Letters in shapes: H hidden, V vocabulary. `...`
is any leading axes.

Weights keep Hugging Face's [out, in] order and are contracted on their last axis, which is the fast layout of a CPU dot
and free on a GPU.
"""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.models.config import ModelConfig
from jaxserve.models.layer_specs import LayerSpec
from jaxserve.models.layers.matmul import Products, contract
from jaxserve.models.layers.mlp import MLP
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.parameter import Packing, Parameter, Source
from jaxserve.models.layers.rope import Rope
from jaxserve.models.layers.self_attention import Attend, Cache, Rotation, Rotations, SelfAttention
from jaxserve.models.loading.stored import EMBEDDING, HEAD


class Layer(nnx.Module):
    """Applies attention and MLP, each after its norm, with residuals."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, dtype: jnp.dtype, products: Products, rngs: nnx.Rngs):
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm("input_layernorm", hidden, eps, dtype, rngs)
        self.attention = SelfAttention(
            spec.attention,
            hidden=hidden,
            kv_heads=config.num_key_value_heads,
            group=config.group_size,
            head_dim=config.head_dim,
            rotary_size=config.rotary_size or config.head_dim,
            eps=eps,
            dtype=dtype,
            products=products,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm("post_attention_layernorm", hidden, eps, dtype, rngs)
        self.mlp = MLP(spec.mlp, hidden, dtype, products, rngs)

    def __call__(self, x: jax.Array, rotations: Rotations, cache: Cache, attend: Attend) -> tuple[jax.Array, Cache]:
        attended, cache = self.attention(self.attention_norm(x), rotations, cache, attend)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """Maps tokens to hidden states, and hidden states to logits.

    Attributes:
        dtype: of the parameters and the residual stream.
        products: how layers multiply by their weights; see `jaxserve.models.params.products_for`. Logits are float32
            whatever it is.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, products: Products, rngs: nnx.Rngs):
        self.config = config
        self.products = products
        table, split = (config.vocab_size, config.hidden_size), P("tensor", None)
        embedding = Parameter(table, split, (Source(EMBEDDING, table),), fan_in=2500, whole_if_uneven=True)
        head = Parameter(table, split, (Source(HEAD, table),), packing=Packing.MATRIX, whole_if_uneven=True)
        self.embedding = embedding.make(rngs, dtype)
        self.layers = nnx.List([Layer(config, spec, dtype, products, rngs) for spec in config.layer_specs])
        self.norm = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps, dtype, rngs)
        self.head = None if config.tie_word_embeddings else head.make(rngs, dtype)

    def __call__(self, tokens: jax.Array, positions: jax.Array, caches: Any, attend: Attend) -> tuple[jax.Array, Any]:
        """Computes hidden states after the final norm.

        Args:
            tokens: int32 [...]; ids below vocab_size (the caller must ensure this: a gather clamps silently).
            positions: int32 [...], the position of each token in its own sequence.
            caches: of each layer, by its number: a list, or `LayerCaches` where layers store in the same arrays. Each
                is passed to `attend` and replaced, in a copy, by what it returns before the next layer gets its own.

        Returns:
            (hidden [..., H] in the weights' dtype, the copy of caches).
        """
        rotations = self._rotations(positions)
        x = self.embedding[...][tokens]
        assert len(caches) == len(self.layers), f"{len(self.layers)} layers have {len(caches)} caches"
        caches = copy.copy(caches)
        for number, layer in enumerate(self.layers):
            x, caches[number] = layer(x, rotations, caches[number], attend)
        return self.norm(x), caches

    def _rotations(self, positions: jax.Array) -> Rotations:
        """Computes the rotations of the layers; layers that rotate alike share one."""
        ropes = [spec.attention.rope for spec in self.config.layer_specs if spec.attention.rotation]
        return {rope: self._rotation(positions, rope) for rope in dict.fromkeys(ropes)}

    def _rotation(self, positions: jax.Array, rope: Rope | None) -> Rotation:
        config = self.config
        angles = positions[..., None].astype(jnp.float32) * config.rotary_frequencies(rope)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        factor = (rope.scaling if rope else config.rope_scaling).attention_factor
        if factor != 1.0:
            cos, sin = cos * factor, sin * factor
        if config.rotary_size is not None:  # the other elements stay as they are
            still = [(0, 0)] * positions.ndim + [(0, (config.head_dim - config.rotary_size) // 2)]
            cos, sin = jnp.pad(cos, still, constant_values=1.0), jnp.pad(sin, still)
        # Without the barrier XLA's CPU backend computes them again in every layer, for every head.
        return jax.lax.optimization_barrier((cos, sin))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Computes the logits, float32 [..., V], of hidden [..., H]."""
        if self.head is None:
            return contract(hidden, self.embedding[...])
        return Products(packed=self.products.packed).contract(hidden, self.head[...])
