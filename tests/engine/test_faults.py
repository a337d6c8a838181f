"""Steps that fail, over the fake runner: who is retried, who is given up, and that nobody else notices."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import Phase, given
from hypothesis import strategies as st

from jaxserve.config.scheduling import FORMATIONS, MODES, PreemptionConfig
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.core import FAULT_SECONDS, EngineCore
from jaxserve.engine.messages import AbortRequest, AddRequest, EngineOutput, outputs
from jaxserve.engine.step_executor import EngineBrokenError
from jaxserve.kv_cache.page_pool import PageCopy
from jaxserve.models.config import ModelConfig
from jaxserve.request import EngineRequest, FinishReason
from jaxserve.runner.fake import FakeRunner
from jaxserve.runner.protocol import StepNotStartedError
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.plan import StepPlan
from jaxserve.telemetry.recorder import Recorder, RequestPreempted
from tests.budgets import budget
from tests.scheduler.drive import alone

MODEL = ModelConfig("LlamaForCausalLM", 101, 8, 8, 1, 1, 1, 8, 256)
NOT_STARTED, COPIED, LOST, LATE = "not started", "not started, copied", "lost", "lost when collected"


class FaultyRunner(FakeRunner):
    """Fails as it is told. faults: what the calls of `dispatch_forward` do, in order; None does nothing. poisoned:
    requests that no step can be started with. most_rows: of a step that can be started."""

    def __init__(self, faults=(), poisoned=(), most_rows=1_000, **sizes):
        super().__init__(**sizes)
        self.faults = iter(faults)
        self.poisoned = set(poisoned)
        self.most_rows = most_rows
        self.rows: list[int] = []
        self.resets = 0
        self._lost = False
        self._late: set[int] = set()

    def dispatch_forward(self, plan: StepPlan):
        assert not self._lost, "a step is dispatched to a device that has lost its pages"
        self.rows.append(plan.num_rows)
        fault = next(self.faults, None)
        if fault == NOT_STARTED or self.poisoned & set(plan.request_ids) or plan.num_rows > self.most_rows:
            raise StepNotStartedError("memory is short")
        if fault == COPIED:
            for copy in plan.copies:
                self._copy(copy)
            raise StepNotStartedError("memory is short", copied=True)
        if fault == LOST:
            self._lose()
            raise RuntimeError("a program failed\nin its third line")
        result = super().dispatch_forward(plan)
        if fault == LATE:
            self._late.add(id(result))
        return result

    def collect(self, pending):
        if id(pending) in self._late:
            self._lose()
            raise RuntimeError("a program has failed")
        assert not self._lost, "a step is collected whose pages are lost"
        return super().collect(pending)

    def reset(self) -> None:
        super().reset()
        self.resets += 1
        self._lost, self._late = False, set()

    def _lose(self) -> None:
        self._lost = True
        super().reset()


class Clock:
    """Time that passes by itself between looks, so fast that faults are far apart."""

    def __init__(self, seconds: float):
        self._times = itertools.count(0.0, seconds)

    def __call__(self) -> float:
        return next(self._times)


def make_core(
    runner: FakeRunner, seconds: float = FAULT_SECONDS, failpoints: tuple[str, ...] = (), **limits
) -> EngineCore:
    config = EngineConfig(
        architecture=MODEL,
        load_format="dummy",
        failpoints=failpoints,
        scheduler=SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 32, **limits}),
        cache=CacheConfig(num_pages=runner.info.num_pages, swap_space=1.0 if runner.info.num_host_pages else 0.0),
    )
    return EngineCore(config, runner, recorder=Recorder(), now=Clock(0.01), clock=Clock(seconds))


def requests(count: int, output: int = 9) -> list[EngineRequest]:
    return [
        EngineRequest(f"r{index}", tuple(range(1, 4 + 3 * index)), max_tokens=output + index % 3, seed=index)
        for index in range(count)
    ]


def serve(core: EngineCore, wanted: list[EngineRequest]) -> dict[str, tuple[list[int], FinishReason, str]]:
    """Tokens, reason and error of each request; every one has exactly one final answer."""
    tokens: dict[str, list[int]] = {one.request_id: [] for one in wanted}
    ends: dict[str, EngineOutput] = {}
    for one in wanted:
        assert core.handle(AddRequest(one)) == []
    while core.busy:
        for message in core.step():
            for output in outputs(message):
                assert output.request_id not in ends, "an output after the end"
                tokens[output.request_id] += output.token_ids
                if output.finish_reason is not None:
                    ends[output.request_id] = output
        core.check_integrity()
    return {name: (tokens[name], end.finish_reason, end.error) for name, end in ends.items()}


def undisturbed(wanted: list[EngineRequest]) -> dict[str, tuple[list[int], FinishReason, str]]:
    return {one.request_id: (*alone(one), "") for one in wanted}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", range(10))
@pytest.mark.parametrize("fault", [NOT_STARTED, LOST, LATE])
def test_one_fault_changes_nobodys_tokens(fault, at, mode):
    """Also where it takes the last tokens of a batch along."""
    for count, output in ((5, 9), (1, 4), (3, 2)):
        wanted = requests(count, output)
        runner = FaultyRunner([None] * at + [fault])
        core = make_core(runner, mode=mode)
        assert serve(core, wanted) == undisturbed(wanted)
        assert runner.resets <= (fault != NOT_STARTED)


@pytest.mark.parametrize("fault", [NOT_STARTED, LOST, LATE])
def test_a_fault_is_recovered_from_once(fault):
    wanted = requests(5)
    runner = FaultyRunner([None] * 3 + [fault])
    assert serve(make_core(runner), wanted) == undisturbed(wanted)
    assert runner.resets == (fault != NOT_STARTED)


def test_a_step_that_is_not_started_is_tried_in_halves():
    wanted = requests(6)
    runner = FaultyRunner([None, None, NOT_STARTED])
    assert serve(make_core(runner), wanted) == undisturbed(wanted)
    assert runner.rows[2:5] == [6, 3, 3]
    assert runner.rows[5] == 6, "a fault of one step concerns no other"


def test_a_program_that_only_small_steps_have_is_no_fault():
    wanted = requests(7)
    runner = FaultyRunner(most_rows=2)
    assert serve(make_core(runner), wanted) == undisturbed(wanted)


@pytest.mark.parametrize("poisoned", [{"r0"}, {"r3"}, {"r6"}, {"r1", "r2"}, {"r0", "r3", "r5", "r6"}])
def test_a_row_that_fails_alone_ends_and_the_rest_go_on(poisoned):
    wanted = requests(7)
    answers = serve(make_core(FaultyRunner(poisoned=poisoned)), wanted)
    expected = undisturbed(wanted)
    for name, (tokens, reason, error) in answers.items():
        if name in poisoned:
            assert (tokens, reason) == ([], FinishReason.ERROR)
            assert error == "the request cannot be computed: memory is short"
        else:
            assert (tokens, reason, error) == expected[name]
    assert answers.keys() == expected.keys()


def test_a_row_that_turns_bad_ends_with_the_tokens_it_has():
    wanted = requests(3)
    runner = FaultyRunner()
    core = make_core(runner)
    for one in wanted:
        core.handle(AddRequest(one))
    core.step()
    core.step()
    runner.poisoned = {"r1"}
    seen = [output for _ in range(3) for message in core.step() for output in outputs(message)]
    (end,) = [output for output in seen if output.finish_reason is not None]
    assert (end.request_id, end.finish_reason) == ("r1", FinishReason.ERROR)
    assert not [output for output in seen[seen.index(end) + 1 :] if output.request_id == "r1"]
    core.check_integrity()


def test_a_single_request_is_tried_again_alone():
    (one,) = requests(1)
    assert serve(make_core(FaultyRunner([None, NOT_STARTED, None])), [one]) == undisturbed([one])


def test_where_no_step_can_be_started_the_engine_is_broken_and_no_request():
    """After the device's arrays were made anew to no avail."""
    runner = FaultyRunner(itertools.repeat(NOT_STARTED))
    with pytest.raises(EngineBrokenError, match="after another: StepNotStartedError: memory is short"):
        serve(make_core(runner, seconds=1e-3), requests(4))
    assert runner.resets == 1


def test_arrays_that_a_fault_has_spoiled_are_made_anew():
    """A failed program may show only in the next one, which is refused whatever its rows."""
    wanted = requests(5)
    runner = FaultyRunner([None] * 4 + [NOT_STARTED] * 8)

    class Spoiled(FaultyRunner):
        def reset(self) -> None:
            super().reset()
            self.faults = iter(())

    spoiled = Spoiled([None] * 4 + [NOT_STARTED] * 100)
    assert serve(make_core(spoiled), wanted) == undisturbed(wanted)
    assert (spoiled.resets, runner.resets) == (1, 0)


def test_copies_of_a_row_that_is_given_up_are_made_once():
    """The copies of its part are those of other rows, too."""
    made: list[PageCopy] = []

    class Counting(FaultyRunner):
        def _copy(self, copy) -> None:
            made.append(copy)
            super()._copy(copy)

    wanted = requests(10)
    for at in range(40):
        made.clear()
        runner = Counting([None] * at + [NOT_STARTED, NOT_STARTED, COPIED] * 3, num_pages=14, num_host_pages=24)
        core = make_core(runner, preemption=PreemptionConfig(preemption_mode="swap"))
        serve(core, wanted)
        assert len({id(copy) for copy in made}) == len(made)


def test_after_a_fault_in_a_program_the_step_has_half_of_the_rows():
    wanted = requests(6)
    runner = FaultyRunner([None, None, None, LOST])
    core = make_core(runner)
    preempted: list[str] = []
    core.recorder.subscribe(
        lambda event: preempted.append(event.request_id) if isinstance(event, RequestPreempted) else None
    )
    assert serve(core, wanted) == undisturbed(wanted)
    assert runner.rows[3] == 6
    assert all(rows <= 3 for rows in runner.rows[4:6])
    assert sorted(preempted) == [one.request_id for one in wanted]
    assert core.stats().num_preemptions_recompute == 6


@pytest.mark.parametrize("fault", [LOST, LATE])
def test_a_second_fault_soon_after_ends_the_engine(fault):
    core = make_core(FaultyRunner([None, fault, None, fault]), seconds=1e-3)
    with pytest.raises(EngineBrokenError, match=r"^step \d+ failed 0\.\d s after another: RuntimeError: a program "):
        serve(core, requests(3))


def test_a_device_that_does_not_recover_ends_the_engine():
    class Dead(FaultyRunner):
        def reset(self) -> None:
            raise RuntimeError("the device is lost")

    with pytest.raises(EngineBrokenError, match="the device with it: the device is lost"):
        serve(make_core(Dead([None, LOST])), requests(3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [0, 1, 4, 9, 14])
def test_a_request_whose_pages_cannot_be_allocated_ends_and_nobody_elses_tokens_change(at, mode):
    wanted = requests(5, 20)
    runner = FaultyRunner(page_size=4)
    core = make_core(runner, mode=mode, failpoints=(f"allocate=raise,after={at},times=1",))
    answers, expected = serve(core, wanted), undisturbed(wanted)
    (failed,) = [name for name, (_, reason, _) in answers.items() if reason is FinishReason.ERROR]
    tokens, _, error = answers.pop(failed)
    assert error.startswith("the request cannot be computed: failpoint allocate")
    assert tokens == expected.pop(failed)[0][: len(tokens)]
    assert answers == expected
    assert runner.resets == 0
    assert core.scheduler.pool.num_used == 0


def test_parts_of_a_plan_are_its_rows_in_order():
    core = make_core(FakeRunner())
    for one in requests(3, output=30):
        core.handle(AddRequest(one))
    core.step()
    for index in range(3, 6):
        core.handle(AddRequest(EngineRequest(f"r{index}", (1, 2, 3, 4, 5), max_tokens=3)))
    plan = core.scheduler.schedule()
    assert plan is not None
    assert len(plan.decodes) == len(plan.chunks) == 3
    buckets = Buckets((8, 16, 32), (8, 16))
    for most_rows in range(1, 8):
        parts = plan.parts(most_rows, buckets)
        assert [row for part in parts for row in part.rows] == list(plan.rows)
        assert sum(part.num_tokens for part in parts) == plan.num_tokens
        assert [row for part in parts for row in part.sampled] == list(plan.sampled)
        begins = [sum(part.num_tokens for part in parts[:place]) for place in range(len(parts))]
        hidden_rows = [begin + part.samples.hidden_rows for begin, part in zip(begins, parts, strict=True)]
        assert np.concatenate(hidden_rows).tolist() == plan.samples.hidden_rows.tolist()
        assert all(part.num_rows <= most_rows for part in parts)
        assert all(part.token_bucket >= part.num_tokens and part.row_bucket >= part.num_sampled for part in parts)
        assert np.concatenate([part.decodes.pages for part in parts]).tolist() == plan.decodes.pages.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_many_faults_while_sequences_are_swapped(mode):
    """So many that every state of a sequence is met: what was under way to or from host memory, what has a token that
    nobody has read, what had its last one."""
    rng = random.Random(mode)
    wanted, swapped = requests(10), 0
    preemption = PreemptionConfig(preemption_mode="swap")
    for _ in range(25):
        calls = [call for _ in range(60) for call in (rng.choice([None, None, LOST, LATE]), None)]
        runner = FaultyRunner(calls, num_pages=rng.randint(13, 20), num_host_pages=24, page_size=4)
        core = make_core(runner, mode=mode, preemption=preemption)
        assert serve(core, wanted) == undisturbed(wanted)
        swapped += core.stats().num_preemptions_swap
    assert swapped > 100 or mode == "none"  # which has one request at a time


FAULTS = st.sampled_from([None] * 6 + [NOT_STARTED, COPIED, LOST, LATE])


@budget(60, phases=[Phase.generate])
@given(
    st.lists(FAULTS, max_size=40),
    st.sampled_from(MODES),
    st.sampled_from(FORMATIONS),
    st.sets(st.integers(0, 9), max_size=2),
    st.integers(13, 30),
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), max_size=3),
    st.lists(st.integers(0, 60), max_size=3),
)
def test_any_faults_at_any_time(faults, mode, formation, poisoned, num_pages, aborts, allocations):
    """Small pools, so that sequences are swapped and preempted between the faults; requests are aborted, too."""
    wanted = requests(10)
    sizes = {"num_pages": num_pages, "num_host_pages": 24, "page_size": 4}
    names = {f"r{index}" for index in poisoned}
    calls = [call for fault in faults for call in (fault, None)]  # what is not started is, the next time
    formation = "greedy" if mode == "dynamic" else formation
    preemption = PreemptionConfig(preemption_mode="swap", recompute_seconds_per_token=1.0, swap_seconds_per_page=1.0)
    failpoints = tuple(f"allocate=raise,after={passes},times=1" for passes in allocations)
    runner = FaultyRunner(calls, names, **sizes)
    core = make_core(runner, failpoints=failpoints, mode=mode, formation=formation, preemption=preemption)
    expected = undisturbed(wanted)
    tokens: dict[str, list[int]] = {name: [] for name in expected}
    ends: dict[str, EngineOutput] = {}

    def take(messages) -> None:
        for message in messages:
            for output in outputs(message):
                assert output.request_id not in ends, "an output after the end"
                tokens[output.request_id] += output.token_ids
                if output.finish_reason is not None:
                    ends[output.request_id] = output

    for one in wanted:
        core.handle(AddRequest(one))
    for step in range(2_000):
        if not core.busy:
            break
        for moment, index in aborts:
            if moment == step:
                take(core.handle(AbortRequest(f"r{index}")))
        take(core.step())
        core.check_integrity()
    assert ends.keys() == expected.keys()
    for name, end in ends.items():
        if end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert name not in names
            assert (tokens[name], end.finish_reason) == expected[name][:2]
        else:
            assert tokens[name] == expected[name][0][: len(tokens[name])]
            assert end.finish_reason is (FinishReason.ERROR if end.error else FinishReason.ABORT)
            unallocated = end.error.startswith("the request cannot be computed: failpoint allocate")
            assert unallocated or name in names or name in {f"r{index}" for _, index in aborts}
    assert sum("failpoint allocate" in end.error for end in ends.values()) <= len(allocations)
