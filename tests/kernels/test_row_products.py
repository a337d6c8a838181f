"""Products of unpacked weights on CPUs against float64; their bits, and those of a layer, in any number of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from jaxserve.models.layers.matmul import Products
from jaxserve.pallas_kernels.cpu import native_calls, row_products
from jaxserve.programs.compiler import compiler_options
from tests.budgets import budget
from tests.kernels.numbers import assert_is_product, draw

HERE = row_products.tile()
TILES = {
    "here": HERE,
    "16 registers": row_products.Tile(8, 4, 3, True),
    "short vectors": row_products.Tile(4, 8, 3, True),
    "not fused": row_products.Tile(4, 4, 2, False),
}


@pytest.fixture(params=TILES)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> row_products.Tile:
    """What other CPUs compute with, where this one can."""
    chosen = TILES[request.param]
    if (chosen.fused and not HERE.fused) or (chosen.lanes > 4 and not {"avx2", "fma"} & native_calls.features()):
        pytest.skip("this CPU has no such instructions")
    monkeypatch.setattr(row_products, "tile", lambda: chosen)
    return chosen


@budget(6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 210),
    length=st.integers(1, 1200),
    dtype=st.sampled_from(("float32", "bfloat16", "float16")),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_is_the_product_in_float32(
    tile: row_products.Tile, rows: int, columns: int, length: int, dtype: str, seed: int
) -> None:
    x, weight = draw(seed, rows, length, dtype=dtype), draw(seed + 1, columns, length, dtype=dtype)
    assert_is_product(row_products.multiply(x, weight), x, weight)


def test_a_row_and_a_column_have_the_same_bits_among_any_others(tile: row_products.Tile) -> None:
    x, weight = draw(0, 530, 700), draw(1, 250, 700)
    whole = np.asarray(row_products.multiply(x, weight))
    for first, last in ((0, 1), (7, 9), (120, 145), (43, 529)):
        assert np.array_equal(np.asarray(row_products.multiply(x[first:last], weight)), whole[first:last])
        few = np.asarray(row_products.multiply(x, weight[first:last]))
        assert np.array_equal(few, whole[:, first:last])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(value: float) -> None:
    x, weight = np.array(draw(0, 9, 70)), np.array(draw(1, 10, 70))
    clean = np.asarray(row_products.multiply(jnp.asarray(x), jnp.asarray(weight)))
    x[8, 69], weight[9, 3] = value, value
    got = np.asarray(row_products.multiply(jnp.asarray(x), jnp.asarray(weight)))
    assert np.array_equal(got[:8, :9], clean[:8, :9])
    assert not np.isfinite(got[8]).any()
    assert not np.isfinite(got[:, 9]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_gives_a_row_the_same_bits_in_any_bucket(dtype: str) -> None:
    """As a program of the engine is compiled: norms, residuals, SwiGLU and log-probabilities beside the products."""
    products = Products(rows=dtype)
    hidden, inner = 192, 512
    gate_up, down, head = (
        0.1 * draw(seed, *shape, dtype=dtype)
        for seed, shape in enumerate(((2, inner, hidden), (hidden, inner), (576, hidden)))
    )

    def norm(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)).astype(dtype)

    def layer(x: jax.Array) -> jax.Array:
        return (x + products.contract(products.swiglu(norm(x), gate_up), down)).astype(dtype)

    def forward(x: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(products.contract_unpacked(norm(layer(layer(x))), head))

    def computed(x: jax.Array) -> np.ndarray:
        return np.asarray(jax.jit(forward).lower(x).compile(compiler_options("cpu"))(x))

    x = draw(7, 96, hidden, dtype=dtype)
    whole = computed(x)
    for rows in (2, 24):
        assert np.array_equal(computed(x[:rows]), whole[:rows]), f"{rows} rows"
