"""The grouped product compiled for an H200: no spills, and no more shared memory than a block has."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.models.layer_specs import MLPSpec, RouterSpec
from jaxserve.models.layers.experts import Experts
from jaxserve.models.params import products_for
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


def test_each_device_of_a_mesh_multiplies_its_part_of_every_expert() -> None:
    """A layer of experts on two devices: halves of the hidden layers, and one sum over the devices."""
    mesh = target_mesh(load_target("h200"), 2)
    products = products_for("bfloat16", mesh, experts=True)
    spec = MLPSpec(768, kind="experts", router=RouterSpec(16, 4))
    abstract = nnx.eval_shape(lambda: Experts(spec, 512, jnp.dtype("bfloat16"), products, nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    flat: Any = nnx.to_flat_state(state)
    placed = []
    for path, leaf in flat:
        sharding = NamedSharding(mesh, leaf.get_metadata("spec").partition)
        placed.append((path, leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))))
    x = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    with fresh_compilations(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        forward = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
        text = forward.lower(nnx.from_flat_state(placed), x).compile(compiler_options("gpu")).as_text()
    assert text is not None
    calls = [line for line in text.splitlines() if "custom-call" in line and "grouped_matmul" in line]
    assert len(calls) == 3
    assert sum("bf16[16,384,512]" in line for line in calls) == 2, "gate and up"
    assert sum("bf16[16,512,384]" in line for line in calls) == 1, "down"
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 1
