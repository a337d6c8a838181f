"""Products of weights packed in panels on CPUs against float64; bits of a row and a column among any others."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from jaxserve.pallas_kernels.cpu import native_calls, panel_products
from jaxserve.pallas_kernels.cpu.panel_products import PANEL, Tile
from tests.budgets import budget
from tests.kernels.numbers import assert_is_product, draw

HERE = panel_products.tile()
TILES = {
    "here": HERE,
    "16 registers": Tile(8, 2, (6, 2, 1), True),
    "short vectors": Tile(4, 4, (6, 2, 1), True),
    "not fused": Tile(4, 2, (4, 1), False),
}


@pytest.fixture(params=TILES)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tile:
    """What other CPUs compute with, where this one can; each under a name of its own."""
    chosen = TILES[request.param]
    if (chosen.fused and not HERE.fused) or (chosen.lanes > 4 and not {"avx2", "fma"} & native_calls.features()):
        pytest.skip("this CPU has no such instructions")
    monkeypatch.setattr(panel_products, "tile", lambda: chosen)
    monkeypatch.setattr(panel_products, "kernels", lambda: f"panels_test_{request.param.replace(' ', '_')}")
    return chosen


@budget(6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 420),
    panels=st.integers(1, 7),
    length=st.integers(1, 700),
    dtype=st.sampled_from(("float32", "bfloat16", "float16")),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_is_the_product_in_float32(tile: Tile, rows: int, panels: int, length: int, dtype: str, seed: int) -> None:
    x, weight = draw(seed, rows, length, dtype=dtype), draw(seed + 1, panels * PANEL, length, dtype=dtype)
    assert_is_product(panel_products.multiply(x, panel_products.pack(weight)), x, weight)


def test_a_row_and_a_column_have_the_same_bits_among_any_others(tile: Tile) -> None:
    x, weight = draw(0, 430, 530), draw(1, 8 * PANEL, 530)
    whole = np.asarray(panel_products.multiply(x, panel_products.pack(weight)))
    for first, last in ((0, 1), (7, 9), (120, 145), (43, 429)):
        some = np.asarray(panel_products.multiply(x[first:last], panel_products.pack(weight)))
        assert np.array_equal(some, whole[first:last])
    for first, last in ((0, 1), (2, 7)):
        columns = slice(first * PANEL, last * PANEL)
        few = np.asarray(panel_products.multiply(x, panel_products.pack(weight[columns])))
        assert np.array_equal(few, whole[:, columns])


def test_every_cpu_with_fused_products_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are chains over the contracted axis, so that the length of vectors does not matter."""
    x, weight = draw(0, 23, 300), panel_products.pack(draw(1, 2 * PANEL, 300))
    results = []
    for number, (name, chosen) in enumerate(TILES.items()):
        if chosen.fused and HERE.fused and chosen.lanes <= HERE.lanes:
            monkeypatch.setattr(panel_products, "tile", lambda chosen=chosen: chosen)
            monkeypatch.setattr(panel_products, "kernels", lambda number=number: f"panels_bits_{number}")
            results.append((name, np.asarray(panel_products.multiply(x, weight))))
    for name, result in results[1:]:
        assert np.array_equal(result, results[0][1]), name


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(value: float) -> None:
    x, weight = np.array(draw(0, 9, 70)), np.array(draw(1, PANEL, 70))
    clean = np.asarray(panel_products.multiply(jnp.asarray(x), panel_products.pack(jnp.asarray(weight))))
    x[8, 69], weight[9, 3] = value, value
    got = np.asarray(panel_products.multiply(jnp.asarray(x), panel_products.pack(jnp.asarray(weight))))
    others = np.arange(PANEL) != 9
    assert np.array_equal(got[:8, others], clean[:8, others])
    assert not np.isfinite(got[8]).any()
    assert not np.isfinite(got[:, 9]).any()
