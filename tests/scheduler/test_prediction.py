"""The predictor of output lengths: bounds, coverage on mixed and drifting lengths, ranking, memory."""

import random
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.scheduling import PredictionConfig
from jaxserve.request import EngineRequest, RequestOptions
from jaxserve.scheduler import length_prediction as prediction
from jaxserve.scheduler.kendall import kendall_tau
from jaxserve.scheduler.length_prediction import OutputLengthPredictor
from tests.budgets import budget


def request(prompt: int = 50, max_tokens: int = 2048, tenant: str = "", min_tokens: int = 0, stop: bool = True):
    return EngineRequest(
        request_id="r",
        prompt_token_ids=(1,) * prompt,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        options=RequestOptions(tenant=tenant),
        stop_token_ids=(2,) if stop else (),
    )


def mixed(rng: random.Random, step: int) -> tuple[EngineRequest, float]:
    """Three tenants; one of them generates more for longer prompts."""
    tenant, prompt = rng.choice("abc"), rng.choice((20, 200, 900))
    mean = {"a": 30.0, "b": 400.0, "c": prompt / 2}[tenant]
    return request(prompt, tenant=tenant), rng.lognormvariate(0.0, 0.5) * mean


def drifting(rng: random.Random, step: int) -> tuple[EngineRequest, float]:
    """Lengths rise sixteenfold over 4,000 requests."""
    return request(rng.choice((20, 200))), rng.lognormvariate(0.0, 0.5) * 20 * 2 ** (step / 1000)


def jumping(rng: random.Random, step: int) -> tuple[EngineRequest, float]:
    """Lengths are five times as long, and back again, every 700 requests."""
    return request(), rng.lognormvariate(0.0, 0.5) * (40 if step // 700 % 2 else 200)


Workload = Callable[[random.Random, int], tuple[EngineRequest, float]]


@pytest.mark.parametrize("workload", [mixed, drifting, jumping])
def test_a_share_q_of_outputs_lies_within_quantile_q(workload: Workload):
    rng = random.Random(5)
    predictor = OutputLengthPredictor(PredictionConfig())
    quantiles = (0.3, 0.5, 0.8, 0.9)
    covered = dict.fromkeys(quantiles, 0)
    count = 4000
    for step in range(count):
        asked, length = workload(rng, step)
        output = min(max(1, round(length)), asked.max_tokens)
        for q in quantiles:
            covered[q] += output <= predictor.quantile(asked, q)
        predictor.observe(asked, output)
    assert {q: covered[q] / count for q in quantiles} == {q: pytest.approx(q, abs=0.04) for q in quantiles}


def test_without_the_correction_drift_breaks_coverage(monkeypatch: pytest.MonkeyPatch):
    """What the correction is for; the test above holds because of it."""
    monkeypatch.setattr(prediction, "CORRECTION_RATE", 0.0)
    with pytest.raises(AssertionError):
        test_a_share_q_of_outputs_lies_within_quantile_q(drifting)


def test_ranks_requests_by_tenant_and_prompt():
    rng = random.Random(7)
    predictor = OutputLengthPredictor(PredictionConfig(prediction_window=256))
    seen: list[tuple[float, float]] = []
    for step in range(1000):
        asked, length = mixed(rng, step)
        output = min(max(1, round(length)), asked.max_tokens)
        expected = predictor.expected(asked)
        seen.append((expected, output))
        predictor.observe(asked, output, expected)
    assert predictor.kendall_tau == pytest.approx(kendall_tau(seen[-256:]))
    assert predictor.kendall_tau is not None
    assert predictor.kendall_tau > 0.5
    assert predictor.num_observed == 1000


def test_it_ranks_what_was_predicted_on_arrival():
    """What the requests of a batch teach comes too late for those that were in it."""
    predictor = OutputLengthPredictor(PredictionConfig())
    lengths = {200: 5, 100: 50, 20: 300}  # the longer a prompt the shorter its output
    asked = [request(prompt, tenant=str(prompt)) for prompt in lengths for _ in range(20)]
    expected = [predictor.expected(one) for one in asked]
    for one, before in zip(asked, expected, strict=True):
        predictor.observe(one, lengths[len(one.prompt_token_ids)], before)
    pairs = [(before, float(lengths[len(one.prompt_token_ids)])) for one, before in zip(asked, expected, strict=True)]
    assert predictor.kendall_tau == kendall_tau(pairs) == pytest.approx(-1.0)
    for one in asked:
        predictor.observe(one, lengths[len(one.prompt_token_ids)], predictor.expected(one))
    later = predictor.kendall_tau
    assert later is not None
    assert later > -0.1  # by now it knows
    predictor.observe(asked[0], 5)
    assert predictor.num_observed == 121


def test_knowing_nothing_it_goes_by_the_limits():
    predictor = OutputLengthPredictor(PredictionConfig())
    assert predictor.kendall_tau is None
    by_limit = [predictor.expected(request(max_tokens=limit)) for limit in (1, 16, 256, 1024)]
    assert by_limit == sorted(set(by_limit))
    assert by_limit[0] == 1.0
    unlimited = [predictor.expected(request(prompt, max_tokens=100_000)) for prompt in (10, 1000, 10_000)]
    assert unlimited == sorted(set(unlimited))
    assert unlimited[-1] < 1000
    assert predictor.expected(request(max_tokens=300, stop=False)) == 300.0  # nothing but the limit ends it
    assert predictor.expected(request(min_tokens=100)) >= 100.0


def test_a_first_request_moves_the_prediction_little_and_many_decide_it():
    predictor = OutputLengthPredictor(PredictionConfig())
    asked = request(max_tokens=1000)
    before = predictor.expected(asked)
    predictor.observe(asked, 5)
    assert 0.8 * before < predictor.expected(asked) < before
    for _ in range(40):
        predictor.observe(asked, 5)
    assert predictor.expected(asked) == 5.0


def test_a_new_tenant_is_predicted_from_the_others():
    predictor = OutputLengthPredictor(PredictionConfig())
    for _ in range(50):
        predictor.observe(request(30, tenant="a"), 7)
        predictor.observe(request(800, tenant="a"), 300)
    assert predictor.expected(request(30, tenant="new")) == 7.0
    assert predictor.expected(request(800, tenant="new")) == 300.0


def test_outputs_that_run_into_their_limit_predict_the_limit():
    predictor = OutputLengthPredictor(PredictionConfig())
    for limit in (600, 700, 800) * 20:
        predictor.observe(request(max_tokens=limit), limit)
    assert predictor.expected(request(max_tokens=1000)) == 1000.0


def test_tenants_used_least_recently_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prediction, "MAX_GROUPS", 20)
    predictor = OutputLengthPredictor(PredictionConfig())
    for _ in range(20):
        predictor.observe(request(tenant="constant"), 11)
    for number in range(200):
        predictor.observe(request(tenant=f"passing {number}"), 500)
        if number % 4 == 0:
            predictor.observe(request(tenant="constant"), 11)
        assert predictor.num_groups <= 20
    assert predictor.expected(request(tenant="constant")) == 11.0
    assert predictor.expected(request(tenant="passing 3")) == 500.0  # from the group of all tenants


def test_a_group_takes_bounded_memory():
    group = prediction._Group(window=64)
    for length in range(10_000):
        group.add(length)
    assert len(group) == 64
    assert group.at(0.5) == 10_000 - 32
    assert sys.getsizeof(group._lengths) + sys.getsizeof(group._sorted) < 64 * 8 * 3 + 200


requests = st.builds(
    lambda prompt, limit, least, tenant, stop: request(prompt, limit, tenant, min(least, limit), stop),
    st.integers(1, 300),
    st.integers(1, 500),
    st.integers(0, 50),
    st.sampled_from("ab"),
    st.booleans(),
)
histories = st.lists(st.tuples(requests, st.floats(0.0, 1.0)), max_size=30)


@budget(40)
@given(histories, requests, st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_quantiles_are_ordered_and_keep_to_the_limits(
    history: list[tuple[EngineRequest, float]], asked: EngineRequest, q: float, other: float
):
    predictor, again = OutputLengthPredictor(PredictionConfig()), OutputLengthPredictor(PredictionConfig())
    for seen, share in history:
        output = max(1, seen.min_tokens, round(share * seen.max_tokens))
        predictor.observe(seen, output)
        again.observe(seen, output)
    low, high = sorted((q, other))
    assert max(1, asked.min_tokens) <= predictor.quantile(asked, low)
    assert predictor.quantile(asked, low) <= predictor.quantile(asked, high) * (1 + 1e-9)
    assert predictor.quantile(asked, high) <= asked.max_tokens
    assert predictor.expected(asked) == again.expected(asked) == predictor.quantile(asked, 0.5)


@pytest.mark.parametrize("q", [0.0, 1.0, -1.0, float("nan")])
def test_a_quantile_lies_between_0_and_1(q: float):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        OutputLengthPredictor(PredictionConfig()).quantile(request(), q)
