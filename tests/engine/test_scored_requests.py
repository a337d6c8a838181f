"""Log-probabilities through scheduler and engine, over the fake runner, whose values are a formula of the position."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config.scheduling import MODES, PreemptionConfig
from jaxserve.engine.messages import AddRequest, FromEngine, Logprobs, TokenBatch, decode, encode, outputs
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import EngineRequest, FinishReason
from jaxserve.runner.fake import FakeRunner
from jaxserve.scheduler.plan import StepPlan
from tests.engine.test_faults import LATE, LOST, NOT_STARTED, FaultyRunner, make_core, requests
from tests.scheduler.drive import alone

PAGES = {"num_pages": 15, "num_host_pages": 24, "page_size": 4}
SWAP = PreemptionConfig(preemption_mode="swap")


def random_requests(seed: int, count: int) -> list[EngineRequest]:
    """Requests of which about half want log-probabilities of their tokens or prompts, or of the end of a prompt."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        prompt = tuple(rng.integers(0, 101, rng.integers(1, 34)).tolist())
        found.append(
            EngineRequest(
                f"r{index}",
                prompt,
                max_tokens=int(rng.integers(1, 16)),
                stop_token_ids=tuple(rng.choice(101, 3, replace=False).tolist()),
                logprobs=[None, None, 0, 3, 20][rng.integers(5)],
                prompt_logprobs=[None, None, 0, 2][rng.integers(4)],
                prompt_logprobs_start=int(rng.integers(1, len(prompt) + 1)),
            )
        )
    return found


def serve(core, wanted) -> dict[str, list[FromEngine]]:
    """The outputs of each request."""
    found: dict[str, list] = {one.request_id: [] for one in wanted}
    for one in wanted:
        assert core.handle(AddRequest(one)) == []
    while core.busy:
        for message in core.step():
            for output in outputs(decode(encode(message))):
                found[output.request_id].append(output)
        core.check_integrity()
    return found


def values_of(parts: list[Logprobs | None]) -> list[tuple[float, int, list[int], list[float]]]:
    columns = [part.columns() for part in parts if part is not None]
    rows = []
    for one in columns:
        lists = (one.values, one.ranks, one.top_ids, one.top_values)
        rows += zip(*(part.tolist() for part in lists), strict=True)
    return rows


def expected(positions: list[tuple[int, int]], width: int) -> list[tuple[float, int, list[int], list[float]]]:
    """By the rule: id i at position p has -p - i / 256, so that its rank is i + 1."""
    return [
        (-place - token / 256, token + 1, list(range(width)), [-place - other / 256 for other in range(width)])
        for place, token in positions
    ]


def check(wanted: list[EngineRequest], found: dict[str, list]) -> None:
    for one in wanted:
        answer, prompt = found[one.request_id], one.prompt_token_ids
        tokens = [token for output in answer for token in output.token_ids]
        assert (tokens, answer[-1].finish_reason) == alone(one)
        got = values_of([output.logprobs for output in answer])
        if one.logprobs is None:
            assert got == []
        else:
            got = [(value, rank, ids[: one.logprobs], top[: one.logprobs]) for value, rank, ids, top in got]
            assert got == expected(list(enumerate(tokens, start=len(prompt))), one.logprobs)
        scored = values_of([output.prompt_logprobs for output in answer])
        if one.prompt_logprobs is None:
            assert scored == []
        else:
            start = one.prompt_logprobs_start
            assert scored == expected(list(enumerate(prompt))[start:], one.prompt_logprobs)
            assert all(output.prompt_logprobs is None for output in answer[1:]), "it comes with the first token"


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    tokens_per_step=st.sampled_from([1, 1, 1, 2, 3]),
    mode=st.sampled_from(MODES),
    threshold=st.sampled_from([0, 3, 7]),
    preemption=st.sampled_from([PreemptionConfig(), SWAP]),
    faults=st.lists(st.sampled_from([None] * 6 + [NOT_STARTED, LOST, LATE]), max_size=20),
)
def test_each_token_is_scored_once_and_in_its_place(seed, tokens_per_step, mode, threshold, preemption, faults):
    """Whatever is chunked, preempted, swapped, tried again in halves or lost."""
    wanted = random_requests(seed, 9)
    calls = [call for fault in faults for call in (fault, None)]
    runner = FaultyRunner(calls, tokens_per_step=tokens_per_step, **PAGES)
    core = make_core(runner, mode=mode, long_prefill_token_threshold=threshold, preemption=preemption)
    check(wanted, serve(core, wanted))


@pytest.mark.parametrize("kind", ["recompute", "swap"])
def test_prompts_are_scored_across_preemptions(kind):
    """Prompts in progress are preempted, and requests after their first tokens."""
    wanted = [
        dataclasses.replace(one, prompt_token_ids=tuple(range(1, 22 + index)), logprobs=2, prompt_logprobs=1)
        for index, one in enumerate(requests(6, output=14))
    ]
    core = make_core(
        FakeRunner(**PAGES), long_prefill_token_threshold=3, preemption=PreemptionConfig(preemption_mode=kind)
    )
    check(wanted, serve(core, wanted))
    assert core.scheduler.num_preemptions_by_kind[kind] >= 3


def test_who_wants_none_is_sent_none_and_plans_hold_none():
    plans: list[StepPlan] = []

    class Noting(FakeRunner):
        def dispatch_forward(self, plan: StepPlan):
            plans.append(plan)
            return super().dispatch_forward(plan)

    plain = requests(4)
    core = make_core(Noting())
    found = serve(core, plain)
    assert all(len(plan.scores) == 0 and plan.samples.wants is None and not plan.wants_logprobs for plan in plans)
    assert all(output.logprobs is None and output.prompt_logprobs is None for one in found.values() for output in one)
    # Beside one that wants them, the others' tokens still come in one batch, apart from its own.
    core = make_core(FakeRunner())
    for one in [*plain, dataclasses.replace(plain[0], request_id="wanting", logprobs=1)]:
        core.handle(AddRequest(one))
    found_batches = []
    while core.busy:
        batches = [message for message in core.step() if isinstance(message, TokenBatch)]
        found_batches.append([(len(batch.request_ids), batch.logprobs is None) for batch in batches])
    assert [(4, True), (1, False)] in found_batches


def test_a_prompt_whose_scores_are_not_finite_fails_alone():
    class Broken(FakeRunner):
        def collect(self, pending):
            result = super().collect(pending)
            if result.scores is not None and pending.plan.scores.owners[0][0] == "r1":
                unknown = LogprobColumns.unknown(len(result.scores), result.scores.width)
                result = dataclasses.replace(result, scores=unknown)
            return result

    wanted = [dataclasses.replace(one, prompt_logprobs=0) for one in requests(3)]
    core = make_core(Broken(), max_num_seqs=1)
    found = serve(core, wanted)
    assert found["r1"][-1].finish_reason is FinishReason.ERROR
    assert found["r1"][-1].error == "the model's logits are not finite"
    check([wanted[0], wanted[2]], {name: found[name] for name in ("r0", "r2")})


def test_a_result_must_have_the_scores_of_its_plan():
    core = make_core(FakeRunner())
    core.handle(AddRequest(dataclasses.replace(requests(1)[0], prompt_logprobs=0)))
    plan = core.scheduler.schedule(0.0)
    assert plan is not None
    assert plan.scores.owners == (("r0", 0, 2),)
    step = core.runner.dispatch_forward(plan)
    core.runner.dispatch_sample(plan)
    result = dataclasses.replace(core.runner.collect(step), scores=None)
    with pytest.raises(ValueError, match="step 0 has 0 scores; it scored 2 tokens"):
        core.scheduler.update(plan, result)


def test_columns_are_cut_and_joined():
    columns = LogprobColumns.of([(-0.5, 1, [(7, -0.5), (3, -1.0)]), (-2.0, 5, [(9, -0.25), (8, -0.5)])])
    read = LogprobColumns.from_bytes(columns.width, columns.to_bytes())
    assert (len(read), read.width) == (2, 2)
    narrow = read.narrowed(1)
    assert (narrow.top_ids.tolist(), narrow.top_values.tolist()) == ([[7], [9]], [[-0.5], [-0.25]])
    assert (narrow.values.tolist(), narrow.ranks.tolist()) == ([-0.5, -2.0], [1, 5])
    assert read.narrowed(0).top_ids.shape == (2, 0)
    both = LogprobColumns.joined([read.part(1, 2), read])
    assert both.ranks.tolist() == [5, 1, 5]
    assert both.rows(np.array([False, True, False])).values.tolist() == [-0.5]
    with pytest.raises(ValueError, match="reshape"):
        LogprobColumns.from_bytes(2, b"1234")
