"""Beam search as arithmetic: against plain searches written out in full, on models that are tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.beam_fields import EarlyStopping
from jaxserve.frontend.beams import BeamSearch, SearchRules, num_candidates
from jaxserve.logprob_columns import LogprobColumns
from tests.budgets import budget

FIRST = 0
"""The token before every output."""


def model(seed: int, vocab_size: int, spread: float = 2.0) -> np.ndarray:
    """Log-probabilities float32 [vocab, vocab] of each token after each other."""
    logits = spread * np.random.default_rng(seed).normal(size=(vocab_size, vocab_size))
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


def likeliest(row: np.ndarray, count: int) -> list[tuple[int, float]]:
    ids = np.argsort(-row, kind="stable")[:count].tolist()
    return [(token_id, float(row[token_id])) for token_id in ids]


def searched(table: np.ndarray, rules: SearchRules) -> BeamSearch:
    """Runs a search to its end; also asks for more ids than it looks at, which must not matter."""
    search = BeamSearch(rules)
    while not search.done:
        rows = [table[(FIRST, *beam.token_ids)[-1]] for beam in search.beams]
        top = [likeliest(row, rules.candidates + 3) for row in rows]
        search.advance([LogprobColumns.of([(one[0][1], 1, one)]) for one in top])
        assert len(search.best()) == rules.width
    return search


def plain_vllm(table: np.ndarray, rules: SearchRules) -> list[tuple[int, ...]]:
    """vLLM's search: all ends are kept, and it goes on to max_tokens."""
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    ended: list[tuple[tuple[int, ...], float]] = []
    for _ in range(rules.max_tokens):
        grown = [
            ((*ids, token_id), total + value)
            for ids, total in beams
            for token_id, value in likeliest(table[(FIRST, *ids)[-1]], rules.candidates)
        ]
        ended += [one for one in grown if one[0][-1] in rules.stop_token_ids]
        going_on = [one for one in grown if one[0][-1] not in rules.stop_token_ids]
        beams = sorted(going_on, key=lambda one: -one[1])[: rules.width]

    def score(one: tuple[tuple[int, ...], float]) -> float:
        length = rules.prompt_tokens + len(one[0]) - (one[0][-1] in rules.stop_token_ids)
        return one[1] / length**rules.length_penalty

    return [ids for ids, _ in sorted(ended + beams, key=score, reverse=True)[: rules.width]]


def plain_transformers(table: np.ndarray, rules: SearchRules) -> list[tuple[int, ...]]:
    """transformers' search, over whole rows of the model, with finished places that begin at minus a billion."""
    width, penalty, early = rules.width, rules.length_penalty, rules.early_stopping
    running = [((), 0.0)] + [((), -1e9)] * (width - 1)
    places: list[tuple[float, tuple[int, ...], bool]] = [(-1e9, (), False)] * width
    for length in range(1, rules.max_tokens + 1):
        every = [
            (total + float(value), (*ids, token_id))
            for ids, total in running
            for token_id, value in enumerate(table[(FIRST, *ids)[-1]])
        ]
        every.sort(key=lambda one: -one[0])
        top = every[: max(2, 1 + len(rules.stop_token_ids)) * width]
        hits = [ids[-1] in rules.stop_token_ids or length == rules.max_tokens for _, ids in top]
        running = [(ids, total) for (total, ids), hit in zip(top, hits, strict=True) if not hit][:width]
        ended = [
            (total / length**penalty, ids, True) for (total, ids), hit in zip(top[:width], hits, strict=False) if hit
        ]
        places = sorted(places + ended, key=lambda one: -one[0])[:width]
        if not running:
            break
        full = all(finished for _, _, finished in places)
        longest = rules.max_tokens if early is EarlyStopping.NEVER and penalty > 0 else length
        improves = not full or running[0][1] / longest**penalty > places[-1][0]
        if not improves or (full and early is EarlyStopping.TRUE):
            break
    return [ids for _, ids, _ in places]


@st.composite
def rules_of(draw: st.DrawFn) -> tuple[SearchRules, int]:
    """Rules, and the size of a vocabulary that is large enough for them."""
    width = draw(st.integers(1, 5))
    stops = tuple(draw(st.lists(st.integers(1, 8), max_size=3, unique=True)))
    rules = SearchRules(
        width=width,
        max_tokens=draw(st.integers(1, 7)),
        stop_token_ids=stops,
        prompt_tokens=draw(st.integers(1, 20)),
        length_penalty=draw(st.sampled_from([1.0, 0.0, 0.5, 2.0, -1.0, -0.3])),
        early_stopping=draw(st.sampled_from([None, *EarlyStopping])),
        logprobs=draw(st.sampled_from([None, 0, 2])),
    )
    return rules, num_candidates(width, len(stops)) + draw(st.integers(3, 12))


@budget(300)
@given(asked=rules_of(), seed=st.integers(0, 2**32), spread=st.sampled_from([0.5, 2.0, 5.0]))
def test_outputs_are_those_of_a_search_without_shortcuts(asked, seed, spread):
    rules, vocab_size = asked
    table = model(seed, vocab_size, spread)
    best = searched(table, rules).best()
    plain = plain_vllm if rules.early_stopping is None else plain_transformers
    assert [beam.token_ids for beam in best] == plain(table, rules)
    for beam in best:
        steps = list(itertools.pairwise((FIRST, *beam.token_ids)))
        assert beam.cum_logprob == pytest.approx(math.fsum(table[step] for step in steps), abs=1e-5)
        assert beam.stopped == (beam.token_ids[-1] in rules.stop_token_ids)
        if rules.logprobs is None:
            assert not beam.positions
            continue
        columns = beam.logprobs(rules.logprobs)
        np.testing.assert_array_equal(columns.values, [table[step] for step in steps])
        ranks = [np.count_nonzero(table[before] >= table[before, token_id]) for before, token_id in steps]
        assert columns.ranks.tolist() == ranks
        assert columns.top_ids.tolist() == [
            [one for one, _ in likeliest(table[before], rules.logprobs)] for before, _ in steps
        ]


@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0])
def test_a_beam_as_wide_as_the_model_finds_the_best_of_all_outputs(penalty):
    vocab_size, length, stop = 4, 3, 2
    table = model(4, vocab_size)
    outputs = [
        ids
        for count in range(1, length + 1)
        for ids in itertools.product(range(vocab_size), repeat=count)
        if stop not in ids[:-1] and (ids[-1] == stop or count == length)
    ]

    def score(ids: Sequence[int]) -> float:
        total = sum(float(table[step]) for step in itertools.pairwise((FIRST, *ids)))
        return total / (7 + len(ids) - (ids[-1] == stop)) ** penalty

    width = 3**length
    rules = SearchRules(width, length, (stop,), prompt_tokens=7, length_penalty=penalty)
    search = BeamSearch(rules)
    never = (vocab_size, -1e30)  # ids that the model does not have, which fill the beam
    while not search.done:
        columns = []
        for beam in search.beams:
            last = (FIRST, *beam.token_ids)[-1]
            known = likeliest(table[last], vocab_size) if last < vocab_size else []
            columns.append(LogprobColumns.of([(0.0, 1, known + [never] * (rules.candidates - len(known)))]))
        search.advance(columns)
    best = sorted(map(score, outputs), reverse=True)
    found = [score(beam.token_ids) for beam in search.best()]
    assert found == pytest.approx(best[:width], abs=1e-5)


def test_the_search_ends_as_soon_as_nothing_better_can_be_found():
    """Two ends, nearly certain, are the outputs under every rule; without a shortcut vLLM's would take 50 steps."""
    table = np.full((20, 20), -20.0, np.float32)
    table[:, 1], table[:, 2] = -0.7, -0.71
    for early in (None, *EarlyStopping):
        search = searched(table, SearchRules(2, 50, (1, 2), prompt_tokens=3, length_penalty=0.0, early_stopping=early))
        assert (search.length, [beam.token_ids for beam in search.best()]) == (1, [(1,), (2,)])


def test_before_its_end_a_search_tells_what_there_is():
    rules = SearchRules(3, 9, (1,), prompt_tokens=2, logprobs=0)
    search = BeamSearch(rules)
    assert search.best() == []
    table = model(8, 12)
    table[FIRST, 1] = -0.1
    search.advance([LogprobColumns.of([(0.0, 1, likeliest(table[FIRST], rules.candidates))])])
    first, *others = search.best()
    assert first.token_ids == (1,)
    assert first.stopped
    assert [(len(beam.token_ids), beam.stopped, len(beam.logprobs(0))) for beam in others] == [(1, False, 1)] * 2


@pytest.mark.parametrize(
    ("width", "stops", "count"), [(1, 0, 2), (1, 1, 2), (1, 3, 4), (4, 1, 8), (4, 4, 8), (2, 5, 7)]
)
def test_a_step_looks_at_twice_the_width_and_past_every_end(width, stops, count):
    assert num_candidates(width, stops) == count
