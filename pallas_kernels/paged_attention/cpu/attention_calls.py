"""Paged attention for CPUs: what `api` calls, and how the kernels become a part of XLA's programs.

A query's scores, weights and output are sums in one order, over its own positions from the first to the last: the same
to the bit in a decode step and in any chunk, tile or batch. Keys and values are read where they lie; `attend_loops`
says in which order a page holds them, so pools are only to be read by the functions here (whole pages can be copied).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.cpu import features, native_calls
from jaxserve.pallas_kernels.cpu.emitter import LANES, WORD
from jaxserve.pallas_kernels.cpu.native_functions import Native, Program, native
from jaxserve.pallas_kernels.paged_attention.cast import encode
from jaxserve.pallas_kernels.paged_attention.cpu import attend_loops as attend
from jaxserve.pallas_kernels.paged_attention.cpu import attend_plan as plans
from jaxserve.pallas_kernels.paged_attention.cpu import elements
from jaxserve.pallas_kernels.paged_attention.cpu import write_loops as write
from jaxserve.pallas_kernels.paged_attention.cpu.elements import PAIRS, SINGLES, Element
from jaxserve.pallas_kernels.paged_attention.pool import storage_dtype, value_dtype
from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec, Use

LOG2_E = float(np.log2(np.e))

# Part of the targets' names, which compiled programs keep: to be raised with every change of what a target computes.
_VERSION = 3

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


def _name(target: str, element: Element | None = None) -> str:
    kind = ""
    if element is not None:
        kind = f"{element.name}_{element.vectors}_{'fused' if elements.machine().fused else 'rounded'}_"
    return f"jaxserve_paged_attention_{target}_{kind}{_VERSION}"


def register(element: Element) -> None:
    """Compiles the kernels and makes them known to XLA, once a process.

    Needed before a program with them is compiled or loaded. Threads may call it at once.
    """
    _register_plan()
    for target, (num_items, work) in _TARGETS.items():
        build = functools.partial(_build, num_items=num_items, work=work, element=element)
        native_calls.register(_name(target, element), build, optimize=False)


def _register_plan() -> None:
    build = functools.partial(_build, num_items=_one_item, work=_plan, element=None)
    native_calls.register(_name("plan"), build, optimize=False)


def _build(module: Any, name: str, num_items: Native, work: Native, element: Element | None) -> None:
    program = Program(module, element)
    functions = program.function(num_items, WORD), program.function(work, WORD, WORD)
    native_calls.add_handler(module, name, *functions)


@native
def _one_item(frame):
    """A plan is made by the calling thread."""
    return 1


@native
def _plan(frame, item):
    plans.plan(frame)


@dataclasses.dataclass(frozen=True)
class CpuAttention:
    """One implementation: what its pages may hold, by dtype, and which instructions it needs.

    Attributes:
        name: in `api.IMPLEMENTATIONS`.
        elements: by the dtype of pages.
    """

    name: str
    elements: Mapping[str, Element] = dataclasses.field(hash=False)

    def element(self, storage: jax.typing.DTypeLike, head_dim: int) -> Element:
        """How a pool of this dtype holds its numbers. Raises ValueError where there is no kernel for it."""
        stored = value_dtype(storage).name
        if stored not in self.elements:
            names = ", ".join(self.elements)
            raise ValueError(f"pool holds {stored}; {self.name!r} takes {names}: choose 'xla'")
        return self.elements[stored].of(head_dim)

    def check(self, pool: Any, num_tokens: int, group_heads: int | None) -> None:
        """Raises ValueError where the kernels cannot take a pool like `pool`, [num_pages, 2, K, page_size, D] (an array
        or a ShapeDtypeStruct), or this CPU lacks their instructions; they take any number of tokens and query heads."""
        del num_tokens, group_heads
        self._check_sizes(self.element(pool.dtype, pool.shape[4]), pool.shape[3], pool.shape[4])

    def _check_sizes(self, element: Element, page_size: int, head_dim: int) -> None:
        if page_size < LANES:
            raise ValueError(
                f"page_size is {page_size}; {self.name!r} takes at least {LANES}: raise it or choose 'xla'"
            )
        if head_dim % (2 * LANES):
            raise ValueError(f"head_dim is {head_dim}; {self.name!r} takes multiples of {2 * LANES}: choose 'xla'")
        if element.together == 2 and not features.has("avx512_bf16"):
            raise ValueError(f"this CPU has no avx512_bf16, which {self.name!r} needs: choose 'cpu_float32' or 'xla'")
        if element.stored == "float16" and not elements.converts_float16():
            raise ValueError(f"this CPU has no f16c, which {self.name!r} needs for float16: choose 'xla'")

    def _check_dtype(self, name: str, dtype: jnp.dtype, element: Element) -> None:
        """Checks that a dtype of queries, keys or values loses nothing by the kernels' arithmetic and rounding."""
        taken = {element.computed, element.stored}
        if dtype.name not in taken:
            names = " and ".join(sorted(taken))
            raise ValueError(
                f"{name} {dtype.name}; {self.name!r} takes {names} with pages of {element.stored}: choose 'xla'"
            )

    def check_usable(self, use: Use) -> None:
        """Raises ValueError where the kernels do not serve a model, or do not work on this machine; compiles them."""
        element = self.element(jnp.dtype(use.kv_cache_dtype), use.head_dim)
        self._check_dtype("dtype is", jnp.dtype(use.dtype), element)
        self._check_sizes(element, use.page_size, use.head_dim)
        _check_works(self, element)

    def paged_attention(
        self,
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
            q: [T, K, G, D], of the pool's dtype, or float32 where the kernels compute in it.
            pool: [num_pages, 2, K, page_size, D], of one of the dtypes that the kernels take.
            page_table: int32 [R, max_pages].
            kv_lens: int32 [R].
            query_start_loc: int32 [R + 1].
            spec: scale, sliding window, soft cap.
            k_scale: None.
            v_scale: None.
            sinks: float32 [K, G] or None.
            decode_only: needs nothing else here.
            cascade: unless it is "off", rows with one token read the pages that they share together, where
                `attend_plan` finds that cheaper.

        Returns:
            [T, K, G, D] in q's dtype.

        Raises:
            ValueError: q has another dtype.
        """
        del k_scale, v_scale, decode_only
        element = self.element(pool.dtype, pool.shape[4])
        self._check_dtype("q has dtype", q.dtype, element)
        sizes = told_sizes(q.shape, pool.shape, page_table.shape, spec.sliding_window, cascade)
        plan = make_plan(sizes, page_table, kv_lens, query_start_loc)
        if sinks is None:
            sinks = jnp.full(q.shape[1:3], -jnp.inf, jnp.float32)
        register(element)
        call = jax.ffi.ffi_call(_name("attend", element), jax.ShapeDtypeStruct(q.shape, element.computed))
        query = q.astype(element.computed)
        out = call(_packed(sizes), query, pool, page_table, kv_lens, query_start_loc, _scale_and_cap(spec), sinks, plan)
        return out.astype(q.dtype)

    def kv_write(
        self,
        pool: jax.Array,
        k: jax.Array,
        v: jax.Array,
        slot_mapping: jax.Array,
        k_scale: jax.Array | None = None,
        v_scale: jax.Array | None = None,
    ) -> jax.Array:
        """Computes `api.kv_write`, in place when the pool is donated."""
        del k_scale, v_scale
        element = self.element(pool.dtype, pool.shape[4])
        register(element)
        result = jax.ShapeDtypeStruct(pool.shape, pool.dtype)
        call = jax.ffi.ffi_call(_name("write", element), result, input_output_aliases={3: 0})
        k, v = (encode(x, jnp.dtype(element.stored), None) for x in (k, v))
        return call(_write_sizes(pool, k.shape[0], 1), k, v, pool, slot_mapping)

    def rotate_and_write(
        self,
        qkv: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        pool: jax.Array,
        slot_mapping: jax.Array,
        dtype: jnp.dtype,
        k_scale: jax.Array | None = None,
        v_scale: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes `api.rotate_and_write`, in place when the pool is donated.

        Raises:
            ValueError: the kernels do not take dtype with this pool.
        """
        del k_scale, v_scale
        element = self.element(pool.dtype, pool.shape[4])
        self._check_dtype("dtype is", dtype, element)
        register(element)
        num_tokens, num_kv_heads, heads, head_dim = qkv.shape
        q = jax.ShapeDtypeStruct((num_tokens, num_kv_heads, heads - 2, head_dim), element.computed)
        call = jax.ffi.ffi_call(
            _name("rotate_and_write", element),
            (q, jax.ShapeDtypeStruct(pool.shape, pool.dtype)),
            input_output_aliases={4: 1},
        )
        sizes = _write_sizes(pool, num_tokens, heads - 2)
        q, pool = call(sizes, qkv.astype(jnp.float32), cos, sin, pool, slot_mapping)
        return q.astype(dtype), pool


PAIRED = CpuAttention("cpu", {"bfloat16": PAIRS})
"""Products of pairs of bfloat16, on CPUs with AVX512_BF16."""

SINGLE = CpuAttention("cpu_float32", SINGLES)
"""Products of float32, on any CPU."""


@functools.cache
def _check_works(kernels: CpuAttention, element: Element) -> None:
    """Raises ValueError unless attention over one position returns the value that was written there."""
    with jax.default_device(jax.devices("cpu")[0]):
        head_dim = element.vectors * LANES
        pool = np.zeros((2, 2, 1, LANES, head_dim), storage_dtype(element.stored, "cpu"))
        value = np.arange(head_dim).astype(element.stored).reshape(1, 1, head_dim)
        one, ends = np.ones(1, np.int32), np.arange(2, dtype=np.int32)

        @jax.jit
        def write_and_read(pool: jax.Array, value: jax.Array) -> jax.Array:
            pool = kernels.kv_write(pool, value, value, jnp.asarray(LANES * one))
            table, lengths, starts = (jnp.asarray(x) for x in (one[:, None], one, ends))
            return kernels.paged_attention(value[:, :, None], pool, table, lengths, starts, AttentionSpec(1.0))[:, :, 0]

        got, wanted = (np.asarray(x, np.float32) for x in (write_and_read(pool, value), value))
        if not np.allclose(got, wanted, rtol=2.0**-20, atol=0):
            raise ValueError(f"{kernels.name!r} does not compute what it should on this machine: choose 'xla'")


def _scale_and_cap(spec: AttentionSpec) -> jax.Array:
    """What makes scores in base 2 of products: a factor and, after a hyperbolic tangent, another one; 0 for no cap."""
    if spec.soft_cap is None:
        return jnp.asarray([spec.scale * LOG2_E, 0], jnp.float32)
    return jnp.asarray([spec.scale / spec.soft_cap, spec.soft_cap * LOG2_E], jnp.float32)


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
        plans.PAGE_BITS: page_size.bit_length() - 1,
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
    _register_plan()
    words = sizes[plans.MEMBERS] + 2 * sizes[plans.ROWS]
    call = jax.ffi.ffi_call(_name("plan"), jax.ShapeDtypeStruct((words,), jnp.int32))
    return call(_packed(sizes), page_table, kv_lens, query_start_loc)


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
