"""Paged attention for CPUs with AVX512_BF16: what `api` calls, and how the kernels become a part of XLA's programs.

A query's scores, weights and output are sums in one order, over its own positions from the first to the last: the same
to the bit in a decode step and in any chunk, tile or batch. Keys and values are read where they lie; `attend` says in
which order a page holds them, so pools are only to be read by the functions here (whole pages can be copied).
"""

import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numba import cfunc, njit, types

from jaxserve.pallas_kernels.cpu import features, ffi
from jaxserve.pallas_kernels.cpu.emitter import LANES
from jaxserve.pallas_kernels.paged_attention.cast import encode
from jaxserve.pallas_kernels.paged_attention.cpu import attend_loops as attend
from jaxserve.pallas_kernels.paged_attention.cpu import attend_plan as plans
from jaxserve.pallas_kernels.paged_attention.cpu import vectors
from jaxserve.pallas_kernels.paged_attention.cpu import write_loops as write
from jaxserve.pallas_kernels.paged_attention.pool import new_pool, value_dtype
from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec, Use

LOG2_E = float(np.log2(np.e))

# Part of the targets' names, which compiled programs keep: to be raised with every change of what a target computes.
_VERSION = 2

_TARGETS = {
    "attend": (attend.num_items, attend.attend),
    "write": (write.num_items, write.write),
    "rotate_and_write": (write.num_items, write.rotate_and_write),
}

# Queries of a tile of a longer chunk of tokens, or of rows that share pages: enough to make reading them cheap.
_TILE_QUERIES = 48

# Rows of a step of decodes from which on a work item takes all heads of a row, whose keys and values it then reads from
# the first byte of a page to the last; with fewer, an item takes one head, so that there are items for all threads.
_ROWS_TO_SHARE = 32


def shared_read_counts() -> dict[str, int]:
    """Returns what `attend_plan.shared_read_counts` does."""
    return plans.shared_read_counts()


def _name(target: str) -> str:
    return f"jaxserve_paged_attention_{target}_{_VERSION}"


def register() -> None:
    """Compiles the kernels and makes them known to XLA, once a process.

    Needed before a program with them is compiled or loaded. Threads may call it at once.
    """
    ffi.register_call(_name("plan"), plans.plan)
    for target, (num_items, work) in _TARGETS.items():
        ffi.register(_name(target), num_items, _outlined(work))


_LOCK = threading.Lock()
_OUTLINED: dict[Any, tuple[Any, Any]] = {}
"""What `_outlined` made, kept from being freed."""


def _outlined(work: Any) -> Any:
    """The njit function that does `work` behind a pointer, where it is not optimized again with each of its callers."""
    with _LOCK:
        if work not in _OUTLINED:
            vectors.compile_functions()
            function = cfunc(types.void(types.int64, types.int64), error_model="numpy")(work.py_func)
            _OUTLINED[work] = function, _calling(function.ctypes)
        return _OUTLINED[work][1]


def _calling(function: Any) -> Any:
    """The njit function that calls a C function of a call frame and an item."""

    @njit
    def call(frame, item):
        function(frame, item)

    return call


def check(pool: Any, num_tokens: int, group_heads: int | None) -> None:
    """Raises ValueError where the kernels cannot take a pool like `pool`, [num_pages, 2, K, page_size, D] (an array or
    a ShapeDtypeStruct), or this CPU lacks their instructions; they take any number of tokens and query heads."""
    del num_tokens, group_heads
    _check_sizes(value_dtype(pool.dtype), pool.shape[3], pool.shape[4])


def _check_sizes(stored: jnp.dtype, page_size: int, head_dim: int) -> None:
    if stored != jnp.bfloat16:
        raise ValueError(f"pool holds {stored.name}; 'cpu' takes bfloat16: choose 'xla'")
    if page_size < LANES:
        raise ValueError(f"page_size is {page_size}; 'cpu' takes at least {LANES}: raise it or choose 'xla'")
    if head_dim % (2 * LANES):
        raise ValueError(f"head_dim is {head_dim}; 'cpu' takes multiples of {2 * LANES}: choose 'xla'")
    if not features.has("avx512_bf16"):
        raise ValueError("this CPU has no avx512_bf16, which 'cpu' needs: choose 'xla'")


def check_usable(use: Use) -> None:
    """Raises ValueError where the kernels do not serve a model, or do not work on this machine; compiles them."""
    if jnp.dtype(use.dtype) != jnp.bfloat16:
        raise ValueError(f"dtype is {use.dtype}; 'cpu' takes bfloat16: choose 'xla'")
    _check_sizes(jnp.dtype(use.kv_cache_dtype), use.page_size, use.head_dim)
    _check_works()


@functools.cache
def _check_works() -> None:
    """Raises ValueError unless attention over one position returns the value that was written there."""
    with jax.default_device(jax.devices("cpu")[0]):
        pool = new_pool(2, 1, LANES, 2 * LANES, jnp.bfloat16, platform="cpu")
        value = jnp.arange(2 * LANES, dtype=jnp.bfloat16).reshape(1, 1, 2 * LANES)
        pool = jax.jit(kv_write, donate_argnums=0)(pool, value, value, jnp.full(1, LANES, jnp.int32))
        one, ends = jnp.ones(1, jnp.int32), jnp.arange(2, dtype=jnp.int32)
        attend_once = jax.jit(paged_attention, static_argnums=5)
        out = attend_once(value[:, :, None], pool, one[:, None], one, ends, AttentionSpec(1.0))
        if not np.array_equal(np.asarray(out)[:, :, 0], np.asarray(value)):
            raise ValueError("'cpu' does not compute what it should on this machine: choose 'xla'")


def paged_attention(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    query_start_loc: jax.Array,
    spec: AttentionSpec,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    sinks: jax.Array | None = None,
    decode_only: bool = False,
    cascade: str = "auto",
) -> jax.Array:
    """Computes `api.paged_attention`; arguments are checked there, but for the ones that only this one refuses.

    Args:
        q: bfloat16 [T, K, G, D].
        pool: of bfloat16, [num_pages, 2, K, page_size, D].
        page_table: int32 [R, max_pages].
        kv_lens: int32 [R].
        query_start_loc: int32 [R + 1].
        spec: scale, sliding window; no soft cap.
        k_scale: None.
        v_scale: None.
        sinks: float32 [K, G] or None.
        decode_only: needs nothing else here.
        cascade: unless it is "off", rows with one token read the pages that they share together, where `attend_plan`
            finds that cheaper.

    Returns:
        bfloat16 [T, K, G, D].

    Raises:
        ValueError: q is not bfloat16, or there is a soft cap.
    """
    del k_scale, v_scale, decode_only
    if q.dtype != jnp.bfloat16:
        raise ValueError(f"q has dtype {q.dtype.name}; 'cpu' takes bfloat16: choose 'xla'")
    if spec.soft_cap is not None:
        raise ValueError(f"soft_cap is {spec.soft_cap}; 'cpu' takes none: choose 'xla'")
    sizes = told_sizes(q.shape, pool.shape, page_table.shape, spec.sliding_window, cascade)
    plan = make_plan(sizes, page_table, kv_lens, query_start_loc)
    if sinks is None:
        sinks = jnp.full(q.shape[1:3], -jnp.inf, jnp.float32)
    call = jax.ffi.ffi_call(_name("attend"), jax.ShapeDtypeStruct(q.shape, q.dtype))
    scale = jnp.full((1,), spec.scale * LOG2_E, jnp.float32)
    return call(_packed(sizes), q, pool, page_table, kv_lens, query_start_loc, scale, sinks, plan)


def told_sizes(
    q: tuple[int, ...], pool: tuple[int, ...], page_table: tuple[int, ...], window: int | None, cascade: str
) -> dict[int, int]:
    """What `attend_plan` and `attend_loops` are told, from the shapes of arguments of `paged_attention`."""
    num_tokens, num_kv_heads, group_heads, head_dim = q
    num_pages, _, _, page_size, _ = pool
    num_rows, max_pages = page_table
    tile = max(1, _TILE_QUERIES // group_heads)
    sizes = {
        plans.TOKENS: num_tokens,
        plans.ROWS: num_rows,
        plans.KV_HEADS: num_kv_heads,
        plans.GROUP: group_heads,
        plans.HEAD_DIM: head_dim,
        plans.PAGE_SIZE: page_size,
        plans.MAX_PAGES: max_pages,
        plans.NUM_PAGES: num_pages,
        plans.WINDOW: min(window or attend.NO_WINDOW, attend.NO_WINDOW),
        plans.TILE: tile,
        plans.PARTS: 1 if num_tokens <= num_rows and num_rows >= _ROWS_TO_SHARE else num_kv_heads,
        plans.TOGETHER: 1 if cascade == "off" else tile,
    }
    return sizes | {plans.MEMBERS: plans.members_place(sizes)}


def make_plan(
    sizes: dict[int, int], page_table: jax.Array, kv_lens: jax.Array, query_start_loc: jax.Array
) -> jax.Array:
    """Returns the work items of a step, int32, as `attend_plan` describes them; the same call for every layer."""
    register()
    words = sizes[plans.MEMBERS] + 2 * sizes[plans.ROWS]
    call = jax.ffi.ffi_call(_name("plan"), jax.ShapeDtypeStruct((words,), jnp.int32))
    return call(_packed(sizes), page_table, kv_lens, query_start_loc)


def kv_write(
    pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """Computes `api.kv_write` for a pool of bfloat16, in place when the pool is donated."""
    del k_scale, v_scale
    register()
    call = jax.ffi.ffi_call(_name("write"), jax.ShapeDtypeStruct(pool.shape, pool.dtype), input_output_aliases={3: 0})
    k, v = (encode(x, jnp.bfloat16, None) for x in (k, v))
    return call(_write_sizes(pool, k.shape[0], 1), k, v, pool, slot_mapping)


def rotate_and_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    pool: jax.Array,
    slot_mapping: jax.Array,
    dtype: jnp.dtype,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes `api.rotate_and_write` for a pool of bfloat16, in place when the pool is donated.

    Raises:
        ValueError: dtype is not bfloat16.
    """
    del k_scale, v_scale
    if dtype != jnp.bfloat16:
        raise ValueError(f"dtype is {dtype.name}; 'cpu' takes bfloat16: choose 'xla'")
    register()
    num_tokens, num_kv_heads, heads, head_dim = qkv.shape
    q = jax.ShapeDtypeStruct((num_tokens, num_kv_heads, heads - 2, head_dim), dtype)
    call = jax.ffi.ffi_call(
        _name("rotate_and_write"),
        (q, jax.ShapeDtypeStruct(pool.shape, pool.dtype)),
        input_output_aliases={4: 1},
    )
    sizes = _write_sizes(pool, num_tokens, heads - 2)
    q, pool = call(sizes, qkv.astype(jnp.float32), cos, sin, pool, slot_mapping)
    return q, pool


def _write_sizes(pool: jax.Array, num_tokens: int, group_heads: int) -> jax.Array:
    sizes = {
        write.TOKENS: num_tokens,
        write.KV_HEADS: pool.shape[2],
        write.GROUP: group_heads,
        write.HEAD_DIM: pool.shape[4],
        write.PAGE_SIZE: pool.shape[3],
        write.NUM_PAGES: pool.shape[0],
    }
    return _packed(sizes)


def _packed(sizes: dict[int, int]) -> jax.Array:
    return jnp.asarray([sizes[place] for place in range(len(sizes))], jnp.int32)
