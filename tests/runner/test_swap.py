"""Pages of sequences go to host memory and come back: the same bits elsewhere, in the order of the plan."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.kv_cache.page_pool import PageCopy, PageState
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import make_mesh
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs.compiler import CompilationCounter, compile_program, program_memory
from jaxserve.programs.step_programs import PAGE_COPY, ProgramKey, Shapes, abstract_pools, program_keys
from jaxserve.programs.swap_programs import SWAP_SIZES, copy_blocks, swap_blocks
from jaxserve.request import EngineRequest
from jaxserve.runner import host_pages
from jaxserve.runner import swap_timing as costs
from jaxserve.runner.fake import FakeRunner
from jaxserve.runner.host_pages import HostPages
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.scheduler.plan import NO_DECODES, PageTableWrite, RowPlan, Samples, StepPlan, table_writes
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from tests.scheduler.drive import dispatch

MODEL = ModelConfig("LlamaForCausalLM", 96, 32, 48, 2, 4, 2, 32, 256, tie_word_embeddings=True)
PAGE_BYTES = 2 * MODEL.num_key_value_heads * 16 * MODEL.head_dim * 4 * MODEL.num_hidden_layers
CONFIG = EngineConfig(
    architecture=MODEL,
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
    cache=CacheConfig(num_pages=48, swap_space=21 * PAGE_BYTES / 2**30),
    token_buckets=(32,),
    row_buckets=(8,),
    compilation_cache_dir=None,  # a program that was loaded has lost its text
    seed=3,
)
FLOOR = dataclasses.replace(CONFIG.cache, swap_space=22 * PAGE_BYTES / 2**30 - 1e-9)


def swap_out(pages: Sequence[int], host: Sequence[int]) -> tuple[PageCopy, ...]:
    return tuple(PageCopy(page, PageState.ACTIVE, to, PageState.HOST) for page, to in zip(pages, host, strict=True))


def swap_in(host: Sequence[int], pages: Sequence[int]) -> tuple[PageCopy, ...]:
    return tuple(PageCopy(page, PageState.HOST, to, PageState.ACTIVE) for page, to in zip(host, pages, strict=True))


def fork(pages: Sequence[int], others: Sequence[int]) -> tuple[PageCopy, ...]:
    return tuple(PageCopy(page, PageState.ACTIVE, to, PageState.ACTIVE) for page, to in zip(pages, others, strict=True))


def bits(pools: Sequence[jax.Array]) -> np.ndarray:
    """uint8 [pages, layers, bytes of a page of one]."""
    return np.stack([np.asarray(pool).view(np.uint8).reshape(len(pool), -1) for pool in pools], axis=1)


def random_pools(shapes: Shapes, seed: int = 0) -> list[jax.Array]:
    """Pools of random bits: every kind of NaN among them."""
    rng = np.random.default_rng(seed)
    made = []
    for pool in abstract_pools(shapes, make_mesh()):
        content = rng.integers(0, 256, (*pool.shape[:-1], pool.shape[-1] * pool.dtype.itemsize), np.uint8)
        made.append(jax.device_put(content.view(pool.dtype), pool.sharding))
    return made


def ones(pools: list[jax.Array]) -> list[jax.Array]:
    """Pools whose bits are all set: NaN in every floating-point dtype."""
    full = [np.full(pool.shape[:-1] + (pool.shape[-1] * pool.dtype.itemsize,), 255, np.uint8) for pool in pools]
    return [jax.device_put(one.view(pool.dtype), pool.sharding) for one, pool in zip(full, pools, strict=True)]


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(CONFIG)


# ------------------------------------------------------------------------------------------------------------ programs


@functools.cache
def compiled(key: ProgramKey, dtype: str) -> tuple[Shapes, jax.stages.Compiled]:
    cache = CacheConfig(num_pages=48, kv_cache_dtype=dtype, swap_space=0.001)
    shapes = resolve_shapes(dataclasses.replace(CONFIG, cache=cache), "cpu")
    shapes = dataclasses.replace(shapes, num_pages=48)
    return shapes, compile_program(key, shapes, make_mesh())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "fp8", "int8"])
def test_pages_keep_their_bits(dtype):
    out, back = (compiled(ProgramKey(kind, 4), dtype) for kind in ("swap_out", "swap_in"))
    shapes = out[0]
    pools = random_pools(shapes)
    before = bits(pools)
    pages: Any = out[1](pools, np.array([7, 2, 40, 11], np.int32))
    moved: Any = back[1](ones(pools), pages, np.array([3, 47, 2, 9], np.int32))
    pools, placed = moved
    after = bits(pools)
    assert (after[[3, 47, 2, 9]] == before[[7, 2, 40, 11]]).all()
    assert (np.delete(after, [3, 47, 2, 9], axis=0) == 255).all()
    assert placed.tolist() == [3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize(
    "key", [ProgramKey("swap_in", 4), ProgramKey("swap_out", 4), PAGE_COPY], ids=lambda key: key.kind
)
def test_no_program_copies_a_pool(key, dtype):
    shapes, program = compiled(key, dtype)
    (first, *_) = pools = abstract_pools(shapes, make_mesh())
    size = first.size * first.dtype.itemsize
    memory = program_memory(program)
    pool_shape = re.escape(f"[{','.join(map(str, first.shape))}]")
    text = program.as_text() or ""
    assert re.search(pool_shape, text)
    assert not re.search(rf"= \w+{pool_shape}\S* (copy|transpose|convert)\(", text)
    assert memory.temporaries < size
    if key.kind != "swap_out":
        assert memory.aliased == size * len(pools)


def test_any_number_of_pages_is_a_sum_of_programs():
    for count in range(70):
        blocks = swap_blocks(count)
        assert sum(blocks) == count
        assert set(blocks) <= set(SWAP_SIZES)
        for smaller, larger in itertools.pairwise(SWAP_SIZES):
            assert blocks.count(smaller) * smaller < larger


WRITES = {"table_write", "option_write", "mask_write", "penalty_write"}


def test_swap_space_decides_programs_and_pages():
    shapes = resolve_shapes(CONFIG, "cpu")
    assert shapes.num_host_pages == 21
    assert resolve_shapes(dataclasses.replace(CONFIG, cache=FLOOR), "cpu").num_host_pages == 21
    kinds = {key.kind for key in program_keys(shapes)}
    assert kinds == {"forward", "sample", "score", "pooling", *WRITES, "page_copy", "swap_in", "swap_out"}
    assert [key.size for key in program_keys(shapes) if key.kind == "swap_in"] == [16, 4, 1]
    few = program_keys(dataclasses.replace(shapes, num_host_pages=15))
    assert [key.size for key in few if key.kind == "swap_out"] == [4, 1]
    none = resolve_shapes(dataclasses.replace(CONFIG, cache=CacheConfig()), "cpu")
    assert none.num_host_pages == 0
    assert {key.kind for key in program_keys(none)} == {"forward", "sample", "score", "pooling", *WRITES, "page_copy"}
    with pytest.raises(ValueError, match=rf"swap_space is 1e-06 GiB; a page has {PAGE_BYTES} bytes, so it must be"):
        resolve_shapes(dataclasses.replace(CONFIG, cache=CacheConfig(swap_space=1e-6)), "cpu")


# -------------------------------------------------------------------------------------------------------------- runner


def test_swaps_are_carried_out_in_order(runner):
    """Pages that a copy frees are filled by a later one of the same plan, on both sides."""
    runner._arrays.pools = random_pools(runner._shapes)
    before = bits(runner._arrays.pools)
    many = range(20, 41)  # 16 + 4 + 1
    runner._copy(swap_out(many, range(21)))
    runner._arrays.pools = ones(runner._arrays.pools)
    runner._copy(swap_in(range(21), range(47, 26, -1)))
    assert (bits(runner._arrays.pools)[range(47, 26, -1)] == before[20:41]).all()
    runner._arrays.pools = random_pools(runner._shapes, seed=1)
    before = bits(runner._arrays.pools)
    runner._copy(swap_out([1, 2], [19, 20]))
    runner._copy(
        (
            *swap_out([3, 4, 5], [0, 1, 2]),
            *swap_in([19, 20], [4, 3]),
            *swap_out([6, 7], [20, 19]),
            *swap_in([0, 1, 2], [6, 7, 1]),
            *swap_in([19, 20], [2, 5]),
        )
    )
    found = bits(runner._arrays.pools)
    for page, content in {4: 1, 3: 2, 6: 3, 7: 4, 1: 5, 2: 7, 5: 6}.items():
        assert (found[page] == before[content]).all(), page
    assert len(runner._host_pages) == 0


def test_pages_are_copied_within_the_device(runner):
    """For forks: one after another where a copy reads what one before it wrote, at once where it reads what it wrote
    over."""
    runner._arrays.pools = random_pools(runner._shapes, seed=2)
    expected = bits(runner._arrays.pools)
    copies = fork([5, 6, 7, 8, 9, 5, 31, 6], [30, 31, 32, 33, 6, 34, 7, 31])
    assert [len(block) for block in copy_blocks(copies)] == [6, 2]
    many = fork(range(1, 4), range(8, 11)) + fork([11] * 17, range(12, 29))
    assert [len(block) for block in copy_blocks(many)] == [16, 4]
    runner._copy(copies)
    runner._copy(many)
    for copy in (*copies, *many):
        expected[copy.destination] = expected[copy.source]
    assert (bits(runner._arrays.pools) == expected).all()


def test_blocks_of_copies_depend_on_nothing_that_they_write():
    rng = random.Random(0)
    for _ in range(200):
        pages, tiers = [1, 2, 3, 4, 5, 6], [PageState.ACTIVE, PageState.HOST]
        copies = [
            PageCopy(rng.choice(pages), source, rng.choice(pages), destination)
            for source, destination in (rng.choice([tiers, tiers[::-1], tiers[:1] * 2]) for _ in range(12))
        ]
        one_by_one = {(tier, page): (tier, page) for tier in tiers for page in pages}
        in_blocks = dict(one_by_one)
        for copy in copies:
            one_by_one[copy.destination_tier, copy.destination] = one_by_one[copy.source_tier, copy.source]
        for block in copy_blocks(copies):
            read = [in_blocks[copy.source_tier, copy.source] for copy in block]
            written = [(copy.destination_tier, copy.destination) for copy in block]
            assert len(set(written)) == len(block)
            in_blocks |= dict(zip(written, read, strict=True))
        assert in_blocks == one_by_one


def test_a_copy_that_no_program_makes_is_refused():
    between = PageCopy(1, PageState.HOST, 2, PageState.HOST)
    with pytest.raises(ValueError, match="page 1 is to be copied from host to host, which is not possible"):
        list(copy_blocks([between]))
    with pytest.raises(
        ValueError, match="group is 1; layers are of 1 groups here, so that of a page copy is at most 0"
    ):
        list(copy_blocks([dataclasses.replace(fork([1], [2])[0], group=1)]))


def test_the_host_pool_is_bounded(runner):
    runner._copy(swap_out([1, 1], [0, 20]))
    with pytest.raises(ValueError, match="host page 21 does not exist; there are 21"):
        runner._copy(swap_out([1], [21]))
    runner._copy(swap_out([1, 1], [20, 0]))
    assert len(runner._host_pages) == 2
    runner._copy(swap_in([0, 20], [0, 0]))
    with pytest.raises(KeyError):
        runner._copy(swap_in([0], [1]))


def chunk(slot: int, start: int, tokens: tuple[int, ...], pages: Sequence[int], request: EngineRequest | None):
    first = -(-start // 16)
    return RowPlan("r", 0, slot, start, tokens, first, tuple(pages), request)


def generate(runner: ModelRunner | FakeRunner, request: EngineRequest, *, swapped: bool) -> list[int]:
    """16 tokens after a prompt of 20. swapped: after 8 of them its pages move, through the host, to another place."""
    tokens = list(request.prompt_token_ids)
    plans = [chunk(2, 0, tuple(tokens), (5, 6), request)]
    copies: tuple[PageCopy, ...] = ()
    writes: list[PageTableWrite] = []
    for number in range(16):
        if number:
            slot = 4 if swapped and number >= 8 else 2
            start = len(tokens) - 1
            new = ((7,) if slot == 2 else (1,)) if start % 16 == 0 else ()
            row = chunk(slot, start, tuple(tokens[-1:]), new, None)
            if swapped and number == 8:
                # The request of another sequence takes over its old pages in the same step.
                copies = (*swap_out((5, 6), (9, 3)), *swap_in((9, 3), (6, 2)))
                writes = table_writes(0, slot, (6, 2))
                row = dataclasses.replace(row, admit=request)
            plans.append(row)
        rows = (plans[-1],)
        if copies:
            rows += (dataclasses.replace(chunk(2, 0, (1,) * 20, (5, 3), request), order=1),)
        ends = list(itertools.accumulate(row.num_tokens for row in rows))
        samples = Samples.of(
            (end - 1, row.slot, row.start + row.num_tokens, False, 0) for row, end in zip(rows, ends, strict=True)
        )
        step = StepPlan(number, NO_DECODES, rows, samples, 32, 8, ends[-1], copies, tuple(writes))
        copies, writes = (), []
        tokens.append(int(runner.collect(dispatch(runner, step)).token_ids[0]))
    return tokens[20:]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_after_a_swap_are_the_same(runner, temperature):
    request = EngineRequest("r", tuple(range(20)), 32, temperature=temperature, seed=7)
    runner._arrays.pools = ones(runner._arrays.pools)
    undisturbed = generate(runner, request, swapped=False)
    runner._arrays.pools = ones(runner._arrays.pools)
    assert generate(runner, request, swapped=True) == undisturbed
    assert len(set(undisturbed)) > 1


def test_the_fake_runner_swaps_too():
    request = EngineRequest("r", tuple(range(20)), 32)
    wide = {"page_size": 16, "num_pages": 8, "num_host_pages": 10}
    undisturbed = generate(FakeRunner(**wide), request, swapped=False)
    fake = FakeRunner(**wide)
    assert fake.info.num_host_pages == 10
    assert generate(fake, request, swapped=True) == undisturbed
    fake._copy(*swap_in((9,), (6,)))  # what was swapped in before is lost
    with pytest.raises(AssertionError, match="position 0 of r is read before it is written"):
        fake._read(4, 20)


def test_nothing_compiles_for_a_swap(runner):
    before = runner.num_compilations
    runner._copy(swap_out(range(1, 22), range(21)))
    runner._copy(swap_in(range(21), range(1, 22)))
    runner._copy(fork(range(1, 22), range(22, 43)))
    assert runner.num_compilations == before > 0


# --------------------------------------------------------------------------------------------------------- pinned pages


def test_beside_a_device_pages_are_pinned_and_few_are_on_their_way(monkeypatch):
    """The way of a GPU, with the CPU's own pinned memory: copies of jax's, nothing compiled."""
    monkeypatch.setattr(host_pages, "pages_in_transit", lambda shapes, page: 5)
    (shapes, out), (_, back) = (compiled(ProgramKey(kind, 4), "bfloat16") for kind in ("swap_out", "swap_in"))
    host = HostPages(shapes, make_mesh(), PAGE_BYTES, pinned=True)
    pools: Any = random_pools(shapes)
    before = bits(pools)
    counter = CompilationCounter()
    for first in (0, 4, 8):
        host.wait_for_room(4)
        assert sum(count for count, _ in host._transit) <= 1
        pages: Any = out(pools, np.arange(first, first + 4, dtype=np.int32))
        host.store(range(first, first + 4), pages)
    assert {page.sharding.memory_kind for page in host._pages.values()} == {"pinned_host"}
    pools = ones(pools)
    for first in (8, 0, 4):
        host.wait_for_room(4)
        assert sum(count for count, _ in host._transit) <= 1
        taken = host.take(range(first, first + 4))
        assert {page.sharding.memory_kind for page in taken} == {"device"}
        moved: Any = back(pools, taken, np.arange(first + 20, first + 24, dtype=np.int32))
        pools, placed = moved
        host.taken(4, placed)
    assert (bits(pools)[20:32] == before[:12]).all()
    assert len(host) == 0
    assert counter.count == 0


# ---------------------------------------------------------------------------------------------------------------- costs


def test_costs_are_measured_at_start(runner):
    found = runner.info.preemption_costs
    assert found is not None
    assert 0 < found.recompute_seconds_per_token < 1
    assert 0 < found.swap_seconds_per_page < 1
    assert runner.info.num_host_pages == 21


@pytest.mark.parametrize(("num_pages", "tokens", "pages"), [(48, 32, 16), (6, 32, 4), (2, 16, 1)])
def test_costs_are_those_of_the_largest_step_and_swap(monkeypatch, num_pages, tokens, pages):
    shapes = dataclasses.replace(resolve_shapes(CONFIG, "cpu"), num_pages=num_pages, max_model_len=24)
    clock = [0.0]
    seen: list[Any] = []

    def compute(plan: StepPlan) -> None:
        seen.append(plan)
        clock[0] += 2.0 if len(seen) == 2 else 9.0

    def swap(copies: Sequence[PageCopy]) -> None:
        seen.append(copies)
        clock[0] += 0.25 if copies[0].destination_tier is PageState.HOST else 0.5

    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock[0])
    assert costs.measure(shapes, compute, swap) == PreemptionCosts(2.0 / tokens, 0.75 / pages, 0.5 / pages)
    plan = seen[0]
    assert (plan.num_tokens, plan.token_bucket, plan.row_bucket) == (tokens, 32, 0)
    assert all(row.start + row.num_tokens <= 24 for row in plan.chunks)
    taken = [page for row in plan.chunks for page in row.new_pages]
    assert sorted(taken) == list(range(1, len(taken) + 1))
    assert len(taken) < num_pages
    moved = [copy for one in seen if isinstance(one, tuple) for copy in one]
    assert {copy.source for copy in moved if copy.source_tier is PageState.ACTIVE} == set(range(1, pages + 1))


def test_costs_are_checked():
    with pytest.raises(ValueError, match="swap_seconds_per_page is nan"):
        PreemptionCosts(0.0, float("nan"))
