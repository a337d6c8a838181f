"""The packed products of CPUs, in vectors and in tiles, against float64, and their bits in any number of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from jaxserve.pallas_kernels.cpu import features, linear, tiles
from tests.budgets import budget

pytestmark = pytest.mark.skipif(not features.has("avx512_bf16"), reason="this CPU has no AVX512_BF16 instructions")


@pytest.fixture(
    params=["vectors", pytest.param("tiles", marks=pytest.mark.skipif(not tiles.usable(), reason="no AMX here"))],
    autouse=True,
)
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """What the contracted axis must be a multiple of, in pairs, for the kind of kernel under test."""
    monkeypatch.setattr(tiles, "usable", lambda: request.param == "tiles")
    return tiles.PAIRS if request.param == "tiles" else 1


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(jnp.bfloat16))


def wide(array: jax.Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


@budget(25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 300), panels=st.integers(1, 5), pairs=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
def test_linear_is_the_product_in_float32(step: int, rows: int, panels: int, pairs: int, seed: int) -> None:
    pairs = -(-pairs // step) * step
    x, weight = draw(seed, rows, 2 * pairs), draw(seed + 1, panels * linear.PANEL, 2 * pairs)
    got = linear.linear(x, linear.pack(weight))
    assert got.shape == (rows, weight.shape[0])
    assert got.dtype == jnp.float32
    magnitude = np.abs(wide(x)) @ np.abs(wide(weight)).T
    assert (np.abs(wide(got) - wide(x) @ wide(weight).T) <= 1e-6 * magnitude + 1e-30).all()


@budget(25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 40), halves=st.integers(1, 7), pairs=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
def test_swiglu_is_that_of_float64_rounded_once(step: int, rows: int, halves: int, pairs: int, seed: int) -> None:
    pairs = -(-pairs // step) * step
    columns = halves * linear.PANEL // 2
    x, weight = draw(seed, rows, 2 * pairs), draw(seed + 1, 2, columns, 2 * pairs)
    got = wide(linear.swiglu(x, linear.pack_gate_up(weight)))
    gate, up = (wide(x) @ wide(part).T for part in weight)
    expected = gate / (1 + np.exp(-gate)) * up
    # Half a unit in the last place of bfloat16 and what float32 sums lose beside it.
    assert (np.abs(got - expected) <= 2.0**-8 * np.abs(expected) + 1e-4).all()


@pytest.mark.parametrize("width", [768, 3072])
def test_a_row_has_the_same_bits_among_any_others(width: int) -> None:
    x, weight, gate_up = draw(0, 300, width), draw(1, 96, width), draw(2, 2, 80, width)
    packed, packed_gate_up = linear.pack(weight), linear.pack_gate_up(gate_up)
    whole, gated = np.asarray(linear.linear(x, packed)), np.asarray(linear.swiglu(x, packed_gate_up))
    for first, last in ((0, 1), (7, 9), (120, 145), (43, 299)):
        assert np.array_equal(np.asarray(linear.linear(x[first:last], packed)), whole[first:last])
        assert np.array_equal(np.asarray(linear.swiglu(x[first:last], packed_gate_up)), gated[first:last])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    x, gate_up = np.array(draw(0, 9, 64)), draw(1, 2, 64, 64)
    clean = np.asarray(linear.swiglu(jnp.asarray(x), linear.pack_gate_up(gate_up)))
    x[4, 5] = value
    got = np.asarray(linear.swiglu(jnp.asarray(x), linear.pack_gate_up(gate_up)))
    others = np.arange(9) != 4
    assert np.array_equal(got[others], clean[others])
    assert not np.isfinite(got[4].astype(np.float32)).all()


def test_extreme_gates_are_closed_or_open() -> None:
    gates = np.array([-1e30, -200.0, 200.0, 1e30])
    x = jnp.asarray(np.pad(gates[:, None], ((0, 0), (0, 31))), jnp.bfloat16)
    gate_up = np.zeros((2, 16, 32), np.float32)
    gate_up[0, :, 0] = 1.0
    up = jnp.asarray(np.array([[0.0, 1.0]]), jnp.bfloat16)
    x = x.at[:, 1].set(up[0, 1])
    gate_up[1, :, 1] = 1.0
    got = wide(linear.swiglu(x, linear.pack_gate_up(jnp.asarray(gate_up, jnp.bfloat16))))
    assert np.isfinite(got).all()
    assert (np.abs(got[:2]) < 1e-6 * np.abs(wide(x)[:2, :1])).all()
    assert (got[2:] == wide(x)[2:, :1]).all()
