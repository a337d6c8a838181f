"""Builds a model's `attend` function: paged attention for serving, dense attention for training and reference.

Letters in shapes: T tokens of a step, R rows (sequences) of a step, K key-value heads, G query heads per key-value
head, D head dimension. Both makers return an `Attend` (models/layers/self_attention.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxserve.models.layers.self_attention import Attend, Cache, Rotation
from jaxserve.pallas_kernels.paged_attention import api
from jaxserve.pallas_kernels.paged_attention.rotary import rotate
from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec

POOL_PARTITION = P(None, None, "tensor", None, None)
"""Partition of a layer's pool [num_pages, 2, K, page_size, D] on a mesh with the axis `tensor`."""

SCALE_PARTITION = P("tensor")
"""Partition of a scale [K] of a quantized pool."""

Scales = tuple[jax.Array, jax.Array]
"""Scales of a layer's quantized pool: float32 [K] for keys, [K] for values. Arrays of their own, and not slices of one
for all layers, because XLA copies each slice in every step to hand it to a kernel."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "page_table", "kv_lens", "query_start_loc", "slot_mapping"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Maps a step's tokens to rows and to their places in the paged key-value cache.

    Attributes:
        positions: int32 [T], each token's position in its own sequence.
        page_table: int32 [R, max_pages], the pages of each row in order.
        kv_lens: int32 [R], each row's length, this step's tokens included; 0 for an empty row.
        query_start_loc: int32 [R + 1], offsets of each row's first token; tokens past the last entry are padding.
        slot_mapping: int32 [T], page * page_size + offset at which each token's key and value are written; slots of
            page 0 for padding.
    """

    positions: jax.Array
    page_table: jax.Array
    kv_lens: jax.Array
    query_start_loc: jax.Array
    slot_mapping: jax.Array


class LayerCache(NamedTuple):
    """Holds one layer's paged key-value cache.

    Attributes:
        pool: [num_pages, 2, K, page_size, D], which layers of other groups may use too.
        scales: per-head factors of the stored keys and the stored values; None unless the pool is quantized.
        group: the layer's, whose page table names its pages.
    """

    pool: jax.Array
    scales: Scales | None = None
    group: int = 0


class LayerCaches:
    """Holds the caches of all layers, by number; layers of several groups share a pool.

    Attributes:
        pools: arrays as `LayerCache.pool`; each as the layer left it that was set last.
    """

    def __init__(
        self,
        pools: Sequence[jax.Array],
        kv_scales: Sequence[Scales] | None = None,
        places: Sequence[tuple[int, int]] | None = None,
    ):
        """Initializes the caches.

        Args:
            pools: the arrays.
            kv_scales: of each layer; None unless the pools are quantized.
            places: group and array of each layer, as in `LayerGroups`; None for one group.
        """
        self.pools = list(pools)
        self._kv_scales = kv_scales
        self._places = [(0, layer) for layer in range(len(pools))] if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    def __copy__(self) -> LayerCaches:
        return LayerCaches(self.pools, self._kv_scales, self._places)

    def __getitem__(self, layer: int) -> LayerCache:
        group, array = self._places[layer]
        return LayerCache(self.pools[array], None if self._kv_scales is None else self._kv_scales[layer], group)

    def __setitem__(self, layer: int, cache: LayerCache) -> None:
        self.pools[self._places[layer][1]] = cache.pool


def paged_attend(
    metadata: Sequence[AttentionMetadata],
    implementation: str,
    mesh: Mesh | None = None,
    *,
    decode_only: bool = False,
    cascade: str = "auto",
) -> Attend:
    """Returns an `Attend` over pages; the cache of a layer is a `LayerCache`.

    The returned function writes this step's keys and values into the pool and then attends over it, so it also reads
    them from there: a token sees the same bits whether its predecessors were computed in this step or an earlier one.

    Args:
        metadata: of the step, for each group of layers.
        implementation: a name that `jaxserve.pallas_kernels.paged_attention.api.choose` returned.
        mesh: with the axis `tensor` where that has more than one device: each device then computes its own heads. The
            kernels are opaque to the partitioner, so they are sharded explicitly. None for one device.
        decode_only: no row has more than one token, and row r's is token r.
        cascade: whether rows that share pages read them together, as `EngineConfig.cascade_attention`.

    Raises:
        ValueError: on a call, where a shape or dtype does not fit (see `jaxserve.pallas_kernels.paged_attention.api`).
    """

    # Traced and lowered once for each kind of layer, not for each layer; XLA inlines it.
    @functools.partial(jax.jit, static_argnames=("spec", "dtype"))
    def attend_heads(
        qkv: jax.Array,
        rotation: Rotation | None,
        pool: jax.Array,
        kv_scales: Scales | None,
        step: AttentionMetadata,
        sinks: jax.Array | None,
        *,
        spec: AttentionSpec,
        dtype: np.dtype,
    ) -> tuple[jax.Array, jax.Array]:
        k_scale, v_scale = (None, None) if kv_scales is None else kv_scales
        scales: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale, "implementation": implementation}
        if rotation is None:
            q, k, v = split_heads(qkv, dtype)
            pool = api.kv_write(pool, k, v, step.slot_mapping, **scales)
        else:
            q, pool = api.rotate_and_write(qkv, *rotation, pool, step.slot_mapping, dtype=dtype, **scales)
        out = api.paged_attention(
            q,
            pool,
            step.page_table,
            step.kv_lens,
            step.query_start_loc,
            **dataclasses.asdict(spec),
            sinks=sinks,
            decode_only=decode_only,
            cascade=cascade,
            **scales,
        )
        return out, pool

    def attend(
        qkv: jax.Array,
        rotation: Rotation | None,
        cache: LayerCache,
        spec: AttentionSpec,
        sinks: jax.Array | None,
        dtype: np.dtype,
    ) -> tuple[jax.Array, LayerCache]:
        one: Any = functools.partial(attend_heads, spec=spec, dtype=dtype)
        if mesh is not None and mesh.shape["tensor"] > 1:
            heads = P(None, "tensor")
            scales = None if cache.scales is None else (SCALE_PARTITION, SCALE_PARTITION)
            one = jax.shard_map(
                one,
                mesh=mesh,
                in_specs=(heads, P(), POOL_PARTITION, scales, P(), SCALE_PARTITION),
                out_specs=(heads, POOL_PARTITION),
                check_vma=False,  # the kernels do not say over which axes their results vary
            )
        out, pool = one(qkv, rotation, cache.pool, cache.scales, metadata[cache.group], sinks)
        return out, cache._replace(pool=pool)

    return attend


def split_heads(qkv: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits [..., K, G + 2, D] into queries [..., K, G, D], keys [..., K, D] and values [..., K, D], in `dtype`."""
    qkv = qkv.astype(dtype)
    return qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]


def rotated(
    qkv: jax.Array, rotation: Rotation | None, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Applies rotary embedding to queries [..., K, G, D] and keys [..., K, D]; returns them and the values in `dtype`.

    Args:
        qkv: [..., K, G + 2, D], as `Attend` takes it.
        rotation: of the tokens; None leaves queries and keys as they are.
        dtype: what the results are rounded to, once.
    """
    if rotation is None:
        return split_heads(qkv, dtype)
    qk = rotate(qkv[..., :-1, :], *rotation).astype(dtype)
    return qk[..., :-1, :], qk[..., -1, :], qkv[..., -1, :].astype(dtype)


def dense_attend(segments: jax.Array | None = None) -> Attend:
    """Returns an `Attend` for dense causal attention over the tokens of the call alone; caches pass through.

    The returned function takes any leading axes. A token attends to itself and to the tokens before it on the axis T
    that have its segment; a sliding window counts tokens on that axis.

    Args:
        segments: int32 [..., T], which packed sequence each token belongs to; None where there is one.
    """

    def attend(
        qkv: jax.Array,
        rotation: Rotation | None,
        cache: Cache,
        spec: AttentionSpec,
        sinks: jax.Array | None,
        dtype: np.dtype,
    ) -> tuple[jax.Array, Cache]:
        q, k, v = rotated(qkv, rotation, dtype)
        score = jnp.einsum("...tkgd,...skd->...kgts", q, k, preferred_element_type=jnp.float32) * spec.scale
        if spec.soft_cap is not None:
            score = spec.soft_cap * jnp.tanh(score / spec.soft_cap)
        place = jnp.arange(q.shape[-4])
        seen = place[None, :] <= place[:, None]
        if spec.sliding_window is not None:
            seen &= place[None, :] > place[:, None] - spec.sliding_window
        if segments is not None:
            seen = seen & (segments[..., :, None] == segments[..., None, :])
            seen = seen[..., None, None, :, :]
        score = jnp.where(seen, score, -jnp.inf)  # a token sees itself, so no row is masked whole
        if sinks is not None:
            sink = jnp.broadcast_to(sinks[:, :, None, None], (*score.shape[:-1], 1))
            score = jnp.concatenate([score, sink], axis=-1)
        weight = jax.nn.softmax(score, axis=-1).astype(v.dtype)
        if sinks is not None:
            weight = weight[..., :-1]
        out = jnp.einsum("...kgts,...skd->...tkgd", weight, v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype), cache

    return attend
