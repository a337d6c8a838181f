"""The page pool of one layer: its shape, and the dtype that holds it.

A pool is [num_pages, 2, K, page_size, D]: for each page, keys then values, head-major, so that one head's positions lie
side by side. Page 0 is the null page: padding tokens write to it and nothing that reads it depends on what it holds.
"""

import jax
import jax.numpy as jnp

PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

# Element types of keys and values: stored as they are computed, or quantized with a scale a head.
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
QUANTISED_DTYPES = ("float8_e4m3fn", "int8")
DTYPES = FLOAT_DTYPES + QUANTISED_DTYPES

# Slots are int32.
MAX_SLOTS = 2**31 - 1

# The integers that hold the bits of a dtype, each standing for one dtype only, so that a pool tells what it holds.
_BITS = {"bfloat16": jnp.dtype(jnp.uint16), "float16": jnp.dtype(jnp.int16), "float8_e4m3fn": jnp.dtype(jnp.uint8)}
_VALUES = {bits: jnp.dtype(name) for name, bits in _BITS.items()}


def storage_dtype(dtype: jax.typing.DTypeLike, platform: str) -> jnp.dtype:
    """Returns the dtype that holds `dtype` in a pool on `platform`; `value_dtype` is its inverse.

    XLA's CPU backend updates an array of a narrow floating-point dtype by converting all of it to a wider one and back,
    donated or not: float8_e4m3fn always, bfloat16 and float16 before jax 0.11. The bits are held as integers there, and
    reinterpreted when they are read and written.

    Raises:
        ValueError: `dtype` is none of `DTYPES`.
    """
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"dtype is {dtype.name}; it must be one of {', '.join(DTYPES)}")
    held_as_bits = platform == "cpu" and (dtype.itemsize == 1 or jax.__version_info__ < (0, 11))
    return _BITS.get(dtype.name, dtype) if held_as_bits else dtype


def value_dtype(storage: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the dtype of the numbers in a pool whose array has the dtype `storage`.

    Raises:
        ValueError: no pool has this dtype.
    """
    storage = jnp.dtype(storage)
    dtype = _VALUES.get(storage, storage)
    if dtype.name not in DTYPES:
        raise ValueError(f"pool has dtype {storage.name}; it must hold one of {', '.join(DTYPES)}")
    return dtype


def is_quantized(storage: jax.typing.DTypeLike) -> bool:
    """Whether a pool of this dtype holds numbers that a scale multiplies."""
    return value_dtype(storage).name in QUANTISED_DTYPES


def largest(dtype: jax.typing.DTypeLike) -> float:
    """The greatest magnitude that a quantized pool stores: 448 (float8_e4m3fn) or 127 (int8, which leaves out -128)."""
    dtype = value_dtype(dtype)
    return 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)


def pool_spec(
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    *,
    platform: str | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> jax.ShapeDtypeStruct:
    """Describes one layer's pool.

    Args:
        num_pages: pages, the null page included; at least 2.
        num_kv_heads: K.
        page_size: positions a page, one of `PAGE_SIZES`.
        head_dim: D.
        dtype: element type of keys and values, one of `DTYPES`.
        platform: "cpu", "gpu", ...; None for JAX's default.
        sharding: where the pool lies; None for the default device.

    Returns:
        Shape [num_pages, 2, K, page_size, D] and the storage dtype (see `storage_dtype`).

    Raises:
        ValueError: a size is out of range or `dtype` is not supported.
    """
    for name, value, least in (
        ("num_pages", num_pages, 2),
        ("num_kv_heads", num_kv_heads, 1),
        ("head_dim", head_dim, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    check_page_size(page_size)
    if num_pages * page_size > MAX_SLOTS:
        raise ValueError(f"num_pages * page_size is {num_pages * page_size}; it must be at most {MAX_SLOTS}")
    shape = (num_pages, 2, num_kv_heads, page_size, head_dim)
    return jax.ShapeDtypeStruct(shape, storage_dtype(dtype, platform or jax.default_backend()), sharding=sharding)


def new_pool(
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    *,
    platform: str | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> jax.Array:
    """Allocates the pool that `pool_spec` describes, filled with zeros. Raises what `pool_spec` raises."""
    spec = pool_spec(num_pages, num_kv_heads, page_size, head_dim, dtype, platform=platform, sharding=sharding)
    return jnp.zeros(spec.shape, spec.dtype, device=sharding)


def check_page_size(page_size: int) -> None:
    """Raises ValueError unless `page_size` is one of `PAGE_SIZES`."""
    if page_size not in PAGE_SIZES:
        raise ValueError(f"page_size is {page_size}; it must be one of {', '.join(map(str, PAGE_SIZES))}")
