"""The sampler against a plain numpy statement of each option, and its independence of the batch."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from jaxserve.engine.constraints import pack_mask
from jaxserve.programs import logit_rows
from jaxserve.programs.compiler import compiler_options
from jaxserve.programs.filters import _kept, _Search, filter_logits
from jaxserve.programs.logit_rows import argmax
from jaxserve.programs.penalties import Penalties
from jaxserve.programs.sampler import sample
from jaxserve.programs.slots import Slots
from jaxserve.scheduler.plan import NOT_FINITE, NOTHING_ALLOWED
from tests.budgets import budget

VOCAB = 50
SLOTS = 16
sample_jit = jax.jit(sample)
filter_jit = jax.jit(filter_logits)
kept_jit = {on_cpu: jax.jit(lambda *a, c=on_cpu: _kept(*a, c)) for on_cpu in (True, False)}


def kept_by_sorting(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Token ids that the three filters leave, by sorting, in float64."""
    values = logits.astype(np.float64)
    probability = np.exp(values - values.max())
    kept = {i for i in range(len(values)) if probability[i] >= min_p * probability.max()}
    if 0 < top_k < len(values):
        least = sorted((values[i] for i in kept), reverse=True)[:top_k][-1]
        kept = {i for i in kept if values[i] >= least}
    if top_p < 1.0:
        total, chosen = 0.0, set()
        mass = sum(probability[i] for i in kept)
        for i in sorted(kept, key=lambda i: -values[i]):
            if total >= top_p * mass:
                break
            chosen.add(i)
            total += probability[i]
        kept = chosen
    return kept


@budget(200)
@given(
    seed=st.integers(0, 2**32 - 1),
    top_k=st.sampled_from([-1, 0, 1, 2, 7, 49, 50, 1000]),
    top_p=st.sampled_from([1e-50, 0.01, 0.3, 0.75, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_filters_keep_what_sorting_keeps(seed, top_k, top_p, min_p, spread):
    logits = (np.random.default_rng(seed).standard_normal((2, VOCAB)) * spread).astype(np.float32)
    wanted = [kept_by_sorting(row, top_k, top_p, min_p) for row in logits]
    off = (np.array([top_k, 0], np.int32), np.array([top_p, 1.0], np.float32), np.array([min_p, 0.0], np.float32))
    found = np.asarray(filter_jit(logits, *off, np.array([True, True])))
    assert set(np.flatnonzero(np.isfinite(found[0]))) == wanted[0]
    assert_array_equal(found[1], logits[1])  # a row without options is left alone
    assert_array_equal(found[0][sorted(wanted[0])], logits[0][sorted(wanted[0])])


@budget(100)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([1e-38, 1e-3, 1.0, 1e30]),
    share=st.floats(-0.1, 1.1),
    most_units=st.sampled_from([1, 3, 2**20]),
    counts=st.booleans(),
)
def test_a_search_leaves_the_fewest_that_measure_enough(seed, spread, share, most_units, counts):
    random = np.random.default_rng(seed)
    keys = (random.integers(-20, 20, VOCAB) * spread + random.integers(0, 2, VOCAB) * spread / 7).astype(np.float32)
    keys[random.random(VOCAB) < 0.2] = -np.inf
    keys[random.integers(VOCAB)] = 0.0
    units = np.isfinite(keys).astype(np.int32)
    if not counts:
        units *= random.integers(0, most_units, VOCAB, endpoint=True, dtype=np.int32)
    wanted = int(np.ceil(share * units.sum()))
    enough = [key for key in keys[np.isfinite(keys)] if units[keys >= key].sum() >= wanted]
    kept = keys >= (keys.max() if wanted <= 0 else max(enough, default=-np.inf))
    search = _Search(keys[None], units[None], np.array([wanted], np.int32), np.array(counts))
    for on_cpu in (True, False):
        found = np.asarray(kept_jit[on_cpu](keys[None], search, np.array([True])))[0]
        assert_array_equal(found, np.where(kept, keys, -np.inf), err_msg=f"on_cpu {on_cpu}")


def make_slots(**fields) -> Slots:
    slots = Slots.zeros(SLOTS, 4)
    set_ones = {name: jnp.asarray(value) for name, value in fields.items()}
    assert set(set_ones) <= set(slots.sampling)
    return dataclasses.replace(slots, sampling=slots.sampling | set_ones)


def call(logits, slots, slot, position=None, suppress=None, masked=None, masks=None) -> np.ndarray:
    """masks: bool [slots, vocabulary], of the slots."""
    told = {"slot": slot, "position": position, "suppress_stop": suppress, "masked": masked}
    fields = {name: np.array(np.zeros(len(slot)) if row is None else row, np.int32) for name, row in told.items()}
    masks = np.zeros((SLOTS, np.shape(logits)[1]), bool) if masks is None else masks
    packed = np.stack([pack_mask(mask) for mask in masks])
    penalties = Penalties.zeros(1, np.shape(logits)[1])
    return np.asarray(sample_jit(jnp.asarray(logits, jnp.float32), slots, packed, penalties, fields))


def test_greedy_is_argmax():
    logits = np.random.default_rng(0).standard_normal((8, VOCAB))
    assert_array_equal(call(logits, make_slots(), range(8)), logits.astype(np.float32).argmax(-1))


def test_greedy_and_random_rows_share_a_batch():
    logits = np.random.default_rng(1).standard_normal((8, VOCAB))
    temperature = np.zeros(SLOTS, np.float32)
    temperature[::2] = 1.0
    seeds = np.arange(2 * SLOTS, dtype=np.uint32).reshape(SLOTS, 2)
    slots = make_slots(temperature=temperature, seed=seeds)
    ids = call(logits, slots, range(8))
    assert_array_equal(ids[1::2], logits.astype(np.float32).argmax(-1)[1::2])
    assert_array_equal(ids, call(logits, slots, range(8)))


def test_a_draw_depends_on_seed_and_position_alone():
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((8, VOCAB))
    temperature = np.full(SLOTS, 0.8, np.float32)
    seeds = rng.integers(0, 2**32, (SLOTS, 2), dtype=np.uint32)
    seeds[9] = seeds[3]
    slots = make_slots(temperature=temperature, seed=seeds)
    position = np.arange(8) + 5
    ids = call(logits, slots, range(8), position)
    for row in range(8):  # another slot of the same seed, another row, other neighbors
        moved = np.roll(logits, 5 - row, axis=0)
        slot = [9 if row == 3 and i == 5 else (i + row - 5) % 8 for i in range(8)]
        assert call(moved, slots, slot, np.roll(position, 5 - row))[5] == ids[row]
    draws = [call(logits, slots, range(8), position + step)[0] for step in range(40)]
    assert len(set(draws)) > 5


def test_draws_follow_the_distribution():
    """Chi-square over 4,000 draws of a six-token distribution, fixed seeds."""
    probability = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = np.full((8, VOCAB), -np.inf)
    logits[:, :5] = np.log(probability)
    logits = np.nan_to_num(logits, neginf=-1e30)
    slots = make_slots(
        temperature=np.ones(SLOTS, np.float32), seed=np.arange(2 * SLOTS, dtype=np.uint32).reshape(SLOTS, 2)
    )
    draws = np.concatenate([call(logits, slots, range(8), np.full(8, step)) for step in range(500)])
    counts = np.bincount(draws, minlength=5)
    assert counts[5:].sum() == 0
    expected = probability * len(draws)
    assert ((counts[:5] - expected) ** 2 / expected).sum() < 18.47  # the 0.1 % point of 4 degrees of freedom


def test_temperature_sharpens():
    logits = np.tile(np.log([0.5, 0.25, 0.25] + [1e-9] * (VOCAB - 3)), (8, 1))
    slots = make_slots(
        temperature=np.full(SLOTS, 0.1, np.float32), seed=np.arange(2 * SLOTS, dtype=np.uint32).reshape(SLOTS, 2)
    )
    draws = np.concatenate([call(logits, slots, range(8), np.full(8, step)) for step in range(50)])
    assert (draws == 0).mean() > 0.99


@pytest.mark.parametrize("temperature", [1e-45, 2e-38, 1e-6])
def test_the_smallest_temperatures_are_greedy(temperature):
    logits = np.random.default_rng(5).standard_normal((8, VOCAB)) * 10
    slots = make_slots(temperature=np.full(SLOTS, temperature, np.float32))
    assert_array_equal(call(logits, slots, range(8)), logits.astype(np.float32).argmax(-1))


def test_stop_ids_are_suppressed_where_asked():
    logits = np.random.default_rng(3).standard_normal((8, VOCAB))
    best = logits.argsort(-1)[:, ::-1]
    stops = np.full((SLOTS, 32), -1, np.int32)
    stops[:8, 0] = best[:, 0]
    stops[:8, 5] = best[:, 1]
    suppress = np.array([1, 0] * 4)
    ids = call(logits, make_slots(stop_token_ids=stops), range(8), suppress=suppress)
    assert_array_equal(ids, np.where(suppress, best[:, 2], best[:, 0]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_rows_are_told_and_neighbors_unchanged(bad):
    logits = np.random.default_rng(4).standard_normal((8, VOCAB))
    slots = make_slots(temperature=np.ones(SLOTS, np.float32))
    clean = call(logits, slots, range(8))
    logits[3, 7] = bad
    ids = call(logits, slots, range(8))
    assert ids[3] == NOT_FINITE
    assert_array_equal(np.delete(ids, 3), np.delete(clean, 3))


def test_padding_rows_cost_no_draw_and_touch_no_slot():
    logits = np.zeros((8, VOCAB))
    slots = make_slots(temperature=np.ones(SLOTS, np.float32))
    assert_array_equal(call(logits, slots, [SLOTS] * 8), np.zeros(8))


@pytest.mark.parametrize("vocab", [1, 7, VOCAB, 128, 509, 768, 1000])
def test_the_lowest_of_equal_logits_wins(vocab):
    rng = np.random.default_rng(6)
    logits = rng.integers(-3, 3, (8, vocab)).astype(np.float32)
    logits[1] = 2.5
    logits[2] = -np.arange(vocab)[::-1] * 1e-30
    logits[3] = np.finfo(np.float32).min
    logits[4] = np.finfo(np.float32).max
    logits[5] = np.where(np.arange(vocab) % 2, 0.0, -0.0)  # equal: the lowest place is a -0.0
    logits[6] = np.where(np.arange(vocab) % 2, -0.0, -1.0)
    logits[7] = 0.0
    logits[7, vocab * 2 // 3 :: max(1, vocab // 7)] = 3.0  # the first block that holds the largest is not the first
    assert_array_equal(jax.jit(argmax)(logits), logits.argmax(-1))
    if vocab == VOCAB:
        assert_array_equal(call(logits, make_slots(), range(8)), logits.argmax(-1))


def test_the_largest_of_a_row_is_found_in_one_pass_that_is_vectorized():
    """XLA likes to read the logits twice, for the largest of each block and for the row's."""
    lowered = jax.jit(argmax).lower(jax.ShapeDtypeStruct((64, 8192), np.float32))
    text = lowered.compile(compiler_options("cpu")).as_text()
    assert len(re.findall(r"^%\S*reduce\S* \(.*f32\[64,(?:8192|64,128)\]", text, re.MULTILINE)) == 1, text
    assert not re.search(r"f32\[\S* maximum\(", text), "this one looks for NaN as well, and is not vectorized"


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_that_do_not_fit_the_cache_are_drawn_in_groups_of_the_same_ids(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((8, VOCAB)) * 4).astype(np.float32)
    slots = make_slots(
        temperature=rng.choice([0.0, 0.7, 2.0], SLOTS).astype(np.float32),
        top_k=rng.choice([0, 5, 20], SLOTS).astype(np.int32),
        top_p=rng.choice([1.0, 0.6], SLOTS).astype(np.float32),
        min_p=rng.choice([0.0, 0.05], SLOTS).astype(np.float32),
        stop_token_ids=rng.integers(0, VOCAB, make_slots().sampling["stop_token_ids"].shape).astype(np.int32),
    )
    rows = rng.permutation(SLOTS)[:8]
    fields = {"position": rng.integers(0, 99, 8), "suppress": rng.integers(0, 2, 8), "masked": rng.integers(0, 2, 8)}
    masks = rng.random((SLOTS, VOCAB)) < 0.5
    whole = call(logits, slots, rows, **fields, masks=masks)
    monkeypatch.setattr(logit_rows, "CACHED", 2 * VOCAB)
    monkeypatch.setitem(globals(), "sample_jit", jax.jit(lambda *arguments: sample(*arguments)))
    groups = jax.make_jaxpr(lambda values: logit_rows.in_groups(lambda one, _: one[:, 0], values, ()))(logits)
    assert "length=4" in str(groups)
    assert_array_equal(call(logits, slots, rows, **fields, masks=masks), whole)


def test_a_filter_keeps_ties_together_and_the_noise_decides():
    logits = np.zeros((8, VOCAB), np.float32)
    logits[:, [4, 9]] = 1.0
    slots = make_slots(temperature=np.full(SLOTS, 1e-30, np.float32), top_k=np.ones(SLOTS, np.int32))
    drawn = {int(i) for step in range(8) for i in call(logits, slots, range(8), np.arange(8) + 8 * step)}
    assert drawn == {4, 9}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("suppress", [0, 1])
def test_every_kind_of_not_finite_is_told_wherever_it_stands(temperature, suppress):
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF, 0x7F800000, 0xFF800000, 0], np.uint32)
    slots = make_slots(temperature=np.full(SLOTS, temperature, np.float32))
    for place in (0, 17, VOCAB - 1):
        logits = np.random.default_rng(7).standard_normal((8, VOCAB)).astype(np.float32)
        logits[:, place] = bits.view(np.float32)
        ids = call(logits, slots, range(8), suppress=np.full(8, suppress))
        assert_array_equal(ids[:7], NOT_FINITE)
        assert 0 <= ids[7] < VOCAB


def test_a_suppressed_neighbor_changes_no_row():
    logits = np.random.default_rng(8).standard_normal((8, VOCAB)).astype(np.float32)
    logits[2] = 1.0
    temperature = np.where(np.arange(SLOTS) % 2, 0.7, 0.0).astype(np.float32)
    stops = np.tile(np.arange(32, dtype=np.int32), (SLOTS, 1))
    slots = make_slots(temperature=temperature, stop_token_ids=stops)
    alone = call(logits, slots, range(8))
    beside = call(logits, slots, range(8), suppress=np.eye(8, dtype=np.int32)[5])
    assert_array_equal(np.delete(beside, 5), np.delete(alone, 5))
    assert beside[5] >= 32


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_every_token_is_suppressed_takes_one_of_them(temperature):
    stops = np.tile(np.arange(32, dtype=np.int32), (SLOTS, 1))
    slots = make_slots(stop_token_ids=stops, temperature=np.full(SLOTS, temperature, np.float32))
    logits = np.random.default_rng(9).standard_normal((8, 32))
    ids = call(logits, slots, range(8), suppress=np.ones(8))
    assert ((ids >= 0) & (ids < 32)).all()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_mask_leaves_what_it_allows_and_the_neighbors_alone(temperature):
    rng = np.random.default_rng(11)
    logits = rng.standard_normal((8, VOCAB))
    slots = make_slots(
        temperature=np.full(SLOTS, temperature, np.float32),
        seed=rng.integers(0, 2**32, (SLOTS, 2), dtype=np.uint32),
        stop_token_ids=np.tile(np.array([7, 9, *[-1] * 30], np.int32), (SLOTS, 1)),
    )
    masks = rng.random((SLOTS, VOCAB)) < 0.2
    masks[3] = np.arange(VOCAB) == 49  # the last one, in a word that is not full
    masks[4] = np.isin(np.arange(VOCAB), (7, 9, 20))  # but for two that min_tokens forbids
    free, masked = call(logits, slots, range(8)), np.array([0, 1, 0, 1, 1, 0, 0, 0])
    suppress = [0, 0, 0, 0, 1, 0, 0, 0]
    for step in range(5):
        position = np.full(8, step)
        free = call(logits, slots, range(8), position)
        found = call(logits, slots, range(8), position, suppress, masked, masks)
        assert_array_equal(found[masked == 0], free[masked == 0])
        assert masks[1][found[1]]
        assert (found[3], found[4]) == (49, 20)
        # What is allowed is drawn as if there were nothing else.
        alone = call(np.where(masks[:8] | (masked == 0)[:, None], logits, -1e30), slots, range(8), position, suppress)
        if not temperature:
            assert_array_equal(found, alone)
    everything = np.ones((SLOTS, VOCAB), bool)
    free = call(logits, slots, range(8))
    assert_array_equal(call(logits, slots, range(8), None, None, masked, everything), free)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_row_that_may_draw_nothing_is_told(temperature):
    logits = np.random.default_rng(12).standard_normal((8, VOCAB))
    logits[5] = np.nan
    slots = make_slots(
        temperature=np.full(SLOTS, temperature, np.float32),
        stop_token_ids=np.tile(np.array([7, *[-1] * 31], np.int32), (SLOTS, 1)),
    )
    masks = np.zeros((SLOTS, VOCAB), bool)
    masks[3, 7] = True  # a stop id, which min_tokens forbids
    found = call(logits, slots, range(8), None, [0, 0, 0, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 0, 0], masks)
    free = call(logits, slots, range(8))
    assert found[[1, 3, 5]].tolist() == [NOTHING_ALLOWED, NOTHING_ALLOWED, NOT_FINITE]
    assert_array_equal(found[[0, 2, 4, 6, 7]], free[[0, 2, 4, 6, 7]])
