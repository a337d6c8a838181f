"""Rows that share pages on a CPU: they read them together, and no bit tells."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.pallas_kernels.paged_attention import paged_attention
from jaxserve.pallas_kernels.paged_attention.cpu import attend_plan as plans
from jaxserve.pallas_kernels.paged_attention.cpu import attention_calls as calls
from tests.budgets import budget
from tests.kernels.packing import arranged, bits, needs_avx512_bf16
from tests.kernels.shared_prefixes import Branch, SharedStep, Sizes, branches

SHAPES = [
    Sizes(4, 3, 64, 16),
    Sizes(4, 4, 32, 64, sinks=True),
    Sizes(2, 1, 64, 128, tokens=34, rows=34, max_len=384),  # items of single rows take all heads
    Sizes(2, 8, 32, 32, sliding_window=200),
    Sizes(4, 3, 32, 16, sliding_window=65, sinks=True),
]
FLOATS = [
    Sizes(4, 3, 64, 16, dtype="float32", pool_dtype="float32"),
    Sizes(2, 2, 32, 16, sliding_window=65, sinks=True, dtype="float32", pool_dtype="float32"),
]
CASES = [
    *(pytest.param(sizes, marks=needs_avx512_bf16, id=str(sizes)) for sizes in SHAPES),
    *(pytest.param(sizes, id=str(sizes)) for sizes in FLOATS),
]


def _implementation(sizes: Sizes) -> str:
    return "cpu" if sizes.dtype == "bfloat16" else "cpu_float32"


@functools.cache
def _attend(sizes: Sizes, cascade: str) -> Any:
    attend = functools.partial(
        paged_attention,
        scale=sizes.head_dim**-0.5,
        sliding_window=sizes.sliding_window,
        cascade=cascade,
        implementation=_implementation(sizes),
    )
    return jax.jit(attend)


def _run(step: SharedStep, *, cascade: str, share: bool = True) -> np.ndarray:
    pool, table = (step.pool, step.table) if share else (step.own_pool, step.own_table)
    attend = _attend(step.sizes, cascade)
    return np.asarray(
        attend(
            step.query, arranged(pool, _implementation(step.sizes)), table, step.lengths, step.starts, sinks=step.sinks
        )
    )


@pytest.mark.parametrize("sizes", CASES)
def test_reading_shared_pages_together_changes_no_bit(sizes: Sizes):
    """Against each row alone, on the same pages and on pages of its own, in which what it does not see is NaN."""

    @budget(20)
    @given(rows=branches(sizes), seed=st.integers(0, 2**31))
    def check(rows: list[Branch], seed: int) -> None:
        step = SharedStep(sizes, rows, seed)
        together = bits(_run(step, cascade="on"))
        np.testing.assert_array_equal(together, bits(_run(step, cascade="off")))
        np.testing.assert_array_equal(together, bits(_run(step, cascade="on", share=False)))

    check()


@pytest.mark.parametrize("sizes", CASES)
def test_values_agree_with_sums_in_float64(sizes: Sizes):
    length = sizes.max_len
    rows = [Branch(length)]
    rows += [Branch(length - 3 * n, 1, n // 3, (length - 40 * n) // sizes.page_size) for n in range(1, 8)]
    rows.append(Branch(90, 7))
    step = SharedStep(sizes, rows, 1)
    out = _run(step, cascade="on").astype(np.float64)
    for number in range(len(rows)):
        found = out[step.starts[number] : step.starts[number + 1]]
        tolerance = 4e-2 if sizes.dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(found, step.expected(number, sizes.head_dim**-0.5), atol=tolerance, rtol=tolerance)
    assert not out[step.starts[-1] :].any(), "padding tokens must come out as zeros"


@functools.cache
def _planned(sizes: Sizes, cascade: str) -> Any:
    def plan(query: jax.Array, pool: jax.Array, table: jax.Array, lengths: jax.Array, starts: jax.Array) -> Any:
        told = calls.told_sizes(query.shape, pool.shape, table.shape, sizes.sliding_window, cascade)
        return calls.make_plan(told, table, lengths, starts)

    return jax.jit(plan)


def _items(step: SharedStep, *, cascade: str = "on") -> tuple[list[list[int]], list[int], list[int]]:
    """The items of a plan, the members of tiles, and up to which block each has the pages of the one before."""
    arguments = step.query, arranged(step.pool, _implementation(step.sizes)), step.table
    plan = np.asarray(_planned(step.sizes, cascade)(*arguments, step.lengths, step.starts))
    told = calls.told_sizes(step.query.shape, step.pool.shape, step.table.shape, None, cascade)
    rows, first = step.sizes.rows, told[plans.MEMBERS]
    words = plan[plans.FIRST_ITEM :][: plan[plans.NUM_ITEMS] * plans.ITEM_WORDS].reshape(-1, plans.ITEM_WORDS)
    return words.tolist(), plan[first : first + rows].tolist(), plan[first + rows : first + 2 * rows].tolist()


@pytest.mark.parametrize("sizes", CASES)
def test_a_plan_computes_every_token_once_for_every_head(sizes: Sizes):
    """And a tile's rows have the pages that it says they share, all of them whole and seen by all."""

    @budget(15)
    @given(rows=branches(sizes), seed=st.integers(0, 2**31))
    def check(rows: list[Branch], seed: int) -> None:
        step = SharedStep(sizes, rows, seed)
        items, members, common = _items(step)
        done = []
        for item in items[:-1]:
            heads = range(item[plans.ITEM_HEAD], item[plans.ITEM_HEAD] + item[plans.ITEM_HEADS])
            first, count = item[plans.ITEM_ROW], item[plans.ITEM_ROWS]
            tokens = range(item[plans.ITEM_TOKEN], item[plans.ITEM_TOKEN] + item[plans.ITEM_TOKENS])
            if count > 1:
                tokens = [int(step.starts[members[one]]) for one in range(first, first + count)]
                _check_tile(step, members[first : first + count], common[first : first + count], item[plans.ITEM_BEGIN])
            done += [(token, head) for token in tokens for head in heads]
        wanted = [(token, head) for token in range(step.starts[-1]) for head in range(sizes.kv_heads)]
        assert sorted(done) == wanted
        assert items[-1][plans.ITEM_ROWS] == 0
        assert items[-1][plans.ITEM_TOKEN] == step.starts[-1]

    check()


def _check_tile(step: SharedStep, rows: list[int], common: list[int], begin: int) -> None:
    size = step.sizes.page_size
    for row in rows:
        assert begin * plans.BLOCK >= step.oldest(step.rows[row])
    for one, other, until in zip(rows[:-1], rows[1:], common[1:], strict=True):
        assert begin < until <= min(step.lengths[one], step.lengths[other]) // plans.BLOCK
        for page in range(begin * plans.BLOCK // size, -(-until * plans.BLOCK // size)):
            assert step.table[one, page] == step.table[other, page]


@needs_avx512_bf16
def test_rows_of_one_prompt_share_tiles_and_others_stay_alone():
    sizes = SHAPES[0]
    rows = [Branch(500), *[Branch(400 + n, 1, 0, 25) for n in range(6)], Branch(300), Branch(480, 1, 7, 12)]
    items, members, _ = _items(SharedStep(sizes, rows, 3))
    tiles = {tuple(members[one[plans.ITEM_ROW] :][: one[plans.ITEM_ROWS]]) for one in items if one[plans.ITEM_ROWS] > 1}
    assert sorted(row for tile in tiles for row in tile) == list(range(9))
    assert all(set(tile) <= set(range(7)) or set(tile) == {7, 8} for tile in tiles)
    alone, _, _ = _items(SharedStep(sizes, rows, 3), cascade="off")
    assert all(one[plans.ITEM_ROWS] <= 1 for one in alone)


def _cost(tile: int, rows: int, shared: int, own: int, group: int, heads: int, threads: int) -> int:
    """Blocks' costs that the busiest thread meets, with tiles of `tile` rows."""
    each = plans.QUERY_COST * group
    item = shared * (plans.FETCH_COST + each * tile) + own * tile * (plans.FETCH_COST + each)
    items = (rows + tile - 1) // tile * heads
    return (items + threads - 1) // threads * item


@given(
    rows=st.integers(2, 200),
    shared=st.integers(1, 500),
    own=st.integers(0, 500),
    group=st.integers(1, 16),
    heads=st.integers(1, 16),
    threads=st.integers(1, 256),
)
def test_rows_go_together_only_where_that_costs_less(
    rows: int, shared: int, own: int, group: int, heads: int, threads: int
):
    most = min(rows, max(1, 48 // group))
    tile = plans.rows_together(rows, shared, own, group, heads, threads, most)
    costs = {
        size: _cost(size, rows, shared, own, group, heads, threads)
        for size in {1} | {-(-rows // tiles) for tiles in range(-(-rows // most), rows // 2 + 1)}
    }
    assert 1 <= tile <= most
    assert costs[tile] == min(costs.values())
    assert tile == 1 or costs[tile] < costs[1]


@pytest.mark.parametrize(
    ("threads", "tile"),
    [
        (2, 16),  # 64 rows of 4 heads: 16 items for 2 threads
        (16, 16),  # one for each of 16
        (64, 4),  # as many items as threads matter more than reading once
        (256, 1),  # each thread has one row and head as it is
    ],
)
def test_the_break_even_of_sharing_moves_with_the_threads(threads: int, tile: int):
    assert plans.rows_together(64, 24, 1, 3, 4, threads, 16) == tile


def test_two_rows_share_where_a_thread_would_read_both_and_not_where_two_do():
    assert plans.rows_together(2, 24, 1, 3, 1, 1, 16) == 2
    assert plans.rows_together(2, 24, 1, 3, 1, 2, 16) == 1


@needs_avx512_bf16
def test_the_plan_is_made_once_for_all_layers():
    sizes = SHAPES[0]
    step = SharedStep(sizes, [Branch(500), Branch(400, 1, 0, 20)], 5)

    @jax.jit
    def layers(query: jax.Array, pool: jax.Array) -> jax.Array:
        for _ in range(3):
            query = _attend(sizes, "on")(query, pool, step.table, jnp.asarray(step.lengths), step.starts, sinks=None)
        return query

    text = layers.lower(step.query, arranged(step.pool, _implementation(step.sizes))).compile().as_text()
    assert text is not None
    assert text.count('custom_call_target="jaxserve_paged_attention_attend') == 3
    assert text.count('custom_call_target="jaxserve_paged_attention_plan') == 1


def _counted(step: SharedStep, cascade: str = "on") -> dict[str, int]:
    """What the counts of decisions gain by one plan."""
    before = plans.shared_read_counts()
    _items(step, cascade=cascade)
    return {name: count - before[name] for name, count in plans.shared_read_counts().items()}


@needs_avx512_bf16
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_decisions_are_counted(sizes: Sizes):
    """Against the plan's own list: each row of a tile but the first does not read again what it shares with the one
    before it."""

    @budget(15)
    @given(rows=branches(sizes), seed=st.integers(0, 2**31))
    def check(rows: list[Branch], seed: int) -> None:
        step = SharedStep(sizes, rows, seed)
        before = plans.shared_read_counts()
        items, _, common = _items(step)
        gained = {name: count - before[name] for name, count in plans.shared_read_counts().items()}
        tiles = {(one[plans.ITEM_ROW], one[plans.ITEM_ROWS], one[plans.ITEM_BEGIN]) for one in items[:-1]}
        tiles = {(first, count, begin) for first, count, begin in tiles if count > 1}
        saved = sum(common[row] - begin for first, count, begin in tiles for row in range(first + 1, first + count))
        assert gained["steps"] == bool(tiles)
        assert gained["rows_together"] == sum(count for _, count, _ in tiles)
        assert gained["tokens_together"] == saved * plans.BLOCK

    check()


@needs_avx512_bf16
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one thread is always better off reading once")
def test_both_sides_of_the_break_even_are_counted():
    """Of one head, two rows keep two threads busy by themselves and stay apart; eight of four heads go together."""
    apart = _counted(SharedStep(Sizes(1, 3, 64, 16), [Branch(500), Branch(480, 1, 0, 28)], 3))
    shared = 28 * 16 // plans.BLOCK * plans.BLOCK
    assert apart == {
        "steps": 0, "rows_together": 0, "tokens_together": 0, "rows_apart": 2, "tokens_apart": shared,
    }  # fmt: skip
    step = SharedStep(SHAPES[0], [Branch(500), *[Branch(480, 1, 0, 28) for _ in range(7)]], 3)
    together = _counted(step)
    assert (together["steps"], together["rows_together"], together["rows_apart"]) == (1, 8, 0)
    assert 0 < together["tokens_together"] <= 7 * shared
    assert not any(_counted(step, cascade="off").values())
