"""Sessions on the engine: later turns are sent when the one before has ended, and repeat what it answered."""

import dataclasses

import numpy as np

from jaxserve.config.settings import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.runner.fake import FakeRunner
from jaxserve.simulator.conversations import ConversationConfig, conversation_trace
from jaxserve.simulator.replay import EngineRequests, LengthKeepingRunner, replay, serve
from jaxserve.simulator.simulated_engine import SimulatedDevice
from jaxserve.simulator.simulation import ClientRule, TraceRequests
from jaxserve.simulator.traces import ROOT, make_trace
from tests.simulator.helpers import make_config

CHAT = ConversationConfig(
    sessions=5, rate=200.0, turns=4, shared=24, first=12, later=9, output=14, pause=0.002, max_length=200
)
CONFIG = make_config(num_pages=401)
DEVICE = SimulatedDevice(401, 256, "cpu")


def engine_of(config: EngineConfig) -> tuple[EngineCore, LengthKeepingRunner]:
    keeping = LengthKeepingRunner(FakeRunner(page_size=16, num_pages=401, vocab_size=1000), 4)
    return EngineCore(config, keeping), keeping


def test_later_turns_repeat_what_the_engine_answered():
    trace = conversation_trace(CHAT)
    core, keeping = engine_of(CONFIG)
    requests = EngineRequests(TraceRequests(trace, DEVICE, CONFIG, ClientRule("exact")), keeping, first_id=3)
    roots = requests.roots()
    prompts = {int(request.request_id): request.prompt_token_ids for request in roots}
    answers: dict[int, tuple[int, ...]] = {}

    def follow(request_id, output_ids, ended):
        answers[int(request_id)] = output_ids
        turns = requests.after(request_id, output_ids, ended)
        for turn in turns:
            index = int(turn.request_id)
            prompts[index] = turn.prompt_token_ids
            assert turn.arrival_time == ended + trace.pauses[index]
        return turns

    served = serve(core, roots, follow=follow)
    core.check_integrity()
    assert sorted(answers) == sorted(prompts) == list(range(len(trace)))
    assert not served.refused
    for index, parent in enumerate(trace.parents.tolist()):
        assert len(prompts[index]) == trace.prompt_tokens[index]
        assert len(answers[index]) == trace.output_tokens[index]
        assert all(3 <= token_id < 1000 for token_id in prompts[index])
        assert prompts[index][:24] == prompts[0][:24]
        if parent != ROOT:
            said = prompts[parent] + answers[parent][:-1]  # the last one may stand for the stop id
            assert prompts[index][: len(said)] == said
    counts = core.scheduler.prefix_counts
    assert counts.queries == len(trace)
    assert counts.hit_tokens > 0.5 * trace.prompt_tokens.sum()


def test_a_replay_reports_sessions_like_a_simulation():
    trace = conversation_trace(dataclasses.replace(CHAT, sessions=3, turns=3))
    result = replay(CONFIG, FakeRunner(page_size=16, num_pages=401, vocab_size=1000), trace)
    assert result.completed.all()
    assert result.output_tokens.tolist() == trace.output_tokens.tolist()
    assert (result.ttft > 0).all()
    turns = np.flatnonzero(trace.parents != ROOT)
    waited = result.arrived[turns] - result.finished[trace.parents[turns]]
    assert (waited >= trace.pauses[turns] - 1e-9).all()


def test_prompts_without_content_share_nothing():
    trace = make_trace("t", np.zeros(6), 40, 3)
    core, keeping = engine_of(CONFIG)
    requests = EngineRequests(TraceRequests(trace, DEVICE, CONFIG, ClientRule("exact")), keeping)
    serve(core, requests.roots(), concurrency=2)
    assert core.scheduler.prefix_counts.queries == 6
    assert core.scheduler.prefix_counts.hit_tokens == 0
