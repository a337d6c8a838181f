"""Implements the attention of a layer, except for storing keys and values and attending to them, which the caller does.

Letters in shapes: T tokens, H hidden, K key-value heads, G query heads per key-value head, D head dimension. `...` is
any leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.models.layer_specs import SelfAttentionSpec
from jaxserve.models.layers.matmul import Products
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.parameter import Initial, Packing, Parameter, Source
from jaxserve.models.layers.rope import Rope, head_order
from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec

Cache = Any

Rotation = tuple[jax.Array, jax.Array]
"""Cosines and sines of the angles of each token, float32 [..., D / 2] each."""


class Places(NamedTuple):
    """Holds what layers need to know of the positions of tokens.

    Attributes:
        positions: int32 [...], of each token in its own sequence.
        rotations: by the `SelfAttentionSpec.rope` of the layers that rotate so.
        query_start_loc: int32 [rows + 1], tokens past its last entry are padding; None where there is none.
    """

    positions: jax.Array
    rotations: Mapping[Rope | None, Rotation]
    query_start_loc: jax.Array | None = None


class Attend(Protocol):
    """Stores a layer's keys and values and attends to them (see `jaxserve.models.layers.attention_backends`)."""

    def __call__(
        self,
        qkv: jax.Array,
        rotation: Rotation | None,
        cache: Cache,
        spec: AttentionSpec,
        sinks: jax.Array | None,
        dtype: np.dtype,
    ) -> tuple[jax.Array, Cache]:
        """Attends in one layer.

        Args:
            qkv: [..., K, G + 2, D]: for each key-value head its queries, its key and its value, not yet rotated, in the
                dtype of the projection's products; they are rounded to `dtype` after the rotation.
            rotation: of the tokens; None for a layer that does not rotate.
            cache: the layer's.
            spec: scale, window and cap of the layer.
            sinks: float32 [K, G], or None for a layer without.
            dtype: of queries, keys, values and the result.

        Returns:
            (out [..., K, G, D] in `dtype`, new cache).
        """
        ...


class SelfAttention(nnx.Module):
    """Applies the fused QKV projection, the caller's rotation and attention, and the output projection.

    Q, K and V are one matrix whose outer axis is the key-value head, so that tensor parallelism splits it (and the
    attention that follows) by key-value heads alone.
    """

    def __init__(
        self,
        spec: SelfAttentionSpec,
        *,
        hidden: int,
        kv_heads: int,
        group: int,
        head_dim: int,
        rotary_size: int,
        norm: str,
        eps: float,
        dtype: jnp.dtype,
        products: Products,
        rngs: nnx.Rngs,
    ):
        q_size, kv_size = kv_heads * group * head_dim, kv_heads * head_dim
        self.products = products
        self.rope = spec.rope
        self.rotates = spec.rotation
        self.growth = spec.query_growth
        order = head_order(head_dim, rotary_size)
        scale = head_dim**-0.5 if spec.scale is None else spec.scale
        self.spec = AttentionSpec(scale, spec.sliding_window, spec.soft_cap)

        def projections(kind: str, *shape: int) -> tuple[Source, ...]:
            # Query head h of Hugging Face is query h % G of key-value head h // G: reshaping [K * G * D] puts it there.
            return (
                Source(f"self_attn.q_proj.{kind}", (q_size, *shape), 1, 0, group, order=order),
                Source(f"self_attn.k_proj.{kind}", (kv_size, *shape), 1, group, group + 1, order=order),
                Source(f"self_attn.v_proj.{kind}", (kv_size, *shape), 1, group + 1, group + 2),
            )

        def make(parameter: Parameter) -> nnx.Param:
            return parameter.make(rngs, dtype)

        qkv, out = (kv_heads, group + 2, head_dim), (kv_heads, group, head_dim)
        self.qkv = make(
            Parameter(
                (*qkv, hidden),
                P("tensor", None, None, None),
                projections("weight", hidden),
                packing=Packing.MATRIX,
            )
        )
        self.out = make(
            Parameter(
                (hidden, *out),
                P(None, "tensor", None, None),
                (Source("self_attn.o_proj.weight", (hidden, q_size)),),
                contracted=3,
                packing=Packing.MATRIX,
            )
        )
        qkv_bias = Parameter(qkv, P("tensor", None, None), projections("bias"), initial=Initial.ZEROS)
        out_bias = Parameter((hidden,), P(None), (Source("self_attn.o_proj.bias", (hidden,)),), initial=Initial.ZEROS)
        sinks = Parameter(out[:2], P("tensor", None), (Source("self_attn.sinks", (kv_heads * group,)),))
        self.qkv_bias = make(qkv_bias) if spec.qkv_bias else None
        self.out_bias = make(out_bias) if spec.out_bias else None
        self.sinks = make(sinks) if spec.sinks else None
        one: dict[str, Any] = {"offset": 1.0 if norm == "rms_offset" else 0.0}
        sizes: tuple[Any, Any] = head_dim, head_dim
        if spec.whole_qk_norm:
            one["partition"] = P("tensor", None, None)
            sizes = (kv_heads, group, head_dim), (kv_heads, 1, head_dim)
        normed = spec.qk_norm or spec.whole_qk_norm
        self.q_norm = RMSNorm("self_attn.q_norm", sizes[0], eps, dtype, rngs, **one) if normed else None
        self.k_norm = RMSNorm("self_attn.k_norm", sizes[1], eps, dtype, rngs, **one) if normed else None

    def __call__(self, x: jax.Array, places: Places, cache: Cache, attend: Attend) -> tuple[jax.Array, Cache]:
        rotation = places.rotations[self.rope] if self.rotates else None
        qkv = self.products.contract(x, self.qkv[...])  # [..., K, G + 2, D]
        if self.qkv_bias is not None:
            qkv += self.qkv_bias[...].astype(qkv.dtype)
        if self.q_norm is not None and self.k_norm is not None:
            parts = self.q_norm(qkv[..., :-2, :]), self.k_norm(qkv[..., -2:-1, :]), qkv[..., -1:, :]
            qkv = jnp.concatenate(parts, axis=-2)
        if self.growth is not None:
            turns = (places.positions // self.growth.length).astype(jnp.float32)
            factor = (1 + self.growth.beta * jnp.log1p(turns))[..., None, None, None]
            qkv = jnp.concatenate([(qkv[..., :-2, :] * factor).astype(qkv.dtype), qkv[..., -2:, :]], axis=-2)
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)
        attended, cache = attend(qkv, rotation, cache, self.spec, sinks, x.dtype)
        y = self.products.contract(attended, self.out[...], axes=3)
        if self.out_bias is not None:
            y += self.out_bias[...].astype(y.dtype)
        return y.astype(x.dtype), cache
