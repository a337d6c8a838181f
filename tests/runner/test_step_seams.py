"""What a plan tells beside its rows, on the real runner and the fake one: pages that a sequence holds before its step,
and masks that are made while its forward program runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.constraints import pack_mask
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import AddRequest, outputs
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import make_mesh
from jaxserve.planning.reports.traffic import pool_copies
from jaxserve.programs.aot import hlo
from jaxserve.programs.compiler import compile_program
from jaxserve.programs.step_programs import MASK_WRITE, OPTION_WRITE, TABLE_WRITE, ProgramKey
from jaxserve.request import EngineRequest
from jaxserve.runner.fake import FakeRunner
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.protocol import Runner, StepNotStartedError
from jaxserve.scheduler.plan import NO_DECODES, PageTableWrite, RowPlan, Samples, StepPlan, Wants, table_writes
from jaxserve.telemetry.recorder import Recorder, StepRecorded
from tests.scheduler.drive import dispatch

VOCAB = 101
CONFIG = EngineConfig(
    architecture=ModelConfig("LlamaForCausalLM", VOCAB, 32, 48, 1, 2, 1, 32, 2048, tie_word_embeddings=True),
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, max_penalty_rows=7),
    cache=CacheConfig(num_pages=220, page_size=16),
    token_buckets=(8, 64),
    row_buckets=(8,),
    seed=5,
)
CACHED = 63
"""Pages of a prompt that a sequence finds computed when it is admitted, as it will of a prefix cache."""


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(CONFIG)


def step(
    runner: Runner, row: RowPlan, bucket: int, *, sample: bool, writes: Sequence[PageTableWrite] = ()
) -> int | None:
    """One row alone; the token that it samples."""
    end = row.start + row.num_tokens
    samples = Samples.of([(row.num_tokens - 1, row.slot, end, False, 0)] if sample else [])
    plan = StepPlan(
        0, NO_DECODES, (row,), samples, bucket, 8 if sample else 0, row.num_tokens, table_writes=tuple(writes)
    )
    found = runner.collect(dispatch(runner, plan)).token_ids
    return int(found[0]) if sample else None


def chunk(request: EngineRequest, slot: int, start: int, end: int, new: Sequence[int], *, admit: bool) -> RowPlan:
    tokens = request.prompt_token_ids[start:end]
    return RowPlan("r", 0, slot, start, tokens, -(-start // 16), tuple(new), request if admit else None)


def prompt(length: int) -> EngineRequest:
    return EngineRequest("r", tuple(np.random.default_rng(length).integers(0, VOCAB, length).tolist()), 8)


def prefill(runner: Runner, request: EngineRequest, slot: int, pages: Sequence[int], writes: Any) -> None:
    """Computes full pages of a prompt, 48 tokens a step. writes: of the tables of a chunk's pages (slot, first, pages),
    for groups beside the first."""
    for start in range(0, len(pages) * 16, 48):
        new = pages[start // 16 : (start + 48) // 16]
        row = chunk(request, slot, start, start + 48, new, admit=not start)
        step(runner, row, 64, sample=False, writes=writes(slot, start // 16, new))


@pytest.mark.parametrize("cached", [CACHED, 99])
def test_a_sequence_with_many_pages_fits_the_smallest_bucket(runner, cached):
    """Admitted with them and three tokens; a program of eight tokens has room for eight entries of page tables."""
    request = prompt(16 * cached + 3)
    pages = list(range(219, 219 - cached - 1, -1))
    prefill(runner, request, 1, pages[:cached], lambda *_: ())
    last = chunk(request, 1, 16 * cached, 16 * cached + 3, pages[cached:], admit=False)
    expected = step(runner, last, 8, sample=True)
    hidden = np.asarray(runner._arrays.hidden)[:3]
    before = runner.num_compilations
    row = chunk(request, 6, 16 * cached, 16 * cached + 3, [3], admit=True)
    writes = table_writes(0, 6, pages[:cached])
    assert [len(write.pages) for write in writes] == ([63] if cached == 63 else [64, 35])
    assert step(runner, row, 8, sample=True, writes=writes) == expected
    assert (np.asarray(runner._arrays.hidden)[:3] == hidden).all()
    assert np.asarray(runner._arrays.slots.page_table)[6, : cached + 1].tolist() == [*pages[:cached], 3]
    assert runner.num_compilations == before


def test_runs_of_several_sequences_share_a_call(runner):
    writes = [PageTableWrite(0, slot, 4 * slot, tuple(range(10 * slot, 10 * slot + 20))) for slot in range(8)]
    table = np.array(runner._arrays.slots.page_table)
    for write in writes:
        table[write.slot, write.first : write.first + 20] = write.pages
    calls = []
    program = runner.programs.executables[TABLE_WRITE]
    runner.programs.executables[TABLE_WRITE] = lambda *arguments: calls.append(1) or program(*arguments)
    try:
        step(runner, chunk(prompt(3), 0, 0, 3, [1], admit=True), 8, sample=False, writes=writes)
    finally:
        runner.programs.executables[TABLE_WRITE] = program
    table[0, 0] = 1  # the row's own page
    assert (np.asarray(runner._arrays.slots.page_table) == table).all()
    assert len(calls) == 3  # 160 entries


def test_a_run_is_bounded():
    with pytest.raises(ValueError, match="pages has 65 pages; one write has 1 to 64: make several"):
        PageTableWrite(0, 0, 0, tuple(range(65)))
    with pytest.raises(ValueError, match="pages has 0 pages"):
        PageTableWrite(0, 0, 0, ())


def test_a_group_that_is_not_there_is_refused(runner):
    row = chunk(prompt(3), 0, 0, 3, [1], admit=True)
    with pytest.raises(
        StepNotStartedError, match="group is 1; layers are of 1 groups here, so that of a page table write is"
    ):
        step(runner, row, 8, sample=False, writes=[PageTableWrite(1, 0, 0, (7,))])


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_many_pages_in_each_group_of_the_fake_runner(groups):
    """Each group has a page table and pages of its own, of one pool."""
    request = prompt(16 * CACHED + 3)
    fake = FakeRunner(group_windows=(None,) * groups, page_size=16, num_pages=220, max_model_len=2048)
    tables = [list(range(1 + 70 * group, 65 + 70 * group)) for group in range(groups)]

    def others(slot: int, first: int, new: Sequence[int]) -> list[PageTableWrite]:
        ends = first + len(new)
        return [PageTableWrite(group, slot, first, tuple(tables[group][first:ends])) for group in range(1, groups)]

    prefill(fake, request, 1, tables[0][:CACHED], others)
    last = chunk(request, 1, 16 * CACHED, 16 * CACHED + 3, tables[0][CACHED:], admit=False)
    expected = step(fake, last, 8, sample=True, writes=others(1, CACHED, tables[0][CACHED:]))
    row = chunk(request, 6, 16 * CACHED, 16 * CACHED + 3, tables[0][CACHED:], admit=True)
    writes = [write for group in range(groups) for write in table_writes(group, 6, tables[group][:CACHED])]
    last_pages = [PageTableWrite(group, 6, CACHED, tuple(tables[group][CACHED:])) for group in range(1, groups)]
    assert step(fake, row, 8, sample=True, writes=[*writes, *last_pages]) == expected
    if groups > 1:
        swapped = [PageTableWrite(0, 6, 0, writes[1].pages), PageTableWrite(1, 6, 0, writes[0].pages)]
        with pytest.raises(AssertionError, match="a page of another group is read for r"):
            step(fake, row, 8, sample=True, writes=swapped)


# --------------------------------------------------------------------------------------------------------------- masks

ALLOWED = (5, 17, 40, 100)


class Timed:
    """A runner, and the constraint of request "c", which write down when they were asked for what."""

    def __init__(self, runner: ModelRunner):
        self._runner = runner
        self.info = runner.info
        self.times: dict[tuple[str, int], float] = {}
        self._order: list[int] = []
        self._masks = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def _note(self, what: str, number: int) -> None:
        self.times[what, number] = time.perf_counter()

    def dispatch_forward(self, plan):
        pending = self._runner.dispatch_forward(plan)
        self._order.append(plan.step)
        self._note("forward", plan.step)
        return pending

    def dispatch_sample(self, plan, masks=None):
        self._note("sample", plan.step)
        self._runner.dispatch_sample(plan, masks)

    def collect(self, pending):
        result = self._runner.collect(pending)
        self._note("collect", self._order.pop(0))
        return result

    def constrains(self, request: EngineRequest) -> bool:
        return request.request_id == "c"

    def mask(self, request: EngineRequest, output_token_ids: Sequence[int]) -> np.ndarray:
        self._note("mask", len(output_token_ids))
        return pack_mask(np.isin(np.arange(VOCAB), ALLOWED))


def serve(runner: Any, requests: Sequence[EngineRequest], constraints: Any) -> tuple[dict[str, list[int]], Recorder]:
    recorder = Recorder()
    core = EngineCore(CONFIG, runner, recorder=recorder, constraints=constraints)
    tokens: dict[str, list[int]] = {one.request_id: [] for one in requests}
    for one in requests:
        core.handle(AddRequest(one))
    while core.busy:
        for message in core.step():
            for output in outputs(message):
                tokens[output.request_id] += output.token_ids
        core.check_integrity()
    return tokens, recorder


def mixed(temperature: float) -> Iterator[EngineRequest]:
    for number, name in enumerate(("a", "c", "b")):
        yield EngineRequest(name, (number + 1,) * (5 + number), 12, temperature=temperature, seed=number)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constrained_request_obeys_and_its_neighbors_do_not_notice(runner, temperature):
    free, _ = serve(runner, list(mixed(temperature)), None)
    timed = Timed(runner)
    found, _ = serve(timed, list(mixed(temperature)), timed)
    assert {name: found[name] for name in "ab"} == {name: free[name] for name in "ab"}
    assert set(found["c"]) <= set(ALLOWED)
    assert len(found["c"]) == 12
    assert found["c"] != free["c"]
    alone, _ = serve(runner, [one for one in mixed(temperature) if one.request_id == "c"], timed)
    assert alone["c"] == found["c"]
    assert len(set(found["c"])) > 1 or not temperature


def test_masks_are_made_while_the_forward_program_is_under_way(runner):
    """The timeline: forward N + 1 is dispatched, N is collected, the masks of N + 1 are made, N + 1 is sampled."""
    timed = Timed(runner)
    before = runner.num_compilations
    tokens, recorder = serve(timed, list(mixed(0.0)), timed)
    times = timed.times
    for number in range(len(tokens["c"])):  # the n-th token is sampled in step n
        assert times["forward", number] < times["mask", number] < times["sample", number]
        if number:
            assert times["forward", number] < times["collect", number - 1] < times["mask", number]
    steps = {event.step: event for event in recorder if isinstance(event, StepRecorded)}
    for number in range(1, len(tokens["c"])):
        event = steps[number]
        dispatched = event.time + event.schedule_seconds + event.dispatch_seconds
        assert times["forward", number] <= dispatched < times["mask", number] < event.time + event.seconds
    assert runner.num_compilations == before


def test_masks_of_another_shape_are_refused(runner):
    row = chunk(prompt(3), 0, 0, 3, [1], admit=True)
    samples = Samples.of([(2, 0, 3, False, Wants.MASK)])
    plan = StepPlan(0, NO_DECODES, (row,), samples, 8, 8, 3)
    for masks in (None, np.zeros((1, 3), np.uint32), np.zeros((2, 4), np.uint32), np.zeros((1, 4), np.int32)):
        runner.dispatch_forward(plan)
        with pytest.raises(ValueError, match=r"masks of step 0 are .*; its samples need uint32\[1, 4\]"):
            runner.dispatch_sample(plan, masks)
    with pytest.raises(ValueError, match="step 0 is to be sampled; its forward program was not the last one"):
        runner.dispatch_sample(plan, np.zeros((1, 4), np.uint32))


@pytest.mark.parametrize("key", [ProgramKey("penalty_write", 512), ProgramKey("sample", 8)], ids=lambda key: key.kind)
def test_no_program_copies_the_penalty_rows(runner, key):
    """They are updated in place: one id a row by the sample program, which reads the rows of its own requests alone."""
    compiled = compile_program(key, runner._shapes, make_mesh())  # the runner's own may be loaded and have no text
    module = hlo.parse(compiled.as_text() or "")
    for leaf in jax.tree.leaves(runner._arrays.penalties):
        dtype = {"uint16": "u16", "uint32": "u32"}[str(leaf.dtype)]
        assert pool_copies(module, hlo.ArrayShape(dtype, leaf.shape)) == []


@pytest.mark.parametrize(
    "key",
    [TABLE_WRITE, OPTION_WRITE, MASK_WRITE, ProgramKey("penalty_write", 512), ProgramKey("sample", 8)],
    ids=lambda key: key.kind,
)
def test_what_these_programs_change_stays_in_place(runner, key):
    """Their arrays are aliased, and the sample program reads masks without taking them over."""
    slots = sum(leaf.nbytes for leaf in jax.tree.leaves(runner._arrays.slots))
    penalties = sum(leaf.nbytes for leaf in jax.tree.leaves(runner._arrays.penalties))
    others = {"mask_write": runner._arrays.masks.nbytes, "penalty_write": penalties, "sample": slots + penalties}
    assert runner.programs.memory[key].aliased == others.get(key.kind, slots)
