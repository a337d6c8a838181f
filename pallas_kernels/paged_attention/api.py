"""Paged attention and the KV write behind one seam: checked arguments, implementations by name.

An implementation is one entry of `IMPLEMENTATIONS`. The engine calls `choose` once at start and passes the name on.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import reference, xla
from pallas_kernels.paged_attention.pool import check_page_size
from pallas_kernels.paged_attention.spec import AttentionSpec


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute attention over pages.

    Attributes:
        attention: (q, pool, page_table, kv_lens, query_start_loc, spec) -> out, as `paged_attention` describes them.
        kv_write: (pool, k, v, slot_mapping) -> pool, as `kv_write` describes them.
        platforms: platforms it runs on; empty for all.
        max_group_heads: the most query heads a key-value head; None for no limit.
    """

    attention: Callable[..., jax.Array]
    kv_write: Callable[..., jax.Array]
    platforms: tuple[str, ...] = ()
    max_group_heads: int | None = None


# In order of preference: `choose` takes the first that runs on the platform.
IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "xla": Implementation(xla.paged_attention, xla.kv_write, max_group_heads=xla.MAX_DOT_ROWS),
        "reference": Implementation(reference.paged_attention, reference.kv_write),
    }
)


def choose(platform: str, requested: str = "auto") -> str:
    """Names the implementation for `platform` ("cpu", "gpu", ...).

    Args:
        platform: what `jax.Device.platform` says.
        requested: a name in `IMPLEMENTATIONS`, or "auto" for the preferred one.

    Raises:
        ValueError: `requested` is unknown or does not run on `platform`.
    """
    if requested == "auto":
        return next(name for name, one in IMPLEMENTATIONS.items() if not one.platforms or platform in one.platforms)
    platforms = _implementation(requested).platforms
    if platforms and platform not in platforms:
        raise ValueError(f"implementation {requested!r} runs on {', '.join(platforms)}; the platform is {platform!r}")
    return requested


def kv_write(
    pool: jax.Array, k: jax.Array, v: jax.Array, slot_mapping: jax.Array, *, implementation: str = "xla"
) -> jax.Array:
    """Writes each token's key and value to its slot; in place when the caller's jit donates `pool`.

    Args:
        pool: [num_pages, 2, K, page_size, D], as `pool_spec` describes it.
        k: [T, K, D], float32, bfloat16 or float16: what the pool holds.
        v: [T, K, D], of k's dtype.
        slot_mapping: int32 [T], page * page_size + offset; slots of page 0 for padding tokens. A slot outside the pool
            writes nothing.
        implementation: a name that `choose` returned.

    Returns:
        The updated pool.

    Raises:
        ValueError: a shape or dtype does not fit, or the implementation is unknown.
    """
    chosen = _implementation(implementation)
    _check_pool(pool, "k", k)
    _check("k", k, (k.shape[0], pool.shape[2], pool.shape[4]))
    _check("v", v, k.shape, k.dtype)
    _check("slot_mapping", slot_mapping, k.shape[:1], jnp.int32)
    return chosen.kv_write(pool, k, v, slot_mapping)


def paged_attention(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    query_start_loc: jax.Array,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """Causal attention of R packed sequences over their pages.

    Row r owns tokens query_start_loc[r] to query_start_loc[r + 1], the last ones of its kv_lens[r] positions; each
    attends to the positions up to its own. Keys and values of this step's tokens must already be in the pool. What the
    pool holds elsewhere, and page table entries past a row's length, have no influence, NaN and out-of-range included.

    Args:
        q: [T, K, G, D], G query heads for each of K key-value heads; float32, bfloat16 or float16: what the pool holds.
        pool: [num_pages, 2, K, page_size, D], as `pool_spec` describes it.
        page_table: int32 [R, max_pages], the pages of each row in order.
        kv_lens: int32 [R], each row's length, this step's tokens included; 0 for an empty row.
        query_start_loc: int32 [R + 1], from 0, never falling; an empty row owns no tokens.
        scale: multiplies the scores.
        sliding_window: positions a token attends to, itself included; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for no cap.
        implementation: a name that `choose` returned.

    Returns:
        [T, K, G, D] in q's dtype; zeros for the tokens past query_start_loc[R].

    Raises:
        ValueError: a shape, dtype or setting does not fit, or the implementation is unknown.
    """
    chosen = _implementation(implementation)
    spec = AttentionSpec(scale, sliding_window, soft_cap)
    _check_pool(pool, "q", q)
    _check("q", q, (q.shape[0], pool.shape[2], *q.shape[2:3], pool.shape[4]))
    if min(q.shape) < 1:
        raise ValueError(f"q has shape {list(q.shape)}; every size must be at least 1")
    limit = chosen.max_group_heads
    if limit is not None and q.shape[2] > limit:
        raise ValueError(f"q has {q.shape[2]} query heads a key-value head; {implementation!r} takes at most {limit}")
    _check("page_table", page_table, (kv_lens.shape[0], *page_table.shape[1:2]), jnp.int32)
    if min(page_table.shape) < 1:
        raise ValueError(f"page_table has shape {list(page_table.shape)}; every size must be at least 1")
    _check("kv_lens", kv_lens, kv_lens.shape[:1], jnp.int32)
    _check("query_start_loc", query_start_loc, (kv_lens.shape[0] + 1,), jnp.int32)
    return chosen.attention(q, pool, page_table, kv_lens, query_start_loc, spec)


def _implementation(name: str) -> Implementation:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {name!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name]


def _check(name: str, array: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike | None = None) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {list(array.shape)}; it must be {list(shape)}")
    if dtype is not None and array.dtype != dtype:
        raise ValueError(f"{name} has dtype {array.dtype.name}; it must be {jnp.dtype(dtype).name}")


def _check_pool(pool: jax.Array, name: str, tokens: jax.Array) -> None:
    """Checks the pool's shape, and that it holds the dtype of `tokens`."""
    if pool.ndim != 5 or pool.shape[1] != 2:
        raise ValueError(f"pool has shape {list(pool.shape)}; it must be [num_pages, 2, kv_heads, page_size, head_dim]")
    check_page_size(pool.shape[3])
    bits = pool.dtype == jnp.uint16 and tokens.dtype in (jnp.bfloat16, jnp.float16)
    if pool.dtype != tokens.dtype and not bits:
        raise ValueError(f"{name} has dtype {tokens.dtype.name}; the pool holds {pool.dtype.name}")
    if not jnp.issubdtype(tokens.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {tokens.dtype.name}; it must be a floating-point dtype")
