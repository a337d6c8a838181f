"""Grouped products against float64; their bits among any companions; experts without rows are not read."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.pallas_kernels.cpu import linear, tiles
from jaxserve.pallas_kernels.grouped_matmul import (
    FORMS,
    IMPLEMENTATIONS,
    api,
    choose,
    cpu_packed,
    grouped_matmul,
    triton,
)
from tests.budgets import budget
from tests.kernels.numbers import draw, wide

Multiply = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

TILE = triton.Tile(rows=16, columns=32, step=16, num_warps=4, num_stages=2)


def interpreted(x: jax.Array, weights: jax.Array, offsets: jax.Array, tile: triton.Tile | None = None) -> jax.Array:
    return triton.multiply(x, weights, offsets, jnp.float32, interpret=True, tile=tile)


WAYS: dict[str, Multiply] = {
    **{name: functools.partial(grouped_matmul, implementation=name) for name in ("reference", "xla", "cpu")},
    "triton": interpreted,
    "triton small tile": functools.partial(interpreted, tile=TILE),
}
"""Every implementation; the kernel for GPUs in interpret mode."""


def offsets_of(counts: list[int]) -> jax.Array:
    return jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32)


def check(way: Multiply, counts: list[int], unrouted: int, columns: int, length: int, dtype: str, seed: int) -> None:
    """Compares with float64, row by row; what no row chose is NaN."""
    x = draw(seed, sum(counts) + unrouted, length, dtype=dtype)
    weights = np.array(draw(seed + 1, len(counts), columns, length, dtype=dtype))
    weights[[not count for count in counts]] = np.nan
    got = way(x, jnp.asarray(weights), offsets_of(counts))
    assert got.shape == (x.shape[0], columns)
    assert got.dtype == jnp.float32
    expert = np.repeat(np.arange(len(counts)), counts)
    for row, number in enumerate(expert):
        matrix = weights[number].astype(np.float64)
        magnitude = np.abs(matrix) @ np.abs(wide(x)[row])
        assert (np.abs(wide(got)[row] - matrix @ wide(x)[row]) <= 1e-5 * magnitude + 1e-30).all(), row
    assert not np.asarray(got)[len(expert) :].any()


CASES = (
    ([3], 0, 7, 5),  # one expert
    ([0, 1, 0], 2, 33, 70),  # one row, and rows of none
    ([0, 0], 3, 16, 16),  # no row chose any
    ([5, 0, 17, 1], 0, 40, 130),
)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [(way, dtype) for way in WAYS for dtype in ("float32", "bfloat16") if (way, dtype) != ("triton", "float32")],
)
def test_rows_are_multiplied_by_their_experts(way: str, dtype: str) -> None:
    for seed, case in enumerate(CASES):
        check(WAYS[way], *case, dtype, seed)


@budget(8)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any),
    unrouted=st.integers(0, 5),
    columns=st.integers(1, 150),
    length=st.integers(1, 1100),
    dtype=st.sampled_from(("float32", "bfloat16", "float16")),
    seed=st.integers(0, 2**31),
)
def test_the_kernel_for_cpus_multiplies_any_shape(
    counts: list[int], unrouted: int, columns: int, length: int, dtype: str, seed: int
) -> None:
    check(WAYS["cpu"], counts, unrouted, columns, length, dtype, seed)


def test_rows_beyond_a_block_are_multiplied() -> None:
    check(WAYS["cpu"], [0, 530, 2], 0, 200, 40, "float32", 0)
    check(WAYS["triton"], [0, 150, 2], 0, 20, 40, "float32", 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_among_any_others(dtype: str) -> None:
    """Whatever the other rows are, and how many they are: each is computed alone too."""
    assert IMPLEMENTATIONS["cpu"].row_bits
    counts = [4, 0, 290, 1, 13]
    x, weights = draw(0, sum(counts), 700, dtype=dtype), draw(1, len(counts), 130, 700, dtype=dtype)
    whole = np.asarray(WAYS["cpu"](x, weights, offsets_of(counts)))
    expert = np.repeat(np.arange(len(counts)), counts)
    for row in (0, 3, 4, 150, 293, 294, 307):
        alone = [int(number == expert[row]) for number in range(len(counts))]
        assert np.array_equal(WAYS["cpu"](x[row : row + 1], weights, offsets_of(alone))[0], whole[row]), row
    some = np.array([1, 5, 200, 294, 300])
    few = [int((expert[some] == number).sum()) for number in range(len(counts))]
    assert np.array_equal(WAYS["cpu"](x[some], weights, offsets_of(few)), whole[some])


@pytest.fixture(params=["tiles", "vectors"])
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Multiply:
    """The product of packed matrices, with both kinds of instructions."""
    if not linear.runs_here() or (request.param == "tiles" and not tiles.usable()):
        pytest.skip("this CPU has no such instructions")
    if request.param == "vectors":
        monkeypatch.setattr(tiles, "usable", lambda: False)

    def multiply(x: jax.Array, weights: jax.Array, offsets: jax.Array) -> jax.Array:
        weights = cpu_packed.pack(weights.astype(jnp.bfloat16))
        return grouped_matmul(x, weights, offsets, implementation="cpu_packed", form="packed")

    return multiply


@pytest.mark.one_lane
def test_packed_matrices_give_the_same_products(packed: Multiply) -> None:
    cases = (([3], 0, 32, 32), ([0, 1, 0], 2, 64, 96), ([0, 0], 3, 32, 64), ([5, 0, 17, 270, 1], 0, 160, 608))
    for seed, case in enumerate(cases):
        check(packed, *case, "bfloat16", seed)


def test_packed_matrices_give_a_row_the_same_bits_among_any_others(packed: Multiply) -> None:
    assert IMPLEMENTATIONS["cpu_packed"].row_bits
    counts = [4, 0, 290, 1, 13]
    x, weights = draw(0, sum(counts), 704, dtype="bfloat16"), draw(1, len(counts), 128, 704, dtype="bfloat16")
    whole = np.asarray(packed(x, weights, offsets_of(counts)))
    expert = np.repeat(np.arange(len(counts)), counts)
    for some in ([0], [3], [4], [293], [294], [1, 5, 200, 294, 300], list(range(4, 40))):
        few = [int((expert[some] == number).sum()) for number in range(len(counts))]
        assert np.array_equal(packed(x[np.array(some)], weights, offsets_of(few)), whole[some]), some
    # What follows the rows of an expert is read, and changes nothing.
    x = x.at[294].set(np.nan)
    assert np.array_equal(packed(x, weights, offsets_of(counts))[:294], whole[:294])


def test_the_plan_lists_blocks_of_rows_of_experts_that_have_some() -> None:
    counts = [0, 33, 0, 16, 1]
    items = np.asarray(triton.plan(offsets_of(counts), sum(counts), 16))
    listed = [tuple(item) for item in items if item[2] > item[1]]
    assert listed == [(1, 0, 16), (1, 16, 32), (1, 32, 33), (3, 33, 49), (4, 49, 50)]
    most = np.asarray(triton.plan(offsets_of([1] * 5), 5, 16))  # as many items as there can be
    assert (most[:, 2] - most[:, 1]).tolist() == [1] * 5


def test_one_is_chosen_for_each_platform() -> None:
    assert choose("cpu", "bfloat16") == "cpu"
    assert choose("cpu", "bfloat16", "packed") == "cpu_packed"
    assert choose("gpu", "bfloat16") == "triton"
    assert choose("tpu", "float32") == "xla"
    with pytest.raises(ValueError, match=f"^form of experts is 'int3'; it must be one of {', '.join(FORMS)}$"):
        choose("cpu", "bfloat16", "int3")


X, WEIGHTS, OFFSETS = draw(0, 4, 8), draw(1, 2, 3, 8), offsets_of([2, 2])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (X, WEIGHTS, OFFSETS),
            {"implementation": "dots"},
            r"^implementation is 'dots'; it must be one of triton, cpu,",
        ),
        ((X, WEIGHTS, OFFSETS), {"form": "int4"}, r"^form of experts is 'int4'; cpu takes dense$"),
        ((X[:, :7], WEIGHTS, OFFSETS), {}, r"^x is \(4, 7\) and experts are \(2, 3, 8\); they must be \[M, K\] and "),
        (
            (X, WEIGHTS, OFFSETS[:2]),
            {},
            r"^offsets are int32 \(2,\); for experts \(2, 3, 8\) they must be int32 \(3,\)$",
        ),
        ((X, WEIGHTS.astype("int8"), OFFSETS), {}, r"^dtype of experts is int8; cpu takes float32, bfloat16, float16$"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        api.grouped_matmul(*arguments, **{"implementation": "cpu"} | options)
