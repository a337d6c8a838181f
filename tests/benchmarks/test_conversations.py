"""The judge of the prefix identity benchmark: it sees hits that nothing explains, and what is drawn has every kind."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from benchmarks.conversations import Turn, draw_turns, most_tokens, unexplained_hits
from jaxserve.frontend.offline import FinishedRequest, FinishedSample
from jaxserve.request import FinishReason, RequestOptions
from jaxserve.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=3)
FIRST = Turn("first", None, tuple(range(20)), PARAMS, RequestOptions("a"))


def finished(turn: Turn, cached: int) -> FinishedRequest:
    return FinishedRequest(turn.name, turn.text, (FinishedSample((7, 8, 9), "", FinishReason.LENGTH),), cached)


@pytest.mark.parametrize(
    ("change", "cached", "wrong"),
    [
        ({}, 0, False),
        ({}, 16, False),
        ({}, 8, False),
        ({}, 10, True),  # part of a page
        ({"text": tuple(range(8)) + (1,) * 12}, 8, False),
        ({"text": tuple(range(8)) + (1,) * 12}, 16, True),  # other tokens
        ({"text": (*range(20), 7, 8, 9, 5, 5)}, 16, False),
        ({"text": (*range(20), 7, 8, 9, 1, 5)}, 24, True),  # the last one was not computed by the first request
        ({"options": RequestOptions("b")}, 16, True),
        ({"options": RequestOptions("a", cache_salt="s")}, 16, True),
        ({"options": RequestOptions("a", prefix_caching=False)}, 16, True),
    ],
)
def test_hits_are_explained_by_what_another_of_the_tenant_filled(change, cached, wrong):
    second = dataclasses.replace(FIRST, name="second", **change)
    answers = {"first": finished(FIRST, 0), "second": finished(second, cached)}
    assert unexplained_hits([FIRST, second], answers.__getitem__, 8) == ["second"] * wrong


def test_a_request_does_not_explain_its_own_hits():
    assert unexplained_hits([FIRST], lambda _: finished(FIRST, 8), 8) == ["first"]


def test_conversations_have_turns_of_every_kind_behind_those_that_they_follow():
    texts = [tuple(range(3, 3 + count)) for count in (4, 9, 17)]
    turns = draw_turns(60, texts, [PARAMS, SamplingParams(max_tokens=5, temperature=1.0, n=2)], seed=1)
    assert turns == draw_turns(60, texts, [PARAMS, SamplingParams(max_tokens=5, temperature=1.0, n=2)], seed=1)
    seen: set[str | None] = {None}
    for turn in turns:
        assert turn.after in seen
        seen.add(turn.name)
    kinds = Counter(turn.kind for turn in turns)
    assert set(kinds) == {"generated", "embedded, LAST", "embedded, MEAN", "embedded, CLS"}
    assert any(turn.abort_after for turn in turns)
    assert any(turn.name.endswith("branch") for turn in turns)
    assert any(not turn.options.prefix_caching for turn in turns)
    assert len({(turn.options.tenant, turn.options.cache_salt) for turn in turns}) == 6
    assert max(len(turn.text) for turn in turns) < most_tokens(turns) < 600
