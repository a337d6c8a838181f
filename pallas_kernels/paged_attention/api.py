"""Paged attention and the KV write behind one seam: checked arguments, implementations by name.

An implementation is one entry of `IMPLEMENTATIONS`. The engine calls `choose` once at start and passes the name on.
Letters in shapes: T tokens of a step, R rows (sequences) of a step, K key-value heads, G query heads a key-value head,
D head dimension.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention import reference, xla, xla_plan
from jaxserve.pallas_kernels.paged_attention.cpu import attend_plan
from jaxserve.pallas_kernels.paged_attention.cpu import attention_calls as cpu
from jaxserve.pallas_kernels.paged_attention.pool import FLOAT_DTYPES, check_page_size, is_quantized, value_dtype
from jaxserve.pallas_kernels.paged_attention.rotary import split_and_rotate
from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec, Use
from jaxserve.pallas_kernels.paged_attention.triton import attention as triton
from jaxserve.pallas_kernels.paged_attention.triton import kv_write as triton_write
from jaxserve.pallas_kernels.paged_attention.triton import limits


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute attention over pages.

    Attributes:
        attention: (q, pool, page_table, kv_lens, query_start_loc, spec, k_scale, v_scale, sinks, decode_only, cascade)
            -> out, as `paged_attention` describes them.
        kv_write: (pool, k, v, slot_mapping, k_scale, v_scale) -> pool, as `kv_write` describes them.
        rotate_and_write: (qkv, cos, sin, pool, slot_mapping, dtype, k_scale, v_scale) -> (q, pool), as
            `rotate_and_write` describes them; None to rotate first and call `kv_write`.
        platforms: platforms it runs on; empty for all.
        max_group_heads: the most query heads a key-value head; None for no limit.
        decode_programs: whether a step of decodes alone gains from a program of its own (`decode_only`).
        cascades: whether rows that share pages can read them together.
        check: (pool, num_tokens, group_heads) raises ValueError where the backend cannot take a pool like
            `pool` (an array or a ShapeDtypeStruct) with `num_tokens` tokens a step; group_heads is None when nothing
            but keys and values is known. None for no limits of its own.
        check_usable: raises ValueError where it does not serve a model, or does not work on this machine; "auto" then
            passes it over, as it does where nothing is known of the model. None where the platform says enough.
        shared_read_counts: returns how often rows were decided by cost to read shared pages together, or not, since the
            process began; None where cost decides nothing, or nobody counts.
    """

    attention: Callable[..., jax.Array]
    kv_write: Callable[..., jax.Array]
    rotate_and_write: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    platforms: tuple[str, ...] = ()
    max_group_heads: int | None = None
    decode_programs: bool = False
    cascades: bool = False
    check: Callable[[Any, int, int | None], None] | None = None
    check_usable: Callable[[Use], None] | None = None
    shared_read_counts: Callable[[], dict[str, int]] | None = None


CASCADE = ("auto", "on", "off")

# In order of preference: `choose` takes the first that runs on the platform.
IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "triton": Implementation(
            triton.paged_attention,
            triton_write.kv_write,
            triton_write.rotate_and_write,
            platforms=("gpu",),
            max_group_heads=limits.MAX_GROUP_HEADS,
            decode_programs=True,
            cascades=True,
            check=limits.check,
        ),
        "cpu": Implementation(
            cpu.PAIRED.paged_attention,
            cpu.PAIRED.kv_write,
            cpu.PAIRED.rotate_and_write,
            platforms=("cpu",),
            cascades=True,
            check=cpu.PAIRED.check,
            check_usable=cpu.PAIRED.check_usable,
            shared_read_counts=attend_plan.shared_read_counts,
        ),
        "cpu_float32": Implementation(
            cpu.SINGLE.paged_attention,
            cpu.SINGLE.kv_write,
            cpu.SINGLE.rotate_and_write,
            platforms=("cpu",),
            cascades=True,
            check=cpu.SINGLE.check,
            check_usable=cpu.SINGLE.check_usable,
            shared_read_counts=attend_plan.shared_read_counts,
        ),
        "xla": Implementation(xla.paged_attention, xla.kv_write, max_group_heads=xla_plan.MAX_DOT_ROWS),
        "reference": Implementation(reference.paged_attention, reference.kv_write),
        # The kernels of "triton" in Pallas' interpret mode: their values, on any platform, slowly.
        "triton_interpret": Implementation(
            functools.partial(triton.paged_attention, interpret=True),
            functools.partial(triton_write.kv_write, interpret=True),
            functools.partial(triton_write.rotate_and_write, interpret=True),
            max_group_heads=limits.MAX_GROUP_HEADS,
            decode_programs=True,
            cascades=True,
        ),
    }
)


def choose(platform: str, requested: str = "auto", use: Use | None = None) -> str:
    """Names the implementation for `platform` ("cpu", "gpu", ...).

    Args:
        platform: what `jax.Device.platform` says.
        requested: a name in `IMPLEMENTATIONS`, or "auto" for the preferred one.
        use: the model that it is to serve; None where that is not known.

    Raises:
        ValueError: `requested` is unknown, does not run on `platform` or does not serve `use`.
    """
    if requested == "auto":
        return next(name for name, one in IMPLEMENTATIONS.items() if _is_usable(one, platform, use))
    chosen = _implementation(requested)
    if chosen.platforms and platform not in chosen.platforms:
        names = ", ".join(chosen.platforms)
        raise ValueError(f"implementation {requested!r} runs on {names}; the platform is {platform!r}")
    if chosen.check_usable is not None and use is not None:
        chosen.check_usable(use)
    return requested


def _is_usable(one: Implementation, platform: str, use: Use | None) -> bool:
    if one.platforms and platform not in one.platforms:
        return False
    if one.check_usable is None:
        return True
    if use is None:
        return False
    try:
        one.check_usable(use)
    except ValueError:
        return False
    return True


def kv_write(
    pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """Writes each token's key and value to its slot, cast to the pool's dtype.

    In place when the caller's jit donates `pool`.

    Args:
        pool: [num_pages, 2, K, page_size, D], as `pool_spec` describes it.
        k: [T, K, D], float32, bfloat16 or float16.
        v: [T, K, D], of k's dtype.
        slot_mapping: int32 [T], page * page_size + offset; slots of page 0 for padding tokens. What page 0 then holds
            is undefined. A slot outside the pool writes nothing. No slot of another page may appear twice.
        k_scale: float32 [K], positive, with a quantized pool and only there. It then stores k * (1 / k_scale), rounded
            to the nearest (ties to even) and saturated at 448 (float8_e4m3fn) or 127 (int8) in magnitude.
        v_scale: float32 [K], the same for values.
        implementation: a name that `choose` returned.

    Returns:
        The updated pool.

    Raises:
        ValueError: a shape or dtype does not fit, the implementation is unknown or cannot take these.
    """
    chosen = _implementation(implementation)
    _check_pool(pool, k_scale, v_scale)
    _check_float("k", k.dtype)
    _check("k", k, (k.shape[0], pool.shape[2], pool.shape[4]))
    _check("v", v, k.shape, k.dtype)
    _check("slot_mapping", slot_mapping, k.shape[:1], jnp.int32)
    if chosen.check is not None:
        chosen.check(pool, k.shape[0], None)
    return chosen.kv_write(pool, k, v, slot_mapping, k_scale, v_scale)


def rotate_and_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    pool: jax.Array,
    slot_mapping: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    implementation: str = "xla",
) -> tuple[jax.Array, jax.Array]:
    """Rotates queries and keys by their positions and writes keys and values to their slots.

    Rotary embedding as `rotary.rotate` computes it, in float32, rounded once to `dtype`. Keys and values are cast to
    `dtype`, and then written as `kv_write` does.

    Args:
        qkv: [T, K, G + 2, D], float32 or `dtype`: for each key-value head its queries, its key, its value.
        cos: float32 [T, D / 2], cosines of the angles of each token.
        sin: float32 [T, D / 2].
        pool: [num_pages, 2, K, page_size, D], as `pool_spec` describes it; updated in place when it is donated.
        slot_mapping: int32 [T], as `kv_write` takes it.
        dtype: of queries, keys and values: float32, bfloat16 or float16.
        k_scale: float32 [K] or None, as `kv_write` takes it.
        v_scale: float32 [K] or None.
        implementation: a name that `choose` returned.

    Returns:
        (q [T, K, G, D] in `dtype`, the updated pool).

    Raises:
        ValueError: a shape or dtype does not fit, the implementation is unknown or cannot take these.
    """
    chosen = _implementation(implementation)
    dtype = jnp.dtype(dtype)
    _check_pool(pool, k_scale, v_scale)
    if dtype.name not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype.name}; it must be one of {', '.join(FLOAT_DTYPES)}")
    _check("qkv", qkv, (qkv.shape[0], pool.shape[2], *qkv.shape[2:3], pool.shape[4]))
    if qkv.dtype not in (jnp.float32, dtype):
        raise ValueError(f"qkv has dtype {qkv.dtype.name}; it must be float32 or dtype, which is {dtype.name}")
    num_tokens, _, heads, head_dim = qkv.shape
    if heads < 3:
        raise ValueError(f"qkv has {heads} heads a key-value head; it must have at least 3: queries, key and value")
    if head_dim % 2:
        raise ValueError(f"qkv has head dimension {head_dim}; it must be even to be rotated")
    for name, array in (("cos", cos), ("sin", sin)):
        _check(name, array, (num_tokens, head_dim // 2), jnp.float32)
    _check("slot_mapping", slot_mapping, (num_tokens,), jnp.int32)
    if chosen.check is not None:
        chosen.check(pool, num_tokens, heads - 2)
    if chosen.rotate_and_write is not None:
        return chosen.rotate_and_write(qkv, cos, sin, pool, slot_mapping, dtype, k_scale, v_scale)
    q, k, v = split_and_rotate(qkv, cos, sin, dtype)
    return q, chosen.kv_write(pool, k, v, slot_mapping, k_scale, v_scale)


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
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    sinks: jax.Array | None = None,
    decode_only: bool = False,
    cascade: str = "auto",
    implementation: str = "xla",
) -> jax.Array:
    """Causal attention of R packed sequences over their pages.

    Row r owns tokens query_start_loc[r] to query_start_loc[r + 1], the last ones of its kv_lens[r] positions; each
    attends to the positions up to its own. Keys and values of this step's tokens must already be in the pool. What the
    pool holds elsewhere (before the window of a row's first token too), and page table entries of pages that lie wholly
    there, have no influence, NaN and out-of-range included.

    With queries of 16 bits over a pool of float32 the Triton kernels round keys and values to q's dtype, while "xla"
    and "reference" compute in float32.

    Args:
        q: [T, K, G, D], float32, bfloat16 or float16.
        pool: [num_pages, 2, K, page_size, D], as `pool_spec` describes it.
        page_table: int32 [R, max_pages], the pages of each row in order.
        kv_lens: int32 [R], each row's length, this step's tokens included; 0 for an empty row.
        query_start_loc: int32 [R + 1], from 0, never falling; an empty row owns no tokens.
        scale: multiplies the scores.
        sliding_window: positions a token attends to, itself included; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for no cap.
        k_scale: float32 [K], multiplies the stored keys; with a quantized pool and only there.
        v_scale: float32 [K], multiplies the stored values; likewise.
        sinks: float32 [K, G], one more score for each query head that joins the softmax's denominator and has no value
            (attention sinks as in gpt-oss; -inf has no effect); neither scaled nor capped. None for none.
        decode_only: the caller promises that every row has at most one token and that row r's is token r. Only time
            depends on it: the result is the same to the bit.
        cascade: whether rows with one token that share pages read these together: "off", "on", or "auto" where that was
            measured to be faster; no effect where the implementation does not cascade. Only time depends on it: the
            result is the same to the bit.
        implementation: a name that `choose` returned.

    Returns:
        [T, K, G, D] in q's dtype; zeros for the tokens past query_start_loc[R].

    Raises:
        ValueError: a shape, dtype or setting does not fit, the implementation is unknown or cannot take these.
    """
    chosen = _implementation(implementation)
    spec = AttentionSpec(scale, sliding_window, soft_cap)
    if cascade not in CASCADE:
        raise ValueError(f"cascade is {cascade!r}; it must be one of {', '.join(CASCADE)}")
    _check_pool(pool, k_scale, v_scale)
    _check_float("q", q.dtype)
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
    if sinks is not None:
        _check("sinks", sinks, q.shape[1:3], jnp.float32)
    if chosen.check is not None:
        chosen.check(pool, q.shape[0], q.shape[2])
    return chosen.attention(
        q, pool, page_table, kv_lens, query_start_loc, spec, k_scale, v_scale, sinks, decode_only, cascade
    )


def _implementation(name: str) -> Implementation:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {name!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name]


def _check(name: str, array: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike | None = None) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {list(array.shape)}; it must be {list(shape)}")
    if dtype is not None and array.dtype != dtype:
        raise ValueError(f"{name} has dtype {array.dtype.name}; it must be {jnp.dtype(dtype).name}")


def _check_float(name: str, dtype: jnp.dtype) -> None:
    if dtype.name not in FLOAT_DTYPES:
        raise ValueError(f"{name} has dtype {dtype.name}; it must be one of {', '.join(FLOAT_DTYPES)}")


def _check_pool(pool: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None) -> None:
    """Checks the pool's shape and dtype, and that there are scales exactly where it is quantized."""
    if pool.ndim != 5 or pool.shape[1] != 2:
        raise ValueError(f"pool has shape {list(pool.shape)}; it must be [num_pages, 2, kv_heads, page_size, head_dim]")
    check_page_size(pool.shape[3])
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != is_quantized(pool.dtype):
            held = value_dtype(pool.dtype).name
            need = "it must be float32 [kv_heads]" if scale is None else "only a quantized pool takes one"
            raise ValueError(f"{name} is {'None' if scale is None else 'given'} for a pool of {held}; {need}")
        if scale is not None:
            _check(name, scale, (pool.shape[2],), jnp.float32)
