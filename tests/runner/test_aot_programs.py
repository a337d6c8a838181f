"""Reading programs that were compiled for an H200, with kernels and programs that fall short among them."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models.config import ModelConfig
from jaxserve.pallas_kernels.paged_attention.triton.backend import DEPRECATION, pl, triton
from jaxserve.planning.reports import cubin, thunks
from jaxserve.planning.reports.compile_report import Compiler
from jaxserve.planning.reports.container import UnreadableError, contents, snappy
from jaxserve.planning.reports.inspection import Inspected, triton_matmuls
from jaxserve.planning.reports.traffic import pool_copies, program_traffic
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs.aot import hlo, plugin
from jaxserve.programs.compiler import compiler_options, fresh_compilations
from jaxserve.programs.state_programs import mask_words
from jaxserve.programs.step_programs import MASK_WRITE, OPTION_WRITE, TABLE_WRITE, ProgramKey
from jaxserve.programs.target_devices import Target, load_target, target_mesh

pytestmark = pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:DeprecationWarning")

MODEL = ModelConfig("LlamaForCausalLM", 4096, 512, 1024, 2, 8, 2, 64, 2048, dtype="bfloat16")
CONFIG = EngineConfig(
    architecture=MODEL,
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=64),
    cache=CacheConfig(num_pages=4096),
    token_buckets=(64,),
    row_buckets=(64,),
)


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("h200")


@pytest.fixture(scope="module")
def mesh(target: Target) -> Mesh:
    return target_mesh(target)


def compile_for(mesh: Mesh, dump: pathlib.Path, function: Any, *shapes: Any, **options: Any) -> jax.stages.Compiled:
    """The function compiled for the mesh's device, with the compiler's dump in `dump`."""
    replicated = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=replicated) for shape, dtype in shapes]
    donated = options.pop("donate", ())
    with fresh_compilations(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
        return lowered.compile(compiler_options("gpu") | {"xla_dump_to": str(dump)} | options)


def serialized(compiled: Any) -> bytes:
    return compiled.runtime_executable().serialize()


def product(size: int, name: str) -> Any:
    """A kernel that keeps a [size, size] result in the registers of one warp."""

    def kernel(a_ref: Any, b_ref: Any, out_ref: Any) -> None:
        def add(step: jax.Array, total: jax.Array) -> jax.Array:
            return total + triton.dot(a_ref[:, pl.ds(step * 32, 32)], b_ref[pl.ds(step * 32, 32), :])

        out_ref[...] = jax.lax.fori_loop(0, 4, add, jnp.zeros((size, size), jnp.float32))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((size, size), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
        name=name,
    )


@pytest.fixture(scope="module")
def kernels(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> tuple[jax.stages.Compiled, pathlib.Path]:
    def both(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
        return product(128, "spilling")(a, b), product(16, "frugal")(c, d)

    shapes = [((128, 128), jnp.bfloat16)] * 2 + [((16, 128), jnp.bfloat16), ((128, 16), jnp.bfloat16)]
    dump = tmp_path_factory.mktemp("dump")
    return compile_for(mesh, dump, both, *shapes), dump


def test_spills_and_registers_are_read_from_the_executable(kernels):
    compiled, _ = kernels
    found = {kernel.name: kernel for kernel in cubin.kernels(contents(serialized(compiled)))}
    assert set(found) == {"spilling", "frugal"}
    assert found["spilling"].spill_store_bytes > 1000 < found["spilling"].spill_load_bytes
    assert found["frugal"].spill_store_bytes == found["frugal"].spill_load_bytes == 0
    assert 16 <= found["frugal"].registers <= 255


def test_they_are_what_the_assembler_says(kernels, tmp_path):
    """jax 0.10 dumps the assembler's input; later ones do not, and the test above has to do."""
    compiled, dump = kernels
    toolkit = plugin.toolkit_directory()
    sources = [path for path in dump.glob("*.ptx") if ".entry" in path.read_text()]
    assert len(sources) == (2 if jax.__version_info__ < (0, 11) else 0)
    found = {kernel.name: kernel for kernel in cubin.kernels(contents(serialized(compiled)))}
    for source in sources:
        command = [f"{toolkit}/bin/ptxas", "-v", "-arch=sm_90a", str(source), "-o", str(tmp_path / "out")]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        name = re.search(r"Function properties for (\w+)", told)
        stored, loaded = re.findall(r"(\d+) bytes spill", told)
        registers = re.search(r"Used (\d+) registers", told)
        assert name is not None
        assert registers is not None
        kernel = found[name[1]]
        assert (kernel.registers, kernel.spill_store_bytes, kernel.spill_load_bytes) == (
            int(registers[1]),
            int(stored),
            int(loaded),
        )


def test_a_damaged_executable_is_no_empty_one(kernels):
    data = serialized(kernels[0])
    with pytest.raises(UnreadableError):
        contents(data[: len(data) // 2])


def test_snappy():
    assert snappy(bytes([10, 0b000_0000, 97, 0b000_101_01, 1])) == b"a" * 10  # a copy of what it writes itself
    assert snappy(bytes([3, 2 << 2]) + b"abc") == b"abc"
    for damaged in (bytes([3, 2 << 2]) + b"ab", bytes([9, 0, 97, 0b000_101_01]), bytes([6, 0, 97, 0b000_001_01, 2])):
        with pytest.raises(UnreadableError):
            snappy(damaged)


@pytest.fixture(scope="module")
def step(mesh: Mesh, target: Target) -> Inspected:
    shapes = dataclasses.replace(resolve_shapes(CONFIG, "gpu"), num_pages=4096)
    with fresh_compilations():
        _, inspected = Compiler(shapes, mesh, target, context=1024).compile(ProgramKey("decode", 64), bundle=False)
    return inspected


def test_a_decode_step_keeps_its_promises(step, target):
    report = step.report
    assert report.problems(target) == []
    assert report.command_buffers == 1
    assert report.outside_command_buffers == 0
    assert report.alias_bytes == report.donated_bytes > report.pool_bytes == 2 * 4096 * 2 * 2 * 16 * 64 * 2
    assert report.pool_copies == 0
    assert 0 < report.temp_bytes < report.pool_bytes
    kernels = {kernel.name: kernel for kernel in report.kernels if kernel.pallas}
    assert kernels["paged_attention_decode"].launches == MODEL.num_hidden_layers
    assert all(kernel.registers and not kernel.spill_store_bytes for kernel in kernels.values())
    # Query, output, gate-up and down projections of both layers.
    assert report.library_calls["kCublasLtMatmul"] == 4 * MODEL.num_hidden_layers


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
@pytest.mark.parametrize("kind", ["swap_in", "swap_out", "page_copy"])
def test_swaps_move_their_pages_alone(kind, dtype, mesh, target):
    cache = CacheConfig(num_pages=4096, kv_cache_dtype=dtype, swap_space=1.0)
    shapes = dataclasses.replace(resolve_shapes(dataclasses.replace(CONFIG, cache=cache), "gpu"), num_pages=4096)
    with fresh_compilations():
        _, inspected = Compiler(shapes, mesh, target).compile(ProgramKey(kind, 16), bundle=False)
    report = inspected.report
    assert report.problems(target) == []
    assert report.pool_copies == 0
    pages = 16 * report.pool_bytes // 4096
    assert report.temp_bytes < 1000 + (pages if kind == "page_copy" else 0)
    assert pages <= report.bytes_read < report.pool_bytes
    assert pages <= report.bytes_written < 1.1 * pages * (2 if kind == "page_copy" else 1)
    assert (report.alias_bytes >= report.pool_bytes) == (kind != "swap_out")


@pytest.mark.parametrize(
    "key",
    [
        TABLE_WRITE,
        OPTION_WRITE,
        MASK_WRITE,
        ProgramKey("penalty_write", 512),
        ProgramKey("sample", 8),
        ProgramKey("score", 64),
    ],
    ids=lambda key: key.kind,
)
def test_what_a_step_needs_beside_its_forward_program_touches_no_pool(key, mesh, target):
    shapes = dataclasses.replace(resolve_shapes(CONFIG, "gpu"), num_pages=4096, num_penalty_rows=47)
    with fresh_compilations():
        _, inspected = Compiler(shapes, mesh, target).compile(key, bundle=False)
    report = inspected.report
    assert report.problems(target) == []
    assert (report.pool_bytes, report.pool_copies) == (0, 0)
    assert report.alias_bytes == report.donated_bytes
    assert (report.donated_bytes > 0) == (key.kind != "score")  # which only reads
    assert all(kernel.spill_store_bytes == kernel.spill_load_bytes == 0 for kernel in report.kernels)
    for leaf, dtype in ((shapes.model.vocab_size, "u16"), (mask_words(shapes.model.vocab_size), "u32")):
        assert pool_copies(inspected.module, hlo.ArrayShape(dtype, (47, leaf))) == []


def test_every_broken_promise_is_named(step, target):
    report = step.report
    kernel = dataclasses.replace(report.kernels[0], name="k", spill_store_bytes=8, shared_memory_bytes=10**6)
    broken = dataclasses.replace(
        report,
        kernels=(kernel,),
        triton_matmuls=2,
        command_buffers=2,
        outside_command_buffers=1,
        alias_bytes=0,
        pool_copies=3,
    )
    lines = "\n".join(broken.problems(target))
    for expected in (
        "decode 64: kernel k spills: 8 bytes stored",
        "kernel k takes 1000000 bytes of shared memory; a block has 232448",
        "2 matrix products are Triton kernels",
        "2 command buffers, 1 launches in none",
        "0 bytes are aliased",
        "3 instructions copy a page pool",
    ):
        assert expected in lines


def test_what_is_not_known_is_a_problem(step, target):
    """A kernel of ours without machine code, and operations without a rate, must not pass for nothing."""
    ours = next(kernel for kernel in step.report.kernels if kernel.pallas)
    for field in ("registers", "spill_store_bytes", "spill_load_bytes"):
        kernel = dataclasses.replace(ours, name="k", **{field: None})
        (line,) = dataclasses.replace(step.report, kernels=(kernel,)).problems(target)
        assert line.startswith("decode 64: machine code of kernel k was not found")
    brought = dataclasses.replace(kernel, pallas=False)
    assert dataclasses.replace(step.report, kernels=(brought,)).problems(target) == []
    slower = dataclasses.replace(target, peak_flops={"int8": 1e15})
    (line,) = step.report.problems(slower)
    assert line.startswith("decode 64: target h200 has no rate of bfloat16; roofline_seconds leaves ")


def test_bytes_and_flops_of_a_decode_step(step):
    """Weights, keys and values are all but a few percent of what it moves; the sum can be made by hand."""
    report, model = step.report, MODEL
    matrices = (
        model.num_hidden_layers
        * model.hidden_size
        * (
            model.head_dim * (2 * model.num_attention_heads + 2 * model.num_key_value_heads)
            + 3 * model.intermediate_size
        )
    )
    pages = 2 * model.num_hidden_layers * 64 * 1024 * model.num_key_value_heads * model.head_dim
    least = 2 * (matrices + pages)
    assert least < report.bytes_read < 1.15 * least
    attention = 4 * 64 * 1024 * model.num_attention_heads * model.head_dim * model.num_hidden_layers
    assert report.flops == {"bfloat16": 2 * 64 * matrices + attention}
    assert report.roofline_seconds == pytest.approx((report.bytes_read + report.bytes_written) / 4.8e12)


def test_traffic_counts_what_is_touched(mesh, tmp_path):
    def touch(table: jax.Array, rows: jax.Array, pool: jax.Array, update: jax.Array, at: jax.Array) -> tuple:
        return table[rows], jax.lax.dynamic_update_slice(pool, update, (at, 0))

    compiled = compile_for(
        mesh,
        tmp_path,
        touch,
        ((10_000, 256), jnp.float32),
        ((8,), jnp.int32),
        ((5_000, 256), jnp.float32),
        ((2, 256), jnp.float32),
        ((), jnp.int32),
        donate=2,
    )
    traffic = program_traffic(hlo.parse(compiled.as_text() or ""), lambda *_: None)
    assert traffic.written == (8 + 2) * 256 * 4
    assert (8 + 2) * 256 * 4 < traffic.read < (8 + 2) * 256 * 4 + 100  # and the few indices


def test_a_kernel_that_updates_in_place_writes_no_more_than_it_is_given(mesh, tmp_path):
    def kernel(update_ref: Any, _: Any, out_ref: Any, pool_ref: Any) -> None:
        out_ref[...] = update_ref[:8]
        pool_ref[:8] = update_ref[8:]

    def update(update: jax.Array, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        return pl.pallas_call(
            kernel,
            out_shape=(jax.ShapeDtypeStruct((8, 64), jnp.float32), jax.ShapeDtypeStruct(pool.shape, pool.dtype)),
            input_output_aliases={1: 1},
            compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
            name="update",
        )(update, pool)

    shapes = (((16, 64), jnp.float32), ((4096, 64), jnp.float32))
    module = hlo.parse(compile_for(mesh, tmp_path, update, *shapes, donate=1).as_text() or "")
    traffic = program_traffic(module, lambda *_: None)
    assert (traffic.read, traffic.written) == (16 * 64 * 4, 16 * 64 * 4)
    assert pool_copies(module, hlo.ArrayShape("f32", (4096, 64))) == []


def test_copies_of_a_pool_are_found(mesh, tmp_path):
    pool, token = ((512, 2, 2, 16, 64), jnp.bfloat16), ((2, 2, 64), jnp.bfloat16)

    def in_place(pool: jax.Array, token: jax.Array, page: jax.Array) -> jax.Array:
        return pool.at[page, :, :, 3].set(token)

    def copied(pool: jax.Array, token: jax.Array, page: jax.Array) -> tuple[jax.Array, jax.Array]:
        return in_place(pool, token, page), pool * 2

    def reshaped(pool: jax.Array, token: jax.Array, page: jax.Array) -> tuple[jax.Array, jax.Array]:
        return in_place(pool, token, page), jnp.tanh(pool.reshape(-1, 64))

    def in_pairs(pool: jax.Array, token: jax.Array, page: jax.Array) -> tuple[jax.Array, jax.Array]:
        pairs = jax.lax.bitcast_convert_type(pool.reshape(*pool.shape[:-1], 32, 2), jnp.uint32)
        return in_place(pool, token, page), pairs ^ 1

    for function, expected in ((in_place, 0), (copied, 1), (reshaped, 1), (in_pairs, 1)):
        compiled = compile_for(mesh, tmp_path, function, pool, token, ((), jnp.int32), donate=0)
        found = pool_copies(hlo.parse(compiled.as_text() or ""), hlo.ArrayShape("bf16", pool[0]))
        assert min(1, len(found)) == expected, found


def test_untuned_matmuls_are_found(mesh, tmp_path):
    shapes = (((64, 1024), jnp.bfloat16), ((1024, 1024), jnp.bfloat16))
    for enabled in (False, True):
        compiled = compile_for(mesh, tmp_path, jnp.matmul, *shapes, xla_gpu_enable_triton_gemm=enabled)
        assert triton_matmuls(hlo.parse(compiled.as_text() or "")) == enabled


def test_launches_outside_a_command_buffer_are_found(mesh, tmp_path):
    def steps(x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = jnp.tanh(jnp.sort(x) @ x)
        return x

    for option, buffers in (({}, 1), ({"xla_gpu_enable_command_buffer": ""}, 0)):
        dump = tmp_path / str(buffers)
        compile_for(mesh, dump, steps, ((128, 128), jnp.float32), **option)
        found = thunks.read(dump)
        assert found.command_buffers == buffers
        assert (found.outside > 0) == (not buffers)
        assert sum(found.launches.values()) > 3


def test_texts_without_a_program_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no thunk sequence"):
        thunks.read(tmp_path)
    with pytest.raises(ValueError, match="is empty or in a format that is not known"):
        thunks.parse("nothing here")
    with pytest.raises(ValueError, match="has no ENTRY computation"):
        hlo.parse("HloModule nothing")
