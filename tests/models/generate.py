"""Greedy generation with nothing but the models package, through dense attention and through pages."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.attention_backends import (
    POOL_PARTITION,
    AttentionMetadata,
    LayerCaches,
    Scales,
    dense_attend,
    paged_attend,
)
from jaxserve.models.layers.matmul import Products
from jaxserve.models.loading.kv_scales import placed
from jaxserve.models.params import bind, make_mesh, products_for
from jaxserve.pallas_kernels.paged_attention import api
from jaxserve.pallas_kernels.paged_attention.pool import new_pool

PAGE_SIZE = 16
ROWS = 8
"""Rows of a step: as many as make rows of a dot independent of their number on a CPU."""


@functools.partial(jax.jit, static_argnums=(0, 3))
def dense_logits(config: ModelConfig, params: Any, tokens: jax.Array, products: Products = Products()) -> jax.Array:
    """float32 [T, V] for int32 [T]."""
    model = bind(config, params, products)
    caches = [None] * config.num_hidden_layers
    hidden, _ = model(tokens, jnp.arange(tokens.shape[0]), caches, dense_attend())
    return model.logits(hidden)


def dense_greedy(config: ModelConfig, params: Any, prompt: jax.Array, new_tokens: int) -> np.ndarray:
    """int32 [prompt + new]: every step computes the whole sequence anew, all by the one program of its final length."""
    start = prompt.shape[0]
    tokens = np.concatenate([np.asarray(prompt, np.int32), np.zeros(new_tokens, np.int32)])
    for place in range(start, start + new_tokens):
        tokens[place] = np.argmax(dense_logits(config, params, jnp.asarray(tokens))[place - 1])
    return tokens


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=3)
def paged_step(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    pools: list[jax.Array],
    metadata: AttentionMetadata,
    implementation: str,
    mesh: Mesh | None = None,
    scales: list[Scales] | None = None,
) -> tuple[jax.Array, list[jax.Array]]:
    """float32 logits [T, V] of a step, and the pools."""
    products = Products() if mesh is None else products_for("float32", mesh, experts=True)
    model = bind(config, params, products)
    attend = paged_attend([metadata], implementation, mesh)
    caches = LayerCaches(pools, scales)
    hidden, caches = model(tokens, metadata.positions, caches, attend, metadata.query_start_loc)
    return model.logits(hidden), caches.pools


class PagedSequence:
    """One sequence in scattered pages, computed chunk by chunk; it sits in row 1 of a step, other rows are empty.

    With scales float32 [L, 2, K] the pages hold `quantized` numbers.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        length: int,
        implementation: str,
        mesh: Mesh | None = None,
        scales: np.ndarray | None = None,
        quantized: str = "int8",
    ):
        self.scales = None if scales is None else placed(scales, mesh or make_mesh())
        self.config, self.params, self.implementation, self.mesh = config, params, implementation, mesh
        count = -(-length // PAGE_SIZE)
        # Page 0 is the null page; the sequence's pages are neither adjacent nor in order.
        self.pages = (1 + np.random.RandomState(0).permutation(2 * count)[:count]).astype(np.int32)
        dtype = params["embedding"].dtype if scales is None else quantized
        sharding = None if mesh is None else NamedSharding(mesh, POOL_PARTITION)
        self.pools = [
            new_pool(2 * count + 1, config.num_key_value_heads, PAGE_SIZE, config.head_dim, dtype, sharding=sharding)
            for _ in range(config.num_hidden_layers)
        ]
        self.length = 0

    def extend(self, tokens: np.ndarray, bucket: int) -> np.ndarray:
        """Computes the next tokens in a step of `bucket` tokens; returns their logits [len(tokens), V]."""
        count = len(tokens)
        places = np.arange(self.length, self.length + count, dtype=np.int32)
        self.length += count
        table = np.full((ROWS, len(self.pages)), 2**30, np.int32)  # nothing may read the entries of empty rows
        table[1] = self.pages
        lens, starts = np.zeros(ROWS, np.int32), np.full(ROWS + 1, count, np.int32)
        lens[1], starts[:2] = self.length, 0
        slots = self.pages[places // PAGE_SIZE] * PAGE_SIZE + places % PAGE_SIZE
        metadata = AttentionMetadata(
            positions=_padded(places, bucket),
            page_table=jnp.asarray(table),
            kv_lens=jnp.asarray(lens),
            query_start_loc=jnp.asarray(starts),
            slot_mapping=_padded(slots, bucket),
        )
        logits, self.pools = paged_step(
            self.config,
            self.params,
            _padded(tokens, bucket),
            self.pools,
            metadata,
            self.implementation,
            self.mesh,
            self.scales,
        )
        return np.asarray(logits)[:count]


def paged_greedy(
    config: ModelConfig,
    params: Any,
    prompt: np.ndarray,
    new_tokens: int,
    implementation: str | None = None,
    mesh: Mesh | None = None,
    scales: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [prompt + new], float32 logits of all but the last): the prompt in two chunks, then one by one."""
    dtype = params["embedding"].dtype.name
    use = api.Use(dtype, dtype if scales is None else "int8", PAGE_SIZE, config.head_dim, config.group_size)
    implementation = implementation or api.choose(jax.default_backend(), use=use)
    sequence = PagedSequence(config, params, len(prompt) + new_tokens, implementation, mesh, scales)
    cut = len(prompt) * 2 // 3
    logits = [sequence.extend(prompt[:cut], len(prompt)), sequence.extend(prompt[cut:], len(prompt))]
    tokens = list(prompt)
    for _ in range(new_tokens - 1):
        tokens.append(int(np.argmax(logits[-1][-1])))
        logits.append(sequence.extend(np.array(tokens[-1:], np.int32), len(prompt)))
    tokens.append(int(np.argmax(logits[-1][-1])))
    return np.array(tokens, np.int32), np.concatenate(logits)


def _padded(values: np.ndarray, length: int) -> jax.Array:
    return jnp.asarray(np.pad(values, (0, length - len(values))), jnp.int32)
