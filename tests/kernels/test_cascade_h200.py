"""Decode attention with several rows in a work item, compiled for an H200: what it takes, and that no row can tell."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec
from jaxserve.pallas_kernels.paged_attention.triton import tuning
from jaxserve.pallas_kernels.paged_attention.triton.attention import paged_attention
from jaxserve.pallas_kernels.paged_attention.triton.backend import DEPRECATION
from jaxserve.pallas_kernels.paged_attention.triton.decode import MIN_TILE_ROWS
from jaxserve.planning.reports import cubin, thunks
from jaxserve.planning.reports.container import contents
from jaxserve.programs.compiler import compiler_options, fresh_compilations
from jaxserve.programs.target_devices import Target, load_target, target_mesh

pytestmark = pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:DeprecationWarning")

ROWS, KV_HEADS, HEAD_DIM, PAGES, MAX_PAGES, PAGE_SIZE = 64, 8, 128, 1009, 512, 64
ARITHMETIC = re.compile(
    r"^\s*(?:@\S+ )?((?:wgmma|mma|fma|add|sub|mul|div|max|min|neg|ex2|rcp|cvt|shfl)\.[\w.:]*(?:f32|f16|b32)[\w.:]*)",
    re.MULTILINE,
)
"""Instructions of PTX that compute with floating-point numbers, or move them between threads."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode step of Llama-3.1's attention; `together` rows of an item at most."""

    group_heads: int
    together: int
    pool_dtype: str = "bfloat16"
    sliding_window: int | None = None


@dataclasses.dataclass(frozen=True)
class Code:
    """What the decode kernel became: registers, spilled bytes, bytes of shared memory, and its arithmetic in order."""

    registers: int
    spilled: int
    shared: int
    arithmetic: tuple[str, ...]


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("h200")


@pytest.fixture(scope="module")
def mesh(target: Target) -> Mesh:
    return target_mesh(target)


def compiled(case: Case, target: Target, mesh: Mesh, dump: pathlib.Path) -> Code:
    config = tuning.lookup(target.device_kind, "decode", "bfloat16", case.pool_dtype, HEAD_DIM)
    config = dataclasses.replace(config, together=case.together)
    spec = AttentionSpec(HEAD_DIM**-0.5, case.sliding_window)

    def step(
        q: jax.Array, pool: jax.Array, table: jax.Array, lengths: jax.Array, starts: jax.Array, *scales: jax.Array
    ):
        k_scale, v_scale = scales or (None, None)
        return paged_attention(
            q, pool, table, lengths, starts, spec, k_scale, v_scale, decode_only=True, decode_config=config
        )

    arguments = [
        ((ROWS, KV_HEADS, case.group_heads, HEAD_DIM), "bfloat16"),
        ((PAGES, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM), case.pool_dtype),
        ((ROWS, MAX_PAGES), "int32"),
        ((ROWS,), "int32"),
        ((ROWS + 1,), "int32"),
        *([((KV_HEADS,), "float32")] * 2 * (case.pool_dtype != "bfloat16")),
    ]
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding) for shape, dtype in arguments]
    with fresh_compilations(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(step).lower(*shapes).compile(compiler_options("gpu") | {"xla_dump_to": str(dump)})
    executable: Any = program.runtime_executable()
    code = next(one for one in cubin.kernels(contents(executable.serialize())) if one.name == "paged_attention_decode")
    launch = next(one for one in thunks.read(dump).launches if one.name == "paged_attention_decode")
    texts = (path.read_text(encoding="utf-8") for path in dump.glob("*.ptx"))
    found = (re.search(r"\.entry paged_attention_decode.*?(?=\.entry|\Z)", text, re.DOTALL) for text in texts)
    body = next(one[0] for one in found if one is not None)
    return Code(
        code.registers,
        code.spill_store_bytes + code.spill_load_bytes,
        launch.shared_memory_bytes + code.static_shared_memory_bytes,
        tuple(ARITHMETIC.findall(body)),
    )


@pytest.mark.parametrize(
    "case",
    [Case(4, 4), Case(8, 2, "float8_e4m3fn", sliding_window=4096)],
    ids=str,
)
def test_rows_in_the_tile_of_one_row_take_the_same_arithmetic(
    case: Case, target: Target, mesh: Mesh, tmp_path: pathlib.Path
):
    """A tile has MIN_TILE_ROWS rows whether one row of a step fills a part of it or several fill it: instruction for
    instruction the same sums, so a row's bits are the same, and the same shared memory."""
    assert case.group_heads * case.together == MIN_TILE_ROWS
    several = compiled(case, target, mesh, tmp_path / "several")
    one = compiled(dataclasses.replace(case, together=1), target, mesh, tmp_path / "one")
    assert len(one.arithmetic) > 50
    assert any(name.startswith("mma.") for name in one.arithmetic)
    assert several.arithmetic == one.arithmetic
    assert several.spilled == one.spilled == 0
    assert several.shared == one.shared <= target.shared_memory_per_block
    assert several.registers <= 128
    # The assembler fuses no product with a sum whose rounding is spelled out, here or there.
    assert not [name for name in one.arithmetic if re.fullmatch(r"(add|sub|mul)\.f32", name)]


def test_taller_tiles_fit_but_multiply_in_another_way(target: Target, mesh: Mesh, tmp_path: pathlib.Path):
    """64 rows are multiplied by instructions of four warps, whose bits nobody promises to be those of one warp's."""
    tall = compiled(Case(4, 16), target, mesh, tmp_path)
    assert tall.spilled == 0
    assert tall.shared <= target.shared_memory_per_block
    assert any(name.startswith("wgmma.") for name in tall.arithmetic)
    assert not any(name.startswith("mma.") for name in tall.arithmetic)
