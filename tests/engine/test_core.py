"""The engine loop over the fake runner: order of dispatch and collect, messages, events."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator

import pytest

from jaxserve.config.scheduling import PolicyConfig, PreemptionConfig
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.core import STATS_SECONDS, EngineCore
from jaxserve.engine.messages import AbortRequest, AddRequest, EngineOutput, EngineStats, Shutdown, outputs
from jaxserve.models.config import ModelConfig
from jaxserve.request import EngineRequest, FinishReason, RequestOptions
from jaxserve.runner.fake import FakeRunner
from jaxserve.telemetry.recorder import (
    FirstToken,
    Recorder,
    RequestFinished,
    RequestPreempted,
    StepRecorded,
    TokensProduced,
)
from tests.scheduler.drive import alone

MODEL = ModelConfig("LlamaForCausalLM", 101, 8, 8, 1, 1, 1, 8, 256)


class WatchedRunner(FakeRunner):
    """Writes down the order of calls."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.calls: list[tuple[str, int]] = []
        self.looks: Iterator[bool] = itertools.repeat(True)  # what `done` answers
        self._steps: list[int] = []

    def dispatch_forward(self, plan):
        self.calls.append(("forward", plan.step))
        self._steps.append(plan.step)
        return super().dispatch_forward(plan)

    def dispatch_sample(self, plan, masks=None):
        self.calls.append(("sample", plan.step))
        super().dispatch_sample(plan, masks)

    def done(self, pending):
        return next(self.looks)

    def collect(self, pending):
        self.calls.append(("collect", self._steps.pop(0)))
        return super().collect(pending)


def make_core(num_pages: int = 64, now=lambda: 0.0, clock=time.perf_counter, **limits) -> EngineCore:
    config = EngineConfig(
        architecture=MODEL,
        load_format="dummy",
        scheduler=SchedulerConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 16, **limits}),
        cache=CacheConfig(num_pages=num_pages),
    )
    return EngineCore(config, WatchedRunner(num_pages=num_pages), recorder=Recorder(), now=now, clock=clock)


def run(core: EngineCore) -> dict[str, list[EngineOutput]]:
    answers: dict[str, list[EngineOutput]] = {}
    while core.busy:
        for message in core.step():
            for output in outputs(message):
                answers.setdefault(output.request_id, []).append(output)
        core.check_integrity()
    return answers


def add(core: EngineCore, *requests: EngineRequest) -> None:
    for one in requests:
        assert core.handle(AddRequest(one)) == []


def test_step_n_plus_1_is_dispatched_before_step_n_is_read():
    core = make_core()
    add(core, EngineRequest("a", (1, 2, 3), max_tokens=4))
    run(core)
    assert isinstance(core.runner, WatchedRunner)
    assert core.runner.calls == [
        ("forward", 0),
        ("sample", 0),
        ("forward", 1),
        ("sample", 1),
        ("collect", 0),
        ("forward", 2),
        ("sample", 2),
        ("collect", 1),
        ("forward", 3),
        ("sample", 3),
        ("collect", 2),
        ("collect", 3),
    ]


def test_every_request_gets_its_tokens_and_one_final_output():
    core = make_core(num_pages=14)
    requests = [EngineRequest(f"r{i}", tuple(range(1, 4 + i)), max_tokens=5 + i) for i in range(12)]
    add(core, *requests)
    answers = run(core)
    for one in requests:
        tokens, reason = alone(one)
        assert [token for output in answers[one.request_id] for token in output.token_ids] == tokens
        assert [output.finish_reason for output in answers[one.request_id]] == [None] * (len(tokens) - 1) + [reason]
    assert core.stats().pages_used == 0


def test_a_cancelled_request_frees_its_pages_at_once():
    core = make_core()
    add(core, EngineRequest("a", tuple(range(40)), max_tokens=30), EngineRequest("b", (1,), max_tokens=30))
    for _ in range(4):
        core.step()
    used = core.stats().pages_used
    (final,) = core.handle(AbortRequest("a"))
    assert isinstance(final, EngineOutput)
    assert final.finish_reason is FinishReason.ABORT
    assert core.stats().pages_used == 1 < used
    assert core.handle(AbortRequest("a")) == []
    answers = run(core)
    assert set(answers) == {"b"}


def test_a_request_that_cannot_be_queued_is_answered_at_once():
    core = make_core(max_num_seqs=1, max_num_waiting=1)
    add(core, EngineRequest("a", (1,), max_tokens=3), EngineRequest("b", (1,), max_tokens=3))
    for name, message in (("a", "in use"), ("c", "max_num_waiting 1")):
        (answer,) = core.handle(AddRequest(EngineRequest(name, (1,), max_tokens=3)))
        assert isinstance(answer, EngineOutput)
        assert answer.finish_reason is FinishReason.ERROR
        assert message in answer.error


def test_shutdown_answers_everyone():
    core = make_core()
    add(core, *(EngineRequest(name, (1, 2), max_tokens=9) for name in "abcdef"))
    core.step()
    answers = core.handle(Shutdown())
    assert sorted(answer.request_id for answer in answers if isinstance(answer, EngineOutput)) == list("abcdef")
    assert core.stats().pages_used == 0


def test_deadline_passed_in_the_queue():
    clock = [0.0]
    core = make_core(now=lambda: clock[0], max_num_seqs=1)
    late = EngineRequest("b", (1,), max_tokens=6, options=RequestOptions(deadline=5.0))
    add(core, EngineRequest("a", (1,), max_tokens=6), late)
    core.step()
    clock[0] = 6.0
    answers = run(core)
    assert [output.finish_reason for output in answers["b"]] == [FinishReason.DEADLINE]
    assert "deadline" in answers["b"][0].error
    assert core.stats().num_dropped == 1


def test_a_dropped_request_is_told_which_targets_it_missed():
    clock = [0.0]
    ordering = PolicyConfig(ttft_target=2.0, drop_late=True)
    core = make_core(now=lambda: clock[0], max_num_seqs=1, policy="deadline", ordering=ordering)
    add(core, EngineRequest("a", (1,), max_tokens=6), EngineRequest("b", (1,), max_tokens=6))
    core.step()
    clock[0] = 6.0
    (answer,) = run(core)["b"]
    assert answer.finish_reason is FinishReason.DEADLINE
    assert "dropped after 6.000 s in the queue" in answer.error
    assert "late for ttft_target 2 s and tpot_target 0.1 s; raise the targets, set drop_late to False" in answer.error
    assert core.stats().num_dropped == 1


def test_padding_to_the_program_that_stands_in_is_counted(monkeypatch):
    core = make_core()
    monkeypatch.setattr(core.runner, "fitted", lambda plan: dataclasses.replace(plan, token_bucket=64))
    one = EngineRequest("r", (1, 2, 3), max_tokens=2)
    add(core, one)
    assert tuple(token for output in run(core)["r"] for token in output.token_ids) == tuple(alone(one)[0])
    steps = [event for event in core.recorder if isinstance(event, StepRecorded)]
    assert [(event.token_bucket, event.padding) for event in steps] == [(64, 61), (64, 63)]
    assert core.stats().padding_tokens == 61 + 63


def test_the_recorder_hears_everything():
    core = make_core(num_pages=14)
    add(core, *(EngineRequest(f"r{i}", tuple(range(1, 9)), max_tokens=20) for i in range(4)))
    run(core)
    events = list(core.recorder)
    stats = core.stats()
    preempted = [event for event in events if isinstance(event, RequestPreempted)]
    assert len(preempted) == stats.num_preemptions > 0
    steps = [event for event in events if isinstance(event, StepRecorded)]
    assert [event.step for event in steps] == list(range(stats.num_steps))
    assert sum(event.prefill_tokens + event.decode_tokens for event in steps) == stats.computed_tokens
    assert sum(event.padding for event in steps) == stats.padding_tokens
    assert all(event.pages_used + event.pages_free + event.pages_cached == 13 for event in steps)
    assert len([event for event in events if isinstance(event, FirstToken)]) == 4
    assert sum(event.output_tokens for event in events if isinstance(event, RequestFinished)) == stats.generation_tokens


def test_stats_come_several_times_a_second_and_when_the_engine_becomes_idle():
    clock = [0.0]
    core = make_core(clock=lambda: clock[0])
    add(core, EngineRequest("a", (1, 2, 3), max_tokens=4))
    sent = []
    for step in range(5):
        clock[0] = 10.0 + step * STATS_SECONDS / 2
        sent.append([message for message in core.step() if isinstance(message, EngineStats)])
    assert [len(stats) for stats in sent] == [1, 0, 1, 0, 1]
    assert (sent[0][0].num_running, sent[0][0].pages_used) == (1, 1)
    assert not core.busy
    assert sent[-1] == [core.stats()]


def test_idle_seconds_are_what_the_host_took_with_nothing_on_the_device():
    """Every look at the clock is a second: a step that is done by the next look leaves the device idle from the last
    look that found it busy, when it was dispatched, to the dispatch of the next one."""
    ticks = itertools.count(1.0)
    core = make_core(clock=lambda: next(ticks))
    add(core, EngineRequest("a", (1,), max_tokens=8))
    assert isinstance(core.runner, WatchedRunner)
    core.runner.looks = itertools.chain([False] * 3, itertools.repeat(True))
    while core.busy:
        core.step()
    steps = [event for event in core.recorder if isinstance(event, StepRecorded)]
    assert steps[0].idle_seconds == 0
    assert steps[1].idle_seconds > 0
    for before, step in itertools.pairwise(steps[2:]):
        dispatched = [one.time + one.schedule_seconds + one.dispatch_seconds for one in (before, step)]
        assert step.idle_seconds == dispatched[1] - dispatched[0]
    core.runner.looks = itertools.repeat(False)
    add(core, EngineRequest("b", (1,), max_tokens=8))
    while core.busy:
        core.step()
    later = [event for event in core.recorder if isinstance(event, StepRecorded)][len(steps) :]
    assert later
    assert all(event.idle_seconds == 0 for event in later)
    assert all(event.unused_seconds == 0 for event in (*steps, *later[1:]))
    dispatched = later[0].time + later[0].schedule_seconds + later[0].dispatch_seconds
    tokens = [event.time for event in core.recorder if isinstance(event, TokensProduced)]
    assert later[0].unused_seconds == dispatched - max(time for time in tokens if time < later[0].time)


def test_rows_that_go_on_share_a_message():
    core = make_core()
    add(core, *(EngineRequest(name, (1, 2), max_tokens=3 + len(name)) for name in ("a", "b", "ccc")))
    steps = []
    while core.busy:
        steps.append([message for message in core.step() if not isinstance(message, EngineStats)])
    kinds = [[(type(message).__name__, len(outputs(message))) for message in step] for step in steps]
    one = ("EngineOutput", 1)
    assert kinds == [
        [],
        [one] * 3,
        [("TokenBatch", 3)],
        [("TokenBatch", 3)],
        [("TokenBatch", 1), one, one],
        [("TokenBatch", 1)],
        [one],
    ]


def test_counts_tell_how_well_lengths_were_predicted():
    core = make_core()
    add(core, *(EngineRequest(f"r{length}", (1, 2), max_tokens=length) for length in (9, 3, 14, 6, 20)))
    assert core.stats().kendall_tau is None
    run(core)
    assert core.stats().kendall_tau == core.scheduler.predictor.kendall_tau == 1.0  # nothing but its limit ends any


@pytest.mark.parametrize(
    ("limits", "warning"),
    [
        ({}, ""),
        ({"policy": "deadline", "ordering": PolicyConfig(drop_late=True)}, ""),
        ({"preemption": PreemptionConfig(preemption_mode="swap")}, "preemption_mode is 'swap', but swap_space is 0"),
        ({"ordering": PolicyConfig(drop_late=True)}, "drop_late is True, but policy is 'fcfs'"),
        ({"enable_chunked_prefill": False}, "max_num_batched_tokens 16 is below max_model_len"),
    ],
)
def test_settings_without_effect_are_warned_of(caplog, limits, warning):
    make_core(**limits)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == bool(warning)
    assert warning in "".join(lines)


def test_what_the_runner_decided_about_shared_pages_is_in_the_counts_and_with_each_step(monkeypatch):
    core, decided = make_core(), {"steps": 0, "rows_together": 0}
    monkeypatch.setattr(core.runner, "shared_reads", lambda: dict(decided))
    add(core, EngineRequest("a", (1, 2, 3), max_tokens=3))
    for rows in (4, 0, 2):
        decided["rows_together"] += rows
        core.step()
    assert core.stats().shared_reads == decided
    steps = [event for event in core.recorder if isinstance(event, StepRecorded)]
    assert [step.rows_together for step in steps] == [4, 0, 2]
