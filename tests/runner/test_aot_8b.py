"""Two layers with the widths of configs/llama.gin, compiled for an H200."""

from __future__ import annotations

import dataclasses
import math

import pytest

from jaxserve.config import gin_config
from jaxserve.pallas_kernels.paged_attention.triton.backend import DEPRECATION
from jaxserve.planning.reports.compile_report import Compiler
from jaxserve.planning.reports.inspection import ProgramReport
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs.compiler import fresh_compilations
from jaxserve.programs.step_programs import ProgramKey
from jaxserve.programs.target_devices import Target, load_target, target_mesh

pytestmark = pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:DeprecationWarning")

LAYERS = 2
CONTEXT = 1024
ATTENTION = {
    "decode": {"paged_attention_decode", "paged_attention_combine"},
    "forward": {"paged_attention_decode", "paged_attention_combine", "paged_attention_prefill"},
}


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("h200")


def compiled(target: Target, key: ProgramKey, num_pages: int, *overrides: str) -> tuple[ProgramReport, int, int]:
    """What the compiler tells of a program, with the elements and bytes of one layer's pool."""
    more = [f"ModelConfig.num_hidden_layers={LAYERS}", "EngineConfig.load_format='dummy'", *overrides]
    engine = gin_config.load("llama.gin", more)[0].engine
    shapes = dataclasses.replace(resolve_shapes(engine, target.platform), num_pages=num_pages)
    model = shapes.model
    assert (model.hidden_size, model.intermediate_size, model.vocab_size) == (4096, 14336, 128256)
    assert (model.num_attention_heads, model.num_key_value_heads, model.head_dim) == (32, 8, 128)
    assert shapes.attention == "triton"
    with fresh_compilations():
        _, inspected = Compiler(shapes, target_mesh(target), target, CONTEXT).compile(key, bundle=False)
    elements = math.prod((num_pages, 2, model.num_key_value_heads, shapes.page_size, model.head_dim))
    return inspected.report, elements, elements * (1 if shapes.kv_cache_dtype == "float8_e4m3fn" else 2)


def assert_promises(report: ProgramReport, target: Target, pool_bytes: int, write: bool) -> None:
    kernels = {kernel.name: kernel for kernel in report.kernels if kernel.pallas}
    expected = ATTENTION[report.kind] | ({"rotate_and_write"} if write else set())
    assert expected <= set(kernels)
    for kernel in kernels.values():
        assert kernel.launches == LAYERS, kernel
        assert kernel.registers, kernel
    for kernel in report.kernels:
        if kernel.registers is not None:
            assert (kernel.spill_store_bytes, kernel.spill_load_bytes) == (0, 0), kernel
        assert kernel.shared_memory_bytes <= target.shared_memory_per_block, kernel
    assert (report.command_buffers, report.outside_command_buffers) == (1, 0)
    assert report.pool_bytes == LAYERS * pool_bytes
    assert report.alias_bytes == report.donated_bytes >= report.pool_bytes
    assert report.pool_copies == 0
    assert report.temp_bytes < pool_bytes
    assert report.triton_matmuls == 0
    # Query, output, gate-up and down projections of each layer.
    assert report.library_calls["kCublasLtMatmul"] >= 4 * LAYERS
    assert report.problems(target) == []


@pytest.mark.parametrize("key", [ProgramKey("decode", 64), ProgramKey("forward", 512)], ids=lambda key: key.kind)
def test_a_step_with_pages_of_the_models_dtype(target: Target, key: ProgramKey):
    report, _, pool_bytes = compiled(target, key, 14_000)
    assert_promises(report, target, pool_bytes, write=True)


@pytest.mark.long  # the kernels alone are compiled in tests/kernels/test_cascade_h200.py
def test_a_decode_step_that_reads_shared_pages_once(target: Target):
    """Finding the rows that share pages is a part of the graph, once for all layers, and takes next to no memory."""
    cascade = "EngineConfig.cascade_attention"
    one, other = (compiled(target, ProgramKey("decode", 64), 14_000, f"{cascade}='{way}'") for way in ("on", "off"))
    assert_promises(one[0], target, one[2], write=True)
    launches, before = (sum(kernel.launches for kernel in report.kernels) for report in (one[0], other[0]))
    assert before < launches <= before + 12
    assert one[0].temp_bytes <= other[0].temp_bytes + 2**20


def test_a_decode_step_with_pages_of_one_byte_past_two_to_the_31(target: Target):
    """Where the backend's offsets of bytes would overflow: pages are read in pairs of elements, and XLA writes them."""
    key = ProgramKey("decode", 64)
    report, elements, pool_bytes = compiled(target, key, 28_000, "CacheConfig.kv_cache_dtype='fp8'")
    assert 2**31 < elements == pool_bytes <= 2**32
    assert_promises(report, target, pool_bytes, write=False)
