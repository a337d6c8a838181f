"""What prompts hold, sessions in closed loop, and the prefix cache in simulation."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.settings import EVICTION_POLICIES
from jaxserve.planning.step_cost_models import HostCosts
from jaxserve.simulator.conversations import (
    AGENT,
    ConversationConfig,
    conversation_trace,
    parse_conversation,
)
from jaxserve.simulator.fleet import FleetConfig, simulate_fleet
from jaxserve.simulator.prompt_content import FIRST_CONTENT_ID, Content, answer_content, pages_of
from jaxserve.simulator.setup import Setup
from jaxserve.simulator.simulation import ClientRule, SimulationResult, TraceRequests, simulate
from jaxserve.simulator.trace_files import read_trace
from jaxserve.simulator.traces import ROOT, make_trace
from jaxserve.telemetry.recorder import Recorder, StepRecorded
from tests.budgets import budget
from tests.simulator.helpers import SimpleCosts, make_config, make_device

RUNS = st.lists(st.tuples(st.integers(2, 4), st.integers(0, 9)), max_size=8)
SMALL = ConversationConfig(
    sessions=6, rate=0.5, turns=4, shared=24, first=12, later=9, output=14, pause=2.0, spread=0.5, max_length=200
)


@given(RUNS, RUNS, st.integers(0, 60))
def test_content_is_that_of_its_token_ids(runs, others, start):
    content, other = Content.of(runs), Content.of(others)
    ids = [content_id for content_id, count in runs for _ in range(count)]
    assert content.token_ids() == tuple(ids)
    assert len(content) == len(ids)
    assert content.after(start).token_ids() == tuple(ids[start:])
    assert (content + other).token_ids() == content.token_ids() + other.token_ids()
    same = 0
    while same < min(len(content), len(other)) and ids[same] == other.token_ids()[same]:
        same += 1
    assert content.shared(other) == other.shared(content) == same


@given(RUNS, RUNS, st.integers(1, 7))
def test_pages_are_equal_where_their_tokens_are(runs, others, size):
    pieces, tokens = [], []
    for content in (Content.of(runs), Content.of(others)):
        ids = content.token_ids()
        pieces += pages_of(content, size)
        tokens += [ids[end - size : end] for end in range(size, len(ids) + 1, size)]
    assert len(pieces) == len(tokens)
    for first, first_ids in zip(pieces, tokens, strict=True):
        assert [piece == first for piece in pieces] == [ids == first_ids for ids in tokens]


@given(RUNS, RUNS, st.integers(0, 3))
def test_drawn_ids_begin_alike_where_content_does(runs, others, seed):
    content, other = Content.of(runs), Content.of(others)
    drawn, other_drawn = (each.drawn_ids(1 << 20, seed, first_id=5) for each in (content, other))
    assert len(drawn) == len(content)
    assert all(5 <= token_id < 1 << 20 for token_id in drawn)
    shared = content.shared(other)
    assert drawn[:shared] == other_drawn[:shared]
    assert drawn[shared : shared + 1] != other_drawn[shared : shared + 1] or shared == len(content) == len(other)


def test_blocks_of_a_file_become_content(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 1030, "output_length": 5, "hash_ids": [2**60, 7, 9]},
        {"timestamp": 1, "input_length": 600, "output_length": 6, "hash_ids": [2**60, 8]},
        {"timestamp": 2, "input_length": 20, "output_length": 4},
    ]
    (tmp_path / "cake.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = read_trace(tmp_path / "cake.jsonl")
    first, second, third = (prompt.token_ids() for prompt in trace.prompts)
    assert [len(first), len(second), len(third)] == [1030, 600, 0]
    assert first[:512] == second[:512]
    assert not set(first[512:]) & set(second[512:])
    ids = {*first, *second}
    assert min(ids) >= FIRST_CONTENT_ID
    assert len(set(trace.answers.tolist())) == 3
    assert not ids & set(trace.answers.tolist())
    requests = list(TraceRequests(trace, make_device(), make_config(), ClientRule(8)))
    assert [ready.request.options.prefix_caching for ready in requests] == [True, True, False]
    assert len(requests[2].request.prompt_token_ids) == 20


def test_a_trace_without_content_shares_nothing():
    trace = make_trace("t", np.arange(6.0), 40, 5)
    result = simulate(make_config(), trace, SimpleCosts(step=0.01), make_device())
    assert result.cached_tokens.tolist() == [0] * 6
    assert result.steps[0]["pages_cached"].max() == 0


def prompts_of(*runs: tuple[tuple[int, int], ...]) -> tuple[list[Content], list[int]]:
    contents = [Content.of(each) for each in runs]
    return contents, [len(content) for content in contents]


def test_prompts_that_begin_alike_share_whole_pages():
    contents, lengths = prompts_of(((2, 40), (3, 8)), ((2, 40), (4, 8)), ((2, 48),), ((5, 48),))
    trace = make_trace("t", [0.0, 9.0, 18.0, 27.0], lengths, 2, prompts=contents, answers=[11, 12, 13, 14])
    result = simulate(make_config(max_num_batched_tokens=64), trace, SimpleCosts(), make_device())
    assert result.cached_tokens.tolist() == [0, 32, 32, 0]
    off = simulate(make_config(enable_prefix_caching=False), trace, SimpleCosts(), make_device())
    assert off.cached_tokens.sum() == 0


def test_a_chat_finds_its_own_answer():
    answer = answer_content(9, 21)
    first = Content.of([(2, 16)])
    second = first + answer + Content.of([(3, 10)])
    trace = make_trace(
        "chat", [0.0, 2.0], [16, len(second)], [21, 3], prompts=[first, second], answers=[9, 10], parents=[ROOT, 0],
        pauses=[0.0, 2.0],
    )  # fmt: skip
    for stretches in (True, False):
        result = simulate(make_config(), trace, SimpleCosts(), make_device(), stretches=stretches)
        # 16 tokens of the prompt and 16 of the answer; its last 5 fill no page.
        assert result.cached_tokens.tolist() == [0, 32]
        assert result.arrived.tolist() == [0.0, 21.0 + 2.0]
        assert result.ttft[1] == result.first_token[1] - 23.0


def test_a_turn_waits_for_the_one_before_and_its_pause():
    trace = conversation_trace(SMALL)
    result = simulate(make_config(), trace, SimpleCosts(step=0.05), make_device())
    assert result.completed.all()
    for index, parent in enumerate(trace.parents.tolist()):
        expected = trace.arrivals[index] if parent == ROOT else result.finished[parent] + trace.pauses[index]
        assert result.arrived[index] == expected
    assert (result.arrived >= trace.arrivals - 1e-9).all()
    assert (result.scheduled >= result.arrived).all()


@st.composite
def conversations(draw):
    config = dataclasses.replace(
        SMALL,
        sessions=draw(st.integers(1, 8)),
        seed=draw(st.integers(0, 99)),
        turn_counts=draw(st.sampled_from(["fixed", "geometric"])),
        pause=draw(st.sampled_from([0.0, 0.3, 4.0])),
        rate=draw(st.sampled_from([0.3, 3.0, 1e9])),
        later=draw(st.sampled_from([1, 9, 30])),
    )
    options = {
        "policy": draw(st.sampled_from(["fcfs", "sjf", "fair", "longest-prefix-match"])),
        "eviction_policy": draw(st.sampled_from(EVICTION_POLICIES)),
        "max_num_seqs": draw(st.sampled_from([1, 3, 8])),
        "max_num_batched_tokens": draw(st.sampled_from([16, 64])),
        "preemption_mode": draw(st.sampled_from(["recompute", "swap", "auto"])),
        "mode": draw(st.sampled_from(["continuous", "continuous", "static"])),
        "max_num_waiting": draw(st.sampled_from([2, 100])),
    }
    host = draw(st.sampled_from([HostCosts(0, 0, 0, 0), HostCosts(1e-3, 1e-5, 1e-3, 1e-5)]))
    costs = SimpleCosts(step=0.01, token=1e-4, position=1e-6, host=host)
    device = make_device(draw(st.sampled_from([16, 24, 80])), draw(st.sampled_from([0, 10])))
    return make_config(**options), conversation_trace(config), costs, device


@budget(25)
@given(conversations())
def test_stretches_change_nothing_where_pages_are_shared(case):
    config, trace, costs, device = case
    whole, single = Recorder(capacity=10**6), Recorder(capacity=10**6)
    taken = simulate(config, trace, costs, device, recorder=whole)
    stepped = simulate(config, trace, costs, device, recorder=single, stretches=False)
    assert_same(taken, stepped)
    assert [_steps(event) for event in whole] == [_steps(event) for event in single]
    assert all(taken.reasons), "a request never ended"
    assert not np.isnan(taken.arrived).any()


def _steps(event):
    timed = {"idle_seconds": 0.0, "update_seconds": 0.0, "schedule_seconds": 0.0}
    return dataclasses.replace(event, **timed) if isinstance(event, StepRecorded) else event


def assert_same(taken: SimulationResult, stepped: SimulationResult) -> None:
    assert taken.reasons == stepped.reasons
    for name in ("arrived", "scheduled", "first_token", "finished", "output_tokens", "cached_tokens"):
        np.testing.assert_array_equal(getattr(taken, name), getattr(stepped, name), err_msg=name)
    for name, column in taken.steps[0].items():
        np.testing.assert_array_equal(column, stepped.steps[0][name], err_msg=name)


def test_hits_are_those_of_a_cache_without_end():
    """With pages for everything, one request at a time: what an earlier prompt or answer has computed, in whole
    pages."""
    trace = conversation_trace(dataclasses.replace(SMALL, seed=3))
    config, device = make_config(max_num_seqs=1), make_device(2000)
    result = simulate(config, trace, SimpleCosts(step=0.01), device)
    seen: set[tuple[int, ...]] = set()
    for index in np.argsort(result.scheduled).tolist():
        ids = trace.prompts[index].token_ids()
        found = 0
        while found + 16 < len(ids) and ids[: found + 16] in seen:
            found += 16
        assert result.cached_tokens[index] == found
        said = ids + answer_content(int(trace.answers[index]), int(trace.output_tokens[index])).token_ids()[:-1]
        seen |= {said[:end] for end in range(16, len(said) + 1, 16)}


@pytest.mark.parametrize("policy", EVICTION_POLICIES)
def test_pages_are_reclaimed_in_the_order_of_the_policy(policy):
    """A prompt that came twice, one that came once since, and then one that needs the pages of one of them."""
    twice, once, new = (Content((name,), (48,)) for name in (2, 3, 4))
    prompts = [twice, twice, once, new, twice, once]
    trace = make_trace("t", 9.0 * np.arange(6), 48, 1, prompts=prompts, answers=10 + np.arange(6))
    config = make_config(max_num_batched_tokens=64, eviction_policy=policy)
    result = simulate(config, trace, SimpleCosts(step=0.01), make_device(8))  # seven pages, three of them a prompt
    kept = result.cached_tokens[4:].tolist()
    assert result.cached_tokens[:4].tolist() == [0, 32, 0, 0]
    assert kept[0] == 32 if policy != "lru" else kept[0] < 32


def test_a_session_stays_on_its_replica():
    trace = conversation_trace(SMALL)
    setup = Setup(make_config(), make_device(200), SimpleCosts(step=0.05))
    result = simulate_fleet(setup, trace, FleetConfig(replicas=3)).result
    turns = trace.parents != ROOT
    assert (result.replica[turns] == result.replica[trace.parents[turns]]).all()
    assert len(set(result.replica.tolist())) == 3
    assert result.completed.all()
    alone = simulate_fleet(setup, trace, FleetConfig(replicas=1)).result
    assert_same(alone, simulate(setup.config, trace, setup.costs, setup.device))


def test_a_part_of_a_trace_keeps_the_order_of_turns():
    trace = conversation_trace(SMALL)
    keep = np.arange(len(trace)) % 3 != 1
    kept = trace.select(keep)
    rows = np.flatnonzero(keep)
    for index, parent in enumerate(kept.parents.tolist()):
        ancestor = trace.parents[rows[index]]
        while ancestor != ROOT and not keep[ancestor]:
            ancestor = trace.parents[ancestor]
        assert (ROOT if parent == ROOT else rows[parent]) == ancestor
    assert kept.prompts == tuple(trace.prompts[row] for row in rows.tolist())


def test_a_faster_trace_has_the_same_pauses():
    trace = conversation_trace(SMALL)
    faster = trace.faster(4.0)
    assert faster.num_sessions == trace.num_sessions
    for each in (trace, faster):
        turns = each.parents != ROOT
        np.testing.assert_allclose(each.arrivals[turns], each.arrivals[each.parents[turns]] + each.pauses[turns])
    begins, faster_begins = (np.sort(each.arrivals[each.parents == ROOT]) for each in (trace, faster))
    np.testing.assert_allclose(faster_begins * 4, begins)
    assert sorted(faster.prompt_tokens.tolist()) == sorted(trace.prompt_tokens.tolist())


def test_agents_repeat_as_much_as_published():
    trace = conversation_trace(AGENT)
    assert (len(trace), trace.num_sessions) == (1500, 50)
    turn = np.zeros(len(trace), np.int64)
    repeated = np.zeros(len(trace))
    for index, parent in enumerate(trace.parents.tolist()):
        if parent != ROOT:
            turn[index] = turn[parent] + 1
            assert trace.prompts[index].shared(trace.prompts[parent]) == trace.prompt_tokens[parent]
            repeated[index] = trace.prompt_tokens[parent] / trace.prompt_tokens[index]
    assert trace.prompt_tokens[turn == 29].mean() == pytest.approx(30000, rel=0.03)
    assert trace.output_tokens.mean() == pytest.approx(450, rel=0.03)
    assert repeated[turn == 1].mean() == pytest.approx(0.71, abs=0.02)
    assert repeated[turn == 29].mean() == pytest.approx(0.97, abs=0.01)


def test_the_same_seed_gives_the_same_sessions_and_another_rate_the_same_lengths():
    first, again = (conversation_trace(parse_conversation("chat", "sessions=30,seed=4")) for _ in range(2))
    faster = conversation_trace(parse_conversation("chat", "sessions=30,seed=4,rate=9"))
    assert first.prompts == again.prompts
    assert (first.arrivals == again.arrivals).all()
    assert sorted(map(len, first.prompts)) == sorted(map(len, faster.prompts))
    assert first.name == "conversations"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("turn=3", "agent trace 'turn=3': it must be NAME=VALUE with NAME one of sessions"),
        ("turns=x", "agent turns is 'x'; it must be of type int"),
        ("turns=0", "conversation turns is 0"),
        ("turn_counts=many", "turn_counts is 'many'"),
        ("tenants=a:0", "each weight must be above 0"),
        ("max_length=9", "no first prompt and answer fit: raise it"),
    ],
)
def test_faults_of_conversations(text, message):
    with pytest.raises(ValueError, match=message):
        conversation_trace(parse_conversation("agent", text))


def test_faults_of_content_and_parents():
    with pytest.raises(ValueError, match="the content of prompt 1 has 5 tokens; its prompt_tokens is 4"):
        make_trace("t", [0.0, 1.0], 4, 1, prompts=[Content((2,), (4,)), Content((2,), (5,))])
    with pytest.raises(ValueError, match=r"parents\[0\] is 1; it must be -1 or the index of an earlier request"):
        make_trace("t", [0.0, 1.0], 4, 1, parents=[1, ROOT])
    with pytest.raises(ValueError, match="prompts has 1 entries; arrivals has 2"):
        make_trace("t", [0.0, 1.0], 4, 1, prompts=[Content((2,), (4,))])
