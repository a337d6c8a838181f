"""Groups of layers, against all groupings and against sequences that are grown position by position."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.models.config import ModelConfig
from jaxserve.models.layer_groups import MOST_PADDING, LayerKind, layer_groups, pages_held
from jaxserve.models.layer_specs import LayerSpec, MLPSpec, SelfAttentionSpec
from tests.budgets import budget


def kinds(*windows: int | None) -> list[LayerKind]:
    return [LayerKind(window, 2, 16) for window in windows]


def most_pages(window: int | None, length: int, page_size: int, tokens: int = 1) -> int:
    """Most pages with a position that the tokens of one step write or attend to, over all steps of a sequence."""
    most = 0
    for start in range(length):
        end = min(start + tokens, length)
        oldest = 0 if window is None else max(0, start - window + 1)
        most = max(most, len({position // page_size for position in range(oldest, end)}))
    return most


@budget(200)
@given(st.none() | st.integers(1, 40), st.integers(1, 60), st.integers(1, 9), st.integers(1, 20))
def test_pages_held_are_those_that_some_step_needs(window, length, page_size, tokens):
    held = pages_held(window, length, page_size, tokens)
    needed = most_pages(window, length, page_size, tokens)
    assert needed <= held <= -(-length // page_size)
    if length >= 2 * page_size + (window or 0) + tokens:
        assert held == needed


@budget(100)
@given(
    st.lists(st.sampled_from([None, 4, 4, 9, 30]), min_size=1, max_size=9),
    st.integers(1, 6),
    st.integers(5, 80),
)
def test_the_chosen_groups_are_the_fewest_that_take_hardly_more_than_the_least(windows, page_size, length):
    groups = layer_groups(kinds(*windows), page_size, length)
    seen = [None if window is None or window >= length else window for window in windows]
    assert len(set(groups.places)) == len(windows)
    for (group, array), window in zip(groups.places, seen, strict=True):
        assert array < groups.size
        widest = groups.windows[group]
        assert widest is None or (window is not None and window <= widest)
        assert len(groups.windows) == 1 or widest == window
    assert {group for group, _ in groups.places} == set(range(len(groups.windows)))
    assert groups.padding == groups.size * len(groups.windows) - len(windows)

    counts = Counter(seen)
    pages = {window: most_pages(window, length, page_size) for window in counts}
    found = []  # (groups, pages of one layer) of every grouping
    for size in range(1, len(windows) + 1):
        of_kind = {window: -(-count // size) for window, count in counts.items()}
        found.append((sum(of_kind.values()), size * sum(of_kind[window] * pages[window] for window in counts)))
    if len(counts) > 1:
        found.append((1, len(windows) * max(pages.values())))
    taken = groups.size * sum(most_pages(window, length, page_size) for window in groups.windows)
    assert taken == groups.size * groups.pages(length, page_size)
    most = (1 + MOST_PADDING) * min(size for _, size in found)
    assert (len(groups.windows), taken) == min(one for one in found if one[1] <= most)


def test_layers_of_one_kind_are_one_group_with_an_array_each():
    for window in (None, 7):
        groups = layer_groups(kinds(*[window] * 5), 16, 4096)
        assert (groups.size, groups.windows) == (5, (window,))
        assert groups.places == tuple((0, layer) for layer in range(5))


def test_models_whose_layers_alternate():
    local, full = [1024] * 5, [None]
    gemma = layer_groups(kinds(*(local + full) * 8), 16, 32768)  # 48 layers
    assert (gemma.size, gemma.windows, gemma.padding) == (8, (None, *[1024] * 5), 0)
    assert gemma.places[5::6] == tuple((0, array) for array in range(8))
    gpt_oss = layer_groups(kinds(*[128, None] * 12), 16, 32768)
    assert (gpt_oss.size, gpt_oss.windows, gpt_oss.padding) == (12, (None, 128), 0)
    small = layer_groups(kinds(*(local + full) * 5, *local[:4]), 16, 32768)  # 34 layers: the last group lacks one
    assert (small.size, small.windows, small.padding) == (5, (None, *[1024] * 6), 1)


def test_a_window_that_saves_nothing_makes_no_group():
    assert layer_groups(kinds(*[4096, None] * 3), 16, 4096).windows == (None,)  # as long as the longest sequence
    assert layer_groups(kinds(*[4096, None] * 3), 16, 4200).windows == (None,)  # hardly shorter
    assert layer_groups(kinds(*[16, 12] * 3), 16, 4096).windows == (16,)
    assert layer_groups(kinds(*[4096] * 3), 16, 4096).windows == (None,)


def test_the_layers_of_a_config():
    layers = tuple(LayerSpec(SelfAttentionSpec(sliding_window=window), MLPSpec(48)) for window in (6, None))
    model = ModelConfig("LlamaForCausalLM", 96, 32, 48, 2, 2, 1, 16, 256, layers=layers, sliding_window=6)
    assert model.layer_kinds == (LayerKind(6, 1, 16), LayerKind(None, 1, 16))
    assert dataclasses.replace(model, layers=None, sliding_window=None).layer_kinds == (LayerKind(None, 1, 16),) * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: layer_groups([LayerKind(None, 8, 64), LayerKind(None, 8, 64), LayerKind(4, 4, 64)], 16, 64),
            r"^layer 2 has 4 key-value heads of 64 and layer 0 has 8 of 64; all layers share one page pool, so their",
        ),
        (lambda: layer_groups([LayerKind(None, 8, 64), LayerKind(None, 8, 32)], 16, 64), "^layer 1 has 8 key-value he"),
        (lambda: layer_groups(kinds(0), 16, 64), r"^window of layer 0 is 0; it must be a whole number of at least 1$"),
        (lambda: layer_groups(kinds(4), 16, 0), r"^length is 0; it must be a whole number of at least 1$"),
        (lambda: layer_groups(kinds(4), 0, 8), r"^page_size is 0; it must be a whole number of at least 1$"),
    ],
)
def test_what_cannot_share_a_pool_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_more_groups_are_not_chosen_for_nothing():
    """Two kinds of coprime numbers of layers: no group of one layer each, though it has no padding."""
    for full, local in itertools.product(range(1, 8), range(1, 8)):
        groups = layer_groups(kinds(*[None] * full, *[32] * local), 16, 65536)
        assert len(groups.windows) <= -(-local // full) + 1
