"""The page pool of one layer: its shape, and the dtype that holds it.

A pool is [num_pages, 2, K, page_size, D]: for each page, keys then values, head-major, so that one head's positions lie
side by side. Page 0 is the null page: padding tokens write to it and nothing that reads it depends on what it holds.
"""

import jax
import jax.numpy as jnp

PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

# Element types of keys and values.
DTYPES = ("float32", "bfloat16", "float16")

# Slots are int32.
MAX_SLOTS = 2**31 - 1


def storage_dtype(dtype: jax.typing.DTypeLike, platform: str) -> jnp.dtype:
    """Returns the dtype that holds `dtype` in a pool on `platform`.

    Before jax 0.11, XLA's CPU backend updates a bfloat16 or float16 array by converting all of it to float32 and back,
    donated or not. The bits are held as uint16 there, and reinterpreted when they are read and written.

    Raises:
        ValueError: `dtype` is none of `DTYPES`.
    """
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"dtype is {dtype.name}; it must be one of {', '.join(DTYPES)}")
    held_as_bits = platform == "cpu" and dtype.itemsize == 2 and jax.__version_info__ < (0, 11)
    return jnp.dtype(jnp.uint16) if held_as_bits else dtype


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
        dtype: element type of keys and values: float32, bfloat16 or float16.
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
