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
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.models.config import ModelConfig
from jaxserve.models.layer_specs import LayerSpec
from jaxserve.models.layers.experts import Experts
from jaxserve.models.layers.matmul import Products
from jaxserve.models.layers.mlp import MLP
from jaxserve.models.layers.norm import LayerNorm, RMSNorm, make_norm
from jaxserve.models.layers.parameter import Packing, Parameter, Source
from jaxserve.models.layers.rope import Rope
from jaxserve.models.layers.self_attention import Attend, Cache, Places, Rotation, SelfAttention
from jaxserve.models.loading.stored import EMBEDDING, HEAD

Norm = RMSNorm | LayerNorm


class Layer(nnx.Module):
    """Applies attention and MLP with residuals; norms stand where the layer's specification has them."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, dtype: jnp.dtype, products: Products, rngs: nnx.Rngs):
        hidden, eps = config.hidden_size, config.rms_norm_eps
        before, both = spec.norm_place == "before", spec.norm_place == "both"
        self.sums = spec.norm_place == "sum"
        self.residual_multiplier = spec.residual_multiplier

        def norm(exists: bool, name: str) -> Norm | None:
            return make_norm(spec.norm, name, hidden, eps, dtype, rngs) if exists else None

        inputs, outputs = before or both or self.sums, both or spec.norm_place == "after"
        mlp_input = "pre_feedforward_layernorm" if both else "post_attention_layernorm"
        self.attention_norm = norm(inputs, "input_layernorm")
        self.attention = SelfAttention(
            spec.attention,
            hidden=hidden,
            kv_heads=config.num_key_value_heads,
            group=config.group_size,
            head_dim=config.head_dim,
            rotary_size=config.rotary_size or config.head_dim,
            norm=spec.norm,
            eps=eps,
            dtype=dtype,
            products=products,
            rngs=rngs,
        )
        self.attention_out_norm = norm(outputs, "post_attention_layernorm")
        self.mlp_norm = norm(inputs, mlp_input)
        mlp = Experts if spec.mlp.kind == "experts" else MLP
        self.mlp = mlp(spec.mlp, hidden, dtype, products, rngs)
        self.mlp_out_norm = norm(outputs, "post_feedforward_layernorm")

    def __call__(self, x: jax.Array, places: Places, cache: Cache, attend: Attend) -> tuple[jax.Array, Cache]:
        entering = x if self.sums else _normed(self.attention_norm, x)
        attended, cache = self.attention(entering, places, cache, attend)
        x = self._added(x, attended, self.attention_out_norm, self.attention_norm)
        entering = x if self.sums else _normed(self.mlp_norm, x)
        y = self.mlp(entering, places.query_start_loc) if isinstance(self.mlp, Experts) else self.mlp(entering)
        return self._added(x, y, self.mlp_out_norm, self.mlp_norm), cache

    def _added(self, x: jax.Array, y: jax.Array, out_norm: Norm | None, norm: Norm | None) -> jax.Array:
        """Adds an output to the residual stream; `norm` is applied to their sum where it stands there."""
        y = _normed(out_norm, y)
        if self.residual_multiplier != 1.0:
            y = y * self.residual_multiplier
        return _normed(norm, x + y) if self.sums else x + y


def _normed(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


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
        hidden, size = config.hidden_size, config.embedding_size or config.hidden_size
        table, split = (config.vocab_size, size), P("tensor", None)

        def projection(name: str, out: int, into: int) -> nnx.Param | None:
            source = Source(f"model.{name}.weight", (out, into))
            parameter = Parameter((out, into), P(None, None), (source,), packing=Packing.MATRIX)
            return parameter.make(rngs, dtype) if out != into else None

        embedding = Parameter(table, split, (Source(EMBEDDING, table),), fan_in=2500, whole_if_uneven=True)
        head = Parameter(table, split, (Source(HEAD, table),), packing=Packing.MATRIX, whole_if_uneven=True)
        places = (config.max_position_embeddings, hidden)
        positions = Parameter(places, P(None, None), (Source("model.embed_positions.weight", places),), fan_in=2500)
        last = config.layer_specs[-1]
        self.embedding = embedding.make(rngs, dtype)
        self.positions = positions.make(rngs, dtype) if config.learned_positions else None
        self.project_in = projection("project_in", hidden, size)
        self.layers = nnx.List([Layer(config, spec, dtype, products, rngs) for spec in config.layer_specs])
        normed = last.norm_place == "sum"  # the last layer's output is a norm's already
        self.norm = None if normed else make_norm(last.norm, "model.norm", hidden, config.rms_norm_eps, dtype, rngs)
        self.project_out = projection("project_out", size, hidden)
        self.head = None if config.tie_word_embeddings else head.make(rngs, dtype)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        caches: Any,
        attend: Attend,
        query_start_loc: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Computes hidden states after the final norm.

        Args:
            tokens: int32 [...]; ids below vocab_size (the caller must ensure this: a gather clamps silently).
            positions: int32 [...], the position of each token in its own sequence.
            caches: of each layer, by its number: a list, or `LayerCaches` where layers store in the same arrays. Each
                is passed to `attend` and replaced, in a copy, by what it returns before the next layer gets its own.
            attend: stores keys and values, and attends.
            query_start_loc: int32 [rows + 1], tokens past its last entry are padding; None where there is none.

        Returns:
            (hidden [..., H] in the weights' dtype, the copy of caches).
        """
        places = Places(positions, self._rotations(positions), query_start_loc)
        x = self._embedded(tokens, positions)
        assert len(caches) == len(self.layers), f"{len(self.layers)} layers have {len(caches)} caches"
        caches = copy.copy(caches)
        for number, layer in enumerate(self.layers):
            x, caches[number] = layer(x, places, caches[number], attend)
        return _normed(self.norm, x), caches

    def _embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Computes what enters the first layer, [..., H]."""
        x = self.embedding[...][tokens]
        if self.config.embedding_multiplier != 1.0:
            x = x * jnp.asarray(self.config.embedding_multiplier, x.dtype)
        if self.project_in is not None:
            x = self.products.contract(x, self.project_in[...]).astype(x.dtype)
        return x if self.positions is None else x + self.positions[...][positions]

    def _rotations(self, positions: jax.Array) -> dict[Rope | None, Rotation]:
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
        products = dataclasses.replace(self.products, dtype=np.dtype(np.float32))
        if self.project_out is not None:
            hidden = self.products.contract(hidden, self.project_out[...]).astype(hidden.dtype)
        if self.head is None:
            logits = products.contract_unpacked(hidden, self.embedding[...])
        else:
            logits = products.contract(hidden, self.head[...])
        if self.config.logits_scaling != 1.0:
            logits = logits / self.config.logits_scaling
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)
