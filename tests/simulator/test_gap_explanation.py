"""What explain says of max_decode_gap, against steps of every size and against the simulated engine."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from jaxserve.config import gin_config
from jaxserve.config.targets import load_target
from jaxserve.planning.explanation_report import _gap
from jaxserve.planning.gap_explanation import GapExplanation, explain_gap
from jaxserve.planning.roofline import RooflineCosts
from jaxserve.scheduler.buckets import Buckets, powers
from jaxserve.scheduler.decode_gap import mixed_step
from jaxserve.simulator import ClientRule, find_target, make_trace, set_up, simulate, with_options
from tests.simulator.test_costs import H200, LLAMA_8B

BUCKETS = Buckets(powers(8192), powers(256))
COSTS = RooflineCosts(LLAMA_8B, load_target("h200"), **H200)


@pytest.mark.parametrize("bound", [0.01, 0.02, 0.1])
def test_the_tokens_are_the_most_that_fit(bound):
    found = explain_gap(COSTS.seconds, "", bound, BUCKETS, 8192, [(1, 1024), (64, 1024), (64, 8192), (256, 1024)])
    for cost in found.costs:

        def seconds(count: int, rows: int = cost.rows, context: int = cost.context) -> float:
            return COSTS.seconds(mixed_step(rows, rows * context, count, context, BUCKETS))

        fitting = [
            size - cost.rows for size in BUCKETS.tokens if size > cost.rows and seconds(size - cost.rows) <= bound
        ]
        assert cost.kept == bool(fitting)
        assert cost.seconds == seconds(cost.tokens)
        assert (cost.free_tokens, cost.free_seconds) == (8192 - cost.rows, seconds(8192 - cost.rows))
        if fitting:
            assert cost.seconds <= bound
            assert cost.rate >= max(count / seconds(count) for count in fitting[-1:])
        else:
            assert cost.tokens + cost.rows == BUCKETS.token_bucket(cost.rows + 8)


def test_the_text_marks_what_exceeds_the_bound():
    explanation: Any = types.SimpleNamespace(gap=explain_gap(COSTS.seconds, "h", 0.01, BUCKETS, 8192, [(64, 8192)]))
    head, titles, row, note = _gap(explanation)
    assert head.startswith("max_decode_gap 10 ms, promised where decodes alone take up to 7 ms")
    assert titles.split()[0] == "rows"
    assert row.split()[:4] == ["64", "8,192", "25.09", "(64)"]
    assert "exceeds the bound" in note
    explanation.gap = GapExplanation(0.01, "", unknown="no rates")
    assert list(_gap(explanation)) == ["max_decode_gap 10 ms: its cost is unknown, no rates"]


def test_the_simulated_engine_keeps_it_on_an_h200():
    config = with_options(gin_config.load("llama.gin")[0].engine, {"max_decode_gap": 0.02})
    setup = set_up(config, target=find_target("h200"))
    lengths = np.random.default_rng(0).integers(2000, 8001, 6).tolist()
    trace = make_trace("gap", [0.0] * 16 + [0.2] * 6, [64] * 16 + lengths, [300] * 16 + [2] * 6)
    result = simulate(setup.config, trace, setup.costs, setup.device, client=ClientRule("exact"))
    assert result.completed.all()
    gaps = np.concatenate([np.diff(times) for times in result.token_times])
    assert 0.015 < gaps.max() <= 0.02
