"""The grouped product compiled for an H200: no spills, and no more shared memory than a block has."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.pallas_kernels.grouped_matmul import grouped_matmul, triton
from jaxserve.pallas_kernels.paged_attention.triton.backend import DEPRECATION
from jaxserve.planning.reports import cubin, thunks
from jaxserve.planning.reports.container import contents
from jaxserve.programs.compiler import compiler_options, fresh_compilations
from jaxserve.programs.target_devices import load_target, target_mesh

pytestmark = pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:DeprecationWarning")

# Rows, experts, columns, length of the contracted axis; of models that are served.
SHAPES = {
    "Qwen3-30B-A3B, 64 rows decode": (512, 128, 768, 2048),
    "Mixtral, prefill": (4096, 8, 14336, 4096),
    "gpt-oss, whose width no tile divides": (256, 32, 2880, 2880),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SHAPES)
def test_no_spills_and_no_more_shared_memory_than_a_block_has(name: str, dtype: str, tmp_path: pathlib.Path) -> None:
    rows, experts, columns, length = SHAPES[name]
    target = load_target("h200")
    mesh = target_mesh(target)
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = [((rows, length), dtype), ((experts, columns, length), dtype), ((experts + 1,), "int32")]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=sharding) for shape, kind in arguments]

    def step(x: jax.Array, weights: jax.Array, offsets: jax.Array) -> jax.Array:
        return grouped_matmul(x, weights, offsets, implementation="triton", dtype=dtype)

    with fresh_compilations(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(step).lower(*shapes).compile(compiler_options("gpu") | {"xla_dump_to": str(tmp_path)})
    executable: Any = program.runtime_executable()
    codes = {code.name: code for code in cubin.kernels(contents(executable.serialize()))}
    launches = {launch.name: launch for launch in thunks.read(tmp_path).launches}
    code, launch = codes["grouped_matmul"], launches["grouped_matmul"]
    assert (code.spill_store_bytes, code.spill_load_bytes) == (0, 0)
    assert 16 <= code.registers <= 255
    assert launch.shared_memory_bytes + code.static_shared_memory_bytes <= target.shared_memory_per_block
    assert launch.threads[0] == 32 * triton.choose_tile(rows, experts, dtype).num_warps
    # Beside the operands a program holds the result before rows of no expert are zeroed, and the plan.
    memory: Any = program.memory_analysis()
    assert memory.temp_size_in_bytes < 2 * rows * columns * jnp.dtype(dtype).itemsize + 2**20
