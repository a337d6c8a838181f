"""max_decode_gap in the engine: what its statistics and its recorder say, and that tokens do not depend on it."""

from __future__ import annotations

import collections

import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import EngineStats
from jaxserve.runner.fake import FakeRunner
from jaxserve.runner.protocol import StepCosts
from jaxserve.scheduler.gap_monitor import CAUSES
from jaxserve.telemetry.recorder import DecodeGapsExceeded, Recorder, TokensProduced, read_jsonl
from tests.engine.test_faults import LOST, MODEL, FaultyRunner, requests, serve, undisturbed


class Device(FaultyRunner):
    """Moves the clock by a second for each step that is collected, and by 20 for the fifth."""

    def __init__(self, **options):
        super().__init__(**options)
        self.now = 0.0
        self.step_costs = StepCosts(lambda shape: 1.0, 1.0)
        self._collected = 0

    def collect(self, pending):
        self._collected += 1
        self.now += 20.0 if self._collected == 5 else 1.0
        return super().collect(pending)


def core_of(runner: FakeRunner, clock, **limits) -> EngineCore:
    config = EngineConfig(
        architecture=MODEL,
        load_format="dummy",
        scheduler=SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 32, **limits}),
        cache=CacheConfig(num_pages=runner.info.num_pages),
    )
    return EngineCore(config, runner, recorder=Recorder(clock=clock), now=clock, clock=clock)


@pytest.mark.parametrize("tokens_per_step", [1, 2])
def test_gaps_are_counted_as_the_clients_see_them(tokens_per_step, tmp_path):
    device = Device(tokens_per_step=tokens_per_step)
    core = core_of(device, lambda: device.now, max_decode_gap=2.0)
    wanted = requests(4, output=20)
    assert serve(core, wanted) == undisturbed(wanted)
    last: dict[str, float] = {}
    longer = 0
    for event in core.recorder:
        if isinstance(event, TokensProduced):
            for request_id in dict.fromkeys(event.request_ids):
                longer += event.time - last.get(request_id, event.time) > 2.2
                last[request_id] = event.time
    events = [event for event in core.recorder if isinstance(event, DecodeGapsExceeded)]
    stats = core.stats()
    assert longer > 0
    assert [(event.cause, event.count, event.longest_seconds) for event in events] == [("stall", longer, 20.0)]
    assert {cause: getattr(stats, f"num_gap_exceeded_{cause}") for cause in CAUSES} == dict.fromkeys(CAUSES, 0) | {
        "stall": longer
    }
    core.recorder.to_jsonl(tmp_path / "events.jsonl")
    assert events[0] in read_jsonl(tmp_path / "events.jsonl").events


def test_a_fault_counts_as_a_preemption():
    device = Device(faults=[None] * 8 + [LOST])
    core = core_of(device, lambda: device.now, max_decode_gap=1.5)
    wanted = requests(2, output=20)
    assert serve(core, wanted) == undisturbed(wanted)
    stats = core.stats()
    assert stats.num_preemptions_recompute == 2
    assert stats.num_gap_exceeded_preemption == 2


def test_every_cause_has_a_counter():
    fields = collections.Counter(name for name in EngineStats.__struct_fields__ if name.startswith("num_gap_exceeded_"))
    assert fields == collections.Counter(f"num_gap_exceeded_{cause}" for cause in CAUSES)
