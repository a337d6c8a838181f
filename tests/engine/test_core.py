"""The engine loop over the fake runner: order of dispatch and collect, messages, events."""

from __future__ import annotations

from jaxserve.config import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import AbortRequest, AddRequest, EngineStats, RequestOutput, Shutdown
from jaxserve.recorder import FirstToken, Recorder, RequestFinished, RequestPreempted, StepRecorded
from jaxserve.request import EngineRequest, FinishReason
from jaxserve.runner.fake import FakeRunner
from models.config import ModelConfig
from tests.scheduler.drive import alone

MODEL = ModelConfig("LlamaForCausalLM", 101, 8, 8, 1, 1, 1, 8, 256)


class WatchedRunner(FakeRunner):
    """Writes down the order of calls."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.calls: list[tuple[str, int]] = []
        self._steps: list[int] = []

    def dispatch(self, plan):
        self.calls.append(("dispatch", plan.step))
        self._steps.append(plan.step)
        return super().dispatch(plan)

    def collect(self, pending):
        self.calls.append(("collect", self._steps.pop(0)))
        return super().collect(pending)


def make_core(num_pages: int = 64, now=lambda: 0.0, **limits) -> EngineCore:
    config = EngineConfig(
        architecture=MODEL,
        load_format="dummy",
        scheduler=SchedulerConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 16, **limits}),
        cache=CacheConfig(num_pages=num_pages),
    )
    return EngineCore(config, WatchedRunner(num_pages=num_pages), recorder=Recorder(), now=now)


def run(core: EngineCore) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    while core.busy:
        for message in core.step():
            if isinstance(message, RequestOutput):
                outputs.setdefault(message.request_id, []).append(message)
        core.check_integrity()
    return outputs


def add(core: EngineCore, *requests: EngineRequest) -> None:
    for one in requests:
        assert core.handle(AddRequest(one)) == []


def test_step_n_plus_1_is_dispatched_before_step_n_is_read():
    core = make_core()
    add(core, EngineRequest("a", (1, 2, 3), max_tokens=4))
    run(core)
    assert isinstance(core.runner, WatchedRunner)
    assert core.runner.calls == [
        ("dispatch", 0),
        ("dispatch", 1),
        ("collect", 0),
        ("dispatch", 2),
        ("collect", 1),
        ("dispatch", 3),
        ("collect", 2),
        ("collect", 3),
    ]


def test_every_request_gets_its_tokens_and_one_final_output():
    core = make_core(num_pages=14)
    requests = [EngineRequest(f"r{i}", tuple(range(1, 4 + i)), max_tokens=5 + i) for i in range(12)]
    add(core, *requests)
    outputs = run(core)
    for one in requests:
        tokens, reason = alone(one)
        assert [token for output in outputs[one.request_id] for token in output.token_ids] == tokens
        assert [output.finish_reason for output in outputs[one.request_id]] == [None] * (len(tokens) - 1) + [reason]
    assert core.stats().pages_used == 0


def test_a_cancelled_request_frees_its_pages_at_once():
    core = make_core()
    add(core, EngineRequest("a", tuple(range(40)), max_tokens=30), EngineRequest("b", (1,), max_tokens=30))
    for _ in range(4):
        core.step()
    used = core.stats().pages_used
    (final,) = core.handle(AbortRequest("a"))
    assert isinstance(final, RequestOutput)
    assert final.finish_reason is FinishReason.ABORT
    assert core.stats().pages_used == 1 < used
    assert core.handle(AbortRequest("a")) == []
    outputs = run(core)
    assert set(outputs) == {"b"}


def test_a_request_that_cannot_be_queued_is_answered_at_once():
    core = make_core(max_num_seqs=1, max_num_waiting=1)
    add(core, EngineRequest("a", (1,), max_tokens=3), EngineRequest("b", (1,), max_tokens=3))
    for name, message in (("a", "in use"), ("c", "max_num_waiting 1")):
        (answer,) = core.handle(AddRequest(EngineRequest(name, (1,), max_tokens=3)))
        assert isinstance(answer, RequestOutput)
        assert answer.finish_reason is FinishReason.ERROR
        assert message in answer.error


def test_shutdown_answers_everyone():
    core = make_core()
    add(core, *(EngineRequest(name, (1, 2), max_tokens=9) for name in "abcdef"))
    core.step()
    answers = core.handle(Shutdown())
    assert sorted(answer.request_id for answer in answers if isinstance(answer, RequestOutput)) == list("abcdef")
    assert core.stats().pages_used == 0


def test_deadline_passed_in_the_queue():
    clock = [0.0]
    core = make_core(now=lambda: clock[0], max_num_seqs=1)
    add(core, EngineRequest("a", (1,), max_tokens=6), EngineRequest("b", (1,), max_tokens=6, deadline=5.0))
    core.step()
    clock[0] = 6.0
    outputs = run(core)
    assert [output.finish_reason for output in outputs["b"]] == [FinishReason.ABORT]
    assert "deadline" in outputs["b"][0].error


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


def test_stats_follow_every_step():
    core = make_core()
    add(core, EngineRequest("a", (1, 2, 3), max_tokens=2))
    last = core.step()[-1]
    assert isinstance(last, EngineStats)
    assert last.num_running == 1
    assert last.pages_used == 1
