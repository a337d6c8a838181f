"""Paged attention compiled for an H200, with every configuration that the tuning table ships for it."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.pallas_kernels.paged_attention import is_quantized, kv_write, paged_attention
from jaxserve.pallas_kernels.paged_attention.triton import tuning
from jaxserve.pallas_kernels.paged_attention.triton.backend import DEPRECATION
from jaxserve.planning.reports import cubin, thunks
from jaxserve.planning.reports.container import contents
from jaxserve.programs.compiler import compiler_options, fresh_compilations
from jaxserve.programs.target_devices import Target, load_target, target_mesh

pytestmark = pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:DeprecationWarning")

TOKENS, ROWS, KV_HEADS, PAGES, MAX_PAGES = 256, 64, 2, 1009, 2048
KERNELS = {
    "paged_attention_prefill": "prefill",
    "paged_attention_decode": "decode",
    "paged_attention_combine": None,
    "kv_write": "kv_write",
}
"""Names of the kernels in a program, and in the table; that of `combine` stands in none."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a mixed step. plain: without sliding window, soft cap and sinks."""

    dtype: str
    pool_dtype: str
    head_dim: int
    page_size: int = 64
    group_heads: int = 4
    plain: bool = False

    @property
    def pool(self) -> tuple[int, ...]:
        return PAGES, 2, KV_HEADS, self.page_size, self.head_dim

    @property
    def quantized(self) -> bool:
        return is_quantized(self.pool_dtype)

    def __str__(self) -> str:
        shape = f"D{self.head_dim}-P{self.page_size}-G{self.group_heads}"
        return f"{self.dtype}-{self.pool_dtype}-{shape}{'-plain' if self.plain else ''}"


CASES = (
    # What each entry of the table serves.
    Case("bfloat16", "bfloat16", 64, group_heads=16),
    Case("bfloat16", "bfloat16", 128, plain=True),
    Case("bfloat16", "bfloat16", 256, page_size=16),
    Case("bfloat16", "float8_e4m3fn", 128, plain=True),
    Case("bfloat16", "float8_e4m3fn", 256),
    Case("bfloat16", "int8", 128),
    Case("bfloat16", "int8", 256, page_size=128),
    Case("float32", "float32", 128),
    Case("float32", "float8_e4m3fn", 128),
    Case("float32", "int8", 128, plain=True),
    Case("float32", "bfloat16", 128, plain=True),
    Case("float32", "float16", 128),
    Case("bfloat16", "float32", 256),
    # Head sizes, pages, groups and dtypes that share an entry with one above.
    Case("bfloat16", "bfloat16", 80, page_size=16, plain=True),
    Case("bfloat16", "bfloat16", 128, page_size=16, group_heads=1),
    Case("bfloat16", "bfloat16", 128, page_size=128, group_heads=16),
    Case("float16", "float16", 96, page_size=128, group_heads=1),
    Case("float16", "float16", 256, group_heads=1, plain=True),
    Case("float16", "float32", 256, plain=True),
    Case("float16", "bfloat16", 128),
    Case("bfloat16", "float8_e4m3fn", 64, page_size=16, group_heads=16),
    Case("float16", "int8", 96, group_heads=1, plain=True),
    Case("float32", "float32", 256, page_size=16, group_heads=1, plain=True),
    Case("float32", "float32", 64, page_size=128, group_heads=16),
    Case("float32", "bfloat16", 256, page_size=16, group_heads=16),
    Case("float32", "float16", 64, page_size=128, group_heads=1),
)


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("h200")


@pytest.fixture(scope="module")
def mesh(target: Target) -> Mesh:
    return target_mesh(target)


def compiled(case: Case, mesh: Mesh, dump: pathlib.Path) -> jax.stages.Compiled:
    """Keys and values written, then attention over rows with one token and with more; XLA's dump in `dump`."""
    sharding = NamedSharding(mesh, PartitionSpec())
    options: dict[str, Any] = {"scale": case.head_dim**-0.5}
    named: dict[str, tuple[tuple[int, ...], str]] = {}
    if case.quantized:
        named |= dict.fromkeys(("k_scale", "v_scale"), ((KV_HEADS,), "float32"))
    if not case.plain:
        options |= {"sliding_window": 1000, "soft_cap": 30.0}
        named["sinks"] = ((KV_HEADS, case.group_heads), "float32")

    def step(pool: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, *rest: jax.Array) -> Any:
        q, page_table, kv_lens, query_start_loc = rest[:4]
        more = dict(zip(named, rest[4:], strict=True))
        scales = {name: more[name] for name in more if name != "sinks"}
        pool = kv_write(pool, k, v, slots, implementation="triton", **scales)
        attend = functools.partial(paged_attention, implementation="triton", **options)
        return pool, attend(q, pool, page_table, kv_lens, query_start_loc, **more)

    k = (TOKENS, KV_HEADS, case.head_dim), case.dtype
    arguments = [
        (case.pool, case.pool_dtype),
        k,
        k,
        ((TOKENS,), "int32"),
        ((TOKENS, KV_HEADS, case.group_heads, case.head_dim), case.dtype),
        ((ROWS, MAX_PAGES), "int32"),
        ((ROWS,), "int32"),
        ((ROWS + 1,), "int32"),
        *named.values(),
    ]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding) for shape, dtype in arguments]
    with fresh_compilations(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(*shapes)
        return lowered.compile(compiler_options("gpu") | {"xla_dump_to": str(dump)})


def chosen(case: Case, target: Target, kernel: str) -> Any:
    """The configuration that the table gives this case."""
    return tuning.lookup(target.device_kind, kernel, case.dtype, case.pool_dtype, case.head_dim)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_spills_and_no_more_shared_memory_than_a_block_has(
    case: Case, mesh: Mesh, target: Target, tmp_path: pathlib.Path
):
    program = compiled(case, mesh, tmp_path)
    executable: Any = program.runtime_executable()
    codes = {code.name: code for code in cubin.kernels(contents(executable.serialize()))}
    launches = {launch.name: launch for launch in thunks.read(tmp_path).launches}
    for name, kernel in KERNELS.items():
        assert name in codes, f"{name} is not among {sorted(codes)}"
        code, launch = codes[name], launches[name]
        assert (code.spill_store_bytes, code.spill_load_bytes) == (0, 0), name
        assert 16 <= code.registers <= 255, name
        assert launch.shared_memory_bytes + code.static_shared_memory_bytes <= target.shared_memory_per_block, name
        if kernel is not None:
            assert launch.threads[0] == 32 * chosen(case, target, kernel).num_warps, name
    memory: Any = program.memory_analysis()
    assert memory.alias_size_in_bytes == math.prod(case.pool) * jnp.dtype(case.pool_dtype).itemsize


def test_every_entry_of_the_table_has_a_case(target: Target):
    """By identity: equal configurations of two entries are two objects, which `lookup` and this get from one cache."""
    reached = {id(chosen(case, target, kernel)) for case in CASES for kernel in tuning.KERNELS}
    missed = [
        entry
        for entry, config in tuning.load(tuning.TABLE)
        if tuning.serves(entry["device"], target.device_kind) and id(config) not in reached
    ]
    assert not missed, "entries that no case reaches; add one to CASES, or they can never be chosen"
