"""Rows of several tokens a step, over the fake runner, whose guesses hold or do not: the answers are the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config.scheduling import FORMATIONS, MODES, PreemptionConfig
from jaxserve.config.settings import SchedulerConfig
from jaxserve.engine.messages import AbortRequest
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.request import EngineRequest, FinishReason, RequestOptions
from jaxserve.runner.fake import FakeRunner
from jaxserve.scheduler import Scheduler, StepResult
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.policies.named import POLICIES
from jaxserve.telemetry.recorder import RequestFinished, TokensProduced
from tests.engine import test_constraints as constrained
from tests.engine.test_faults import LATE, LOST, NOT_STARTED, FaultyRunner, make_core, requests, serve, undisturbed
from tests.scheduler.drive import alone, make_scheduler, request

PAGES = {"num_pages": 15, "num_host_pages": 24, "page_size": 4}
SWAP = PreemptionConfig(preemption_mode="swap")


def test_two_tokens_a_row_take_fewer_steps():
    wanted, steps = requests(3, output=30), []
    for count in (1, 2):
        core = make_core(FakeRunner(tokens_per_step=count))
        assert serve(core, wanted) == undisturbed(wanted)
        steps.append(core.stats().num_steps)
        assert core.stats().generation_tokens == sum(len(tokens) for tokens, _, _ in undisturbed(wanted).values())
        produced = sum(len(event.request_ids) for event in core.recorder if isinstance(event, TokensProduced))
        finished = sum(event.output_tokens for event in core.recorder if isinstance(event, RequestFinished))
        assert produced == finished == core.stats().generation_tokens
    assert 0.5 * steps[0] < steps[1] < 0.8 * steps[0]  # about two of three guesses hold


def with_stop_ids(seed: int, count: int) -> list[EngineRequest]:
    """Requests that end by a stop id, by max_tokens, or may not stop before some tokens."""
    rng = np.random.default_rng(seed)
    return [
        EngineRequest(
            f"r{index}",
            tuple(rng.integers(0, 101, rng.integers(1, 30)).tolist()),
            max_tokens=int(rng.integers(1, 20)),
            min_tokens=0,
            stop_token_ids=tuple(rng.choice(101, rng.choice([0, 3, 12]), replace=False).tolist()),
            options=RequestOptions(tenant=str(rng.choice(["a", "b"]))),
        )
        for index in range(count)
    ]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    tokens_per_step=st.sampled_from([2, 2, 3, 4]),
    mode=st.sampled_from(MODES),
    formation=st.sampled_from(FORMATIONS),
    policy=st.sampled_from(list(POLICIES)),
    preemption=st.sampled_from([PreemptionConfig(), SWAP]),
    faults=st.lists(st.sampled_from([None] * 6 + [NOT_STARTED, LOST, LATE]), max_size=20),
    abort=st.integers(0, 60),
)
def test_tokens_do_not_depend_on_guesses(seed, tokens_per_step, mode, formation, policy, preemption, faults, abort):
    """Whatever is preempted, swapped or lost while guesses are in flight."""
    wanted = with_stop_ids(seed, 9)
    calls = [call for fault in faults for call in (fault, None)]
    runner = FaultyRunner(calls, tokens_per_step=tokens_per_step, **PAGES)
    formation = "greedy" if mode == "dynamic" else formation
    core = make_core(runner, mode=mode, formation=formation, policy=policy, preemption=preemption)
    handle = core.step
    steps = iter(range(1_000_000))

    def step():
        answers = core.handle(AbortRequest("r4")) if next(steps) == abort else []
        return [*answers, *handle()]

    core.step = step
    answers = serve(core, wanted)
    for one in wanted:
        tokens, reason = alone(one)
        if answers[one.request_id][1] is FinishReason.ABORT:
            assert answers[one.request_id][0] == tokens[: len(answers[one.request_id][0])]
        else:
            assert answers[one.request_id] == (tokens, reason, "")


def test_the_last_tokens_of_the_limit_are_not_exceeded():
    for max_tokens in range(1, 9):
        wanted = [EngineRequest("r", (1, 2, 3), max_tokens=max_tokens, min_tokens=max_tokens, stop_token_ids=(5, 6))]
        core = make_core(FakeRunner(tokens_per_step=3))
        assert serve(core, wanted) == undisturbed(wanted)


def test_masks_are_made_for_one_token_at_a_time():
    wanted = constrained.requests(8)
    core = constrained.make_core(FakeRunner(tokens_per_step=2, **PAGES), preemption=SWAP)
    assert constrained.serve(core, wanted) == constrained.undisturbed(wanted)
    assert core.stats().num_preemptions_swap > 0


def test_counts_of_a_result_are_checked():
    scheduler = make_scheduler(SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16), tokens_per_step=2)
    for name in "ab":
        scheduler.add(request(name, 3, 9))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, StepResult([1, 2]))
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.num_tokens, plan.num_sampled, plan.num_rows, plan.decode_only) == (4, 4, 2, False)
    assert plan.samples.positions.tolist() == [4, 5, 4, 5]
    with pytest.raises(ValueError, match="step 1 has 0 counts; it decoded 2 rows"):
        scheduler.update(plan, StepResult([1, 2, 3, 4]))
    with pytest.raises(ValueError, match="count of 'a' is 3; its row has 2 tokens"):
        scheduler.update(plan, StepResult([1, 2, 3, 4], [3, 1]))


def test_rows_of_several_tokens_must_fit_a_step():
    with pytest.raises(ValueError, match="max_num_batched_tokens ends at 8; max_num_seqs 8 rows of 2 tokens need 16"):
        make_scheduler(SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=8), tokens_per_step=2)
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16)
    with pytest.raises(ValueError, match="row_buckets ends at 8; max_num_seqs 8 rows of 2 tokens need 16: raise it"):
        Scheduler(config, PagePool(9, 4), Buckets((8, 16), (8,)), tokens_per_step=2)
    with pytest.raises(ValueError, match="tokens_per_step is 5; it must be from 1 to page_size 4"):
        make_scheduler(SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8), tokens_per_step=5)
