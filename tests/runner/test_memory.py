"""The plan of a device's memory: every byte has a place, and pages are sized from what the compiler says."""

from __future__ import annotations

import dataclasses
import os
import types
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import abstract_params, make_mesh
from jaxserve.planning import memory_plan as memory
from jaxserve.planning.memory_plan import MARGIN_BYTES, DeviceMemory, MemoryPlanner, local_memory
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs.compiler import ProgramMemory, compile_program, fresh_compilations, program_memory
from jaxserve.programs.program_needs import ProgramNeeds, compiled_needs, largest_keys
from jaxserve.programs.step_programs import ProgramKey, Shapes, program_keys

MODEL = ModelConfig("LlamaForCausalLM", 96, 32, 48, 2, 4, 2, 32, 256, tie_word_embeddings=True)
CONFIG = EngineConfig(
    architecture=MODEL,
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
    token_buckets=(8, 32),
)
PAGE = 2 * MODEL.num_key_value_heads * 16 * MODEL.head_dim * 4 * MODEL.num_hidden_layers
NOTHING = ProgramNeeds(0, 0)
PLENTY = DeviceMemory(10**12, 10**12)
GPU: Any = types.SimpleNamespace(size=1, devices=np.array([types.SimpleNamespace(platform="gpu")]))


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    return resolve_shapes(CONFIG, "cpu")


@pytest.fixture(scope="module")
def compiled(shapes) -> dict[ProgramKey, ProgramMemory]:
    with fresh_compilations():  # a program from jax's cache serializes to less
        return {key: program_memory(compile_program(key, shapes, make_mesh())) for key in program_keys(shapes)}


def not_asked() -> ProgramNeeds:
    raise AssertionError("an explicit size needs no compilation")


def test_explicit_sizes_need_no_compilation(shapes):
    mesh = make_mesh()
    assert MemoryPlanner(shapes, CacheConfig(num_pages=7), mesh, PLENTY).pool(not_asked).num_pages == 7
    ten = CacheConfig(kv_cache_memory_bytes=10 * PAGE + 1)
    assert MemoryPlanner(shapes, ten, mesh, PLENTY).pool(not_asked).num_pages == 10
    most = 8 * 256 // 16 + 1
    assert (
        MemoryPlanner(shapes, CacheConfig(kv_cache_memory_bytes=10**9), mesh, PLENTY).pool(not_asked).num_pages == most
    )
    with pytest.raises(ValueError, match="page pool has room for 1 pages"):
        MemoryPlanner(shapes, CacheConfig(kv_cache_memory_bytes=PAGE), mesh, PLENTY).pool(not_asked)


def test_the_pool_takes_what_the_rest_leaves(shapes, compiled):
    mesh, needs = make_mesh(), ProgramNeeds.of(compiled.values())
    weights = sum(4 * int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(MODEL, "float32", mesh)))
    bare = MemoryPlanner(shapes, CacheConfig(), mesh, PLENTY).plan(2, needs)
    assert (bare.page, bare.weights) == (PAGE, weights)
    assert bare.programs.temporaries >= max(program.temporaries for program in compiled.values()) > 0
    assert bare.fixed == weights + bare.state + needs.temporaries + needs.code
    for room in (20, 21):
        limit = bare.fixed + MARGIN_BYTES + room * PAGE
        for spare in (0, PAGE - 1):
            plan = MemoryPlanner(shapes, CacheConfig(), mesh, DeviceMemory(10**12, limit + spare)).pool(lambda: needs)
            assert plan.num_pages == room
            assert plan.parts()["unused"] == spare
    with pytest.raises(ValueError, match="page pool has room for 1 pages"):
        short = DeviceMemory(10**12, bare.fixed + MARGIN_BYTES + 2 * PAGE - 1)
        MemoryPlanner(shapes, CacheConfig(), mesh, short).pool(lambda: needs)


def test_the_largest_programs_stand_for_all(shapes, compiled):
    keys = largest_keys(shapes)
    assert {key.kind for key in keys} == {key.kind for key in compiled}
    assert all(other.size <= key.size for key in keys for other in compiled if other.kind == key.kind)
    all_of_them = ProgramNeeds.of(compiled.values())
    from_largest = ProgramNeeds.from_largest({key: compiled[key] for key in keys}, shapes)
    assert from_largest.temporaries == all_of_them.temporaries
    assert from_largest.code >= all_of_them.code
    with fresh_compilations():
        needs = compiled_needs(shapes, make_mesh())
    assert needs.code == pytest.approx(from_largest.code, rel=0.01)
    assert dataclasses.replace(needs, code=from_largest.code) == from_largest, (
        "the size of the pool changes no temporary"
    )


@pytest.mark.parametrize("cache", [CacheConfig(), CacheConfig(num_pages=9), CacheConfig(gpu_memory_utilization=0.3)])
def test_the_parts_sum_to_the_device(shapes, cache):
    device = DeviceMemory.share(10**9 + 7, cache.gpu_memory_utilization)
    plan = MemoryPlanner(shapes, cache, make_mesh(), device).pool(lambda: ProgramNeeds(12_345, 678))
    parts = plan.parts()
    assert sum(parts.values()) == 10**9 + 7
    assert min(parts.values()) >= 0
    assert parts["pages"] == PAGE * plan.num_pages


def test_a_pool_that_cannot_fit_is_refused_before_compiling(shapes):
    mesh = make_mesh()
    small = DeviceMemory(2_000_000, 1_000_000)
    with pytest.raises(ValueError, match=r"page pool of 100000 pages has \d+ bytes; .* exceeds the 1000000 bytes"):
        MemoryPlanner(shapes, CacheConfig(num_pages=100_000), mesh, small).pool(not_asked)
    plan = MemoryPlanner(shapes, CacheConfig(), mesh, PLENTY).plan(64, ProgramNeeds(1000, 10))
    dataclasses.replace(plan, device=DeviceMemory(10**12, plan.total)).check()
    for use in (lambda plan: plan.check(), lambda plan: plan.parts()):
        with pytest.raises(ValueError, match="lower num_pages or kv_cache_memory_bytes"):
            use(dataclasses.replace(plan, device=DeviceMemory(10**12, plan.total - 1)))


def test_an_explicit_size_may_take_of_the_margin(shapes):
    plan = MemoryPlanner(shapes, CacheConfig(), make_mesh(), PLENTY).plan(64, ProgramNeeds(1000, 10))
    for left in (0, 1, MARGIN_BYTES - 1, MARGIN_BYTES, MARGIN_BYTES + 5):
        tight = dataclasses.replace(plan, device=DeviceMemory(10**12, plan.total + left))
        parts = tight.parts()
        assert (parts["margin"], parts["unused"]) == (min(left, MARGIN_BYTES), max(0, left - MARGIN_BYTES))
        assert sum(parts.values()) == 10**12


def test_device_memory_is_checked():
    assert DeviceMemory.share(1001, 0.5) == DeviceMemory(1001, 500)
    with pytest.raises(ValueError, match="memory limit is 11 bytes; it must be from 0 to the device's 10"):
        DeviceMemory(10, 11)


def test_a_pool_that_no_longer_fits_when_the_programs_are_there(shapes, monkeypatch):
    planner = MemoryPlanner(shapes, CacheConfig(), make_mesh(), PLENTY)
    plan = planner.plan(64, ProgramNeeds(1000, 10**9))
    needed = plan.state + 1000 + 64 * PAGE
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    planner.check_available(plan)
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=rf"exceeds the {needed - 1} bytes that are available beside"):
        planner.check_available(plan)
    dataclasses.replace(planner, mesh=GPU).check_available(plan)


def test_swapped_pages_are_host_memory(shapes, monkeypatch):
    """They are part of a CPU's memory; of a GPU's those on their way, and the host must have room for all."""
    swapping = dataclasses.replace(shapes, num_host_pages=10**6)
    on_cpu = MemoryPlanner(swapping, CacheConfig(), make_mesh(), dataclasses.replace(PLENTY, host=True))
    on_gpu = dataclasses.replace(on_cpu, device=PLENTY)
    cpu, gpu = (planner.plan(64, NOTHING) for planner in (on_cpu, on_gpu))
    assert cpu.parts()["swapped pages"] == 10**6 * PAGE
    assert gpu.parts()["swapped pages"] == memory.TRANSIT_BYTES // PAGE * PAGE < 10**6 * PAGE
    for plan in (cpu, gpu):
        assert sum(plan.parts().values()) == 10**12
        bare = MemoryPlanner(shapes, CacheConfig(), make_mesh(), plan.device).plan(64, NOTHING)
        assert "swapped pages" not in bare.parts()
        assert plan.room == bare.room - plan.swapped // PAGE
    with pytest.raises(ValueError, match=r"for steps and swapped pages .* lower swap_space, num_pages or"):
        dataclasses.replace(cpu, device=DeviceMemory(10**12, 10**9, host=True)).check()
    few = DeviceMemory(10**12, MARGIN_BYTES + 10**6 * PAGE, host=True)
    with pytest.raises(ValueError, match="or lower swap_space or max_num_batched_tokens"):
        MemoryPlanner(swapping, CacheConfig(), make_mesh(), few).pool(lambda: NOTHING)
    monkeypatch.setattr(memory, "available_memory", lambda: 10**6 * PAGE)
    with pytest.raises(ValueError, match="lower swap_space, num_pages, kv_cache_memory_bytes or"):
        on_cpu.check_available(cpu)
    dataclasses.replace(on_gpu, mesh=GPU).check_available(gpu)
    monkeypatch.setattr(memory, "available_memory", lambda: 10**6 * PAGE - 1)
    with pytest.raises(ValueError, match=rf"swap_space takes {10**6 * PAGE} bytes for 1000000 pages.*lower it"):
        dataclasses.replace(on_gpu, mesh=GPU).check_available(gpu)


def test_memory_of_this_machine(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert local_memory(make_mesh(), 0.25) == DeviceMemory(1000, 250, host=True)
    gpu = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 900})
    mesh = types.SimpleNamespace(devices=np.array([gpu]))
    assert local_memory(mesh, 0.25) == DeviceMemory(900, 900), "the allocator was given its share at start"


def test_jax_is_asked_for_the_share_of_a_gpu(monkeypatch):
    before = jax.config.jax_pjrt_client_create_options
    monkeypatch.setattr(os, "environ", {})
    try:
        memory.claim_memory(CacheConfig(gpu_memory_utilization=0.5, swap_space=50))
        assert jax.config.jax_pjrt_client_create_options == {"memory_fraction": 0.5}
        assert os.environ == {}
        memory.claim_memory(CacheConfig(swap_space=99.5))
        assert os.environ == {"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "108"}
    finally:
        jax.config.update("jax_pjrt_client_create_options", before)


def test_a_pool_that_the_kernels_cannot_address_is_made_smaller_or_refused(shapes, monkeypatch):
    """A stand-in for the Triton kernels' limit: pools of 100 to 199 pages cannot be addressed."""

    def check(pool, num_tokens, group_heads):
        assert (num_tokens, group_heads) == (32, MODEL.group_size)
        if 100 <= pool.shape[0] < 200:
            raise ValueError(f"pool has {pool.shape[0]} pages; take at most 99, or at least 200")

    limited = dataclasses.replace(memory.IMPLEMENTATIONS[shapes.attention], check=check)
    monkeypatch.setattr(memory, "IMPLEMENTATIONS", {shapes.attention: limited})
    mesh = make_mesh()
    shapes = dataclasses.replace(shapes, num_slots=64)
    for room, num_pages in ((99, 99), (100, 99), (101, 99), (150, 99), (199, 99), (200, 200), (201, 201)):
        cache = CacheConfig(kv_cache_memory_bytes=room * PAGE)
        assert MemoryPlanner(shapes, cache, mesh, PLENTY).pool(not_asked).num_pages == num_pages
    with pytest.raises(ValueError, match="pool has 150 pages; take at most 99, or at least 200"):
        MemoryPlanner(shapes, CacheConfig(num_pages=150), mesh, PLENTY).pool(not_asked)
