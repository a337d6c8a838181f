"""The KV write compiled for an H200, with the configurations that the tuning table ships."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.pallas_kernels.paged_attention import is_quantized, kv_write, rotate_and_write
from jaxserve.pallas_kernels.paged_attention.triton.backend import DEPRECATION
from jaxserve.planning.reports import cubin
from jaxserve.planning.reports.container import contents
from jaxserve.programs.compiler import compiler_options, fresh_compilations
from jaxserve.programs.target_devices import load_target, target_mesh

pytestmark = pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:DeprecationWarning")

PAGES = 1009  # prime, so that nothing else has a pool's number of elements


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return target_mesh(load_target("h200"))


def compiled(mesh: Mesh, function: Any, pool: tuple[int, ...], pool_dtype: str, *arguments: Any) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec())
    scale = (pool[2:3], "float32")
    scales = [scale, scale] if is_quantized(pool_dtype) else []

    def call(pool: jax.Array, *rest: jax.Array) -> Any:
        given = dict(zip(("k_scale", "v_scale"), rest[len(arguments) :], strict=False))
        return function(pool, *rest[: len(arguments)], **given)

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
        for shape, dtype in [(pool, pool_dtype), *arguments, *scales]
    ]
    with fresh_compilations(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(call, donate_argnums=0).lower(*shapes).compile(compiler_options=compiler_options("gpu"))


def assert_in_place_without_spills(program: Any, pool: tuple[int, ...], pool_dtype: str, name: str) -> None:
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == math.prod(pool) * jnp.dtype(pool_dtype).itemsize
    assert memory.temp_size_in_bytes < 1024
    found = [
        operation
        for sizes, operation in re.findall(r" = \(?\w+\[([\d,]+)\]\S* ([\w-]+)\(", program.as_text())
        if math.prod(int(size) for size in sizes.split(",")) == math.prod(pool)
    ]
    assert "parameter" in found, "the pattern must find the pool"
    assert set(found) <= {"parameter", "get-tuple-element", "custom-call"}
    (kernel,) = cubin.kernels(contents(program.runtime_executable().serialize()))
    assert kernel.name == name
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0


@pytest.mark.parametrize(
    ("head_dim", "group_heads", "kv_heads", "page_size", "product", "dtype", "pool_dtype"),
    [
        (128, 4, 8, 64, "bfloat16", "bfloat16", "bfloat16"),
        (128, 4, 8, 16, "bfloat16", "bfloat16", "float8_e4m3fn"),
        (256, 16, 1, 32, "bfloat16", "bfloat16", "int8"),
        (64, 8, 8, 16, "float16", "float16", "float16"),
        (80, 1, 32, 128, "float32", "bfloat16", "bfloat16"),
        (96, 16, 2, 16, "float32", "float32", "float32"),
    ],
)
def test_the_fused_write(
    head_dim: int,
    group_heads: int,
    kv_heads: int,
    page_size: int,
    product: str,
    dtype: str,
    pool_dtype: str,
    mesh: Mesh,
):
    tokens = 64
    pool = (PAGES, 2, kv_heads, page_size, head_dim)

    def run(pool: jax.Array, qkv: jax.Array, cos: jax.Array, sin: jax.Array, slots: jax.Array, **scales: Any) -> Any:
        q, pool = rotate_and_write(qkv, cos, sin, pool, slots, dtype=dtype, implementation="triton", **scales)
        return pool, q

    angles = ((tokens, head_dim // 2), "float32")
    qkv = ((tokens, kv_heads, group_heads + 2, head_dim), product)
    program = compiled(mesh, run, pool, pool_dtype, qkv, angles, angles, ((tokens,), "int32"))
    assert_in_place_without_spills(program, pool, pool_dtype, "rotate_and_write")


def test_the_plain_write(mesh: Mesh):
    pool = (PAGES, 2, 8, 16, 128)
    k = ((64, 8, 128), "bfloat16")
    write = functools.partial(kv_write, implementation="triton")
    program = compiled(mesh, write, pool, "float8_e4m3fn", k, k, ((64,), "int32"))
    assert_in_place_without_spills(program, pool, "float8_e4m3fn", "kv_write")
