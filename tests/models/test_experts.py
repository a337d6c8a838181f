"""Routing against a plain loop; the bits of a layer of experts among any companions and in any bucket."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.models.layer_specs import MLPSpec, RouterSpec
from jaxserve.models.layers.experts import Experts
from jaxserve.models.layers.matmul import Products
from jaxserve.models.layers.routing import combine, route
from jaxserve.programs.compiler import compiler_options
from tests.budgets import budget

HIDDEN, WIDE = 48, 37
SPEC = MLPSpec(WIDE, bias=True, kind="experts", router=RouterSpec(6, 2, renormalized=True, bias=True, shared_size=32))


@budget(5)
@given(
    tokens=st.integers(1, 30),
    experts=st.integers(1, 9),
    chosen=st.integers(1, 9),
    softmax=st.sampled_from(("all", "chosen")),
    renormalized=st.booleans(),
    padding=st.integers(0, 30),
    seed=st.integers(0, 2**31),
)
def test_each_token_goes_through_its_highest_scores(
    tokens: int, experts: int, chosen: int, softmax: str, renormalized: bool, padding: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    # Few different scores, so that many are equal: of these the lower numbers are chosen.
    scores = random.integers(-2, 3, (tokens, experts)).astype(np.float32)
    spec = RouterSpec(experts, min(chosen, experts), softmax=softmax, renormalized=renormalized)
    real = max(0, tokens - padding)
    routes = route(jnp.asarray(scores), spec, jnp.asarray(real) if padding else None)
    real = real if padding else tokens
    rows = [
        (expert, token, choice)
        for token in range(real)
        for choice, expert in enumerate(np.argsort(-scores[token], kind="stable")[: spec.per_token])
    ]
    expected = sorted(rows)
    assert np.asarray(routes.experts)[: len(rows)].tolist() == [expert for expert, _, _ in expected]
    assert np.asarray(routes.tokens)[: len(rows)].tolist() == [token for _, token, _ in expected]
    assert (np.asarray(routes.experts)[len(rows) :] == experts).all()
    counts = np.bincount([expert for expert, _, _ in rows], minlength=experts)
    assert np.diff(np.asarray(routes.offsets)).tolist() == counts.tolist()
    for number, (_, token, choice) in enumerate(expected):
        assert routes.rows[token, choice] == number
    power = np.exp(scores.astype(np.float64))
    for token in range(tokens):
        of_chosen = np.sort(power[token])[::-1][: spec.per_token]
        total = of_chosen.sum() if softmax == "chosen" or renormalized else power[token].sum()
        wanted = of_chosen / total if token < real else 0 * of_chosen
        np.testing.assert_allclose(routes.weights[token], wanted, rtol=1e-5)
    y = random.standard_normal((tokens * spec.per_token, 3)).astype(np.float32)
    summed = np.einsum("tkh,tk->th", y[np.asarray(routes.rows)], np.asarray(routes.weights))
    np.testing.assert_allclose(combine(jnp.asarray(y), routes), summed, rtol=1e-5, atol=1e-5)


@functools.cache
def layer(dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    products = Products(rows=dtype, experts="cpu")
    made = Experts(SPEC, HIDDEN, jnp.dtype(dtype), products, nnx.Rngs(params=0))
    graph, state = nnx.split(made)
    return graph, jax.tree.map(lambda leaf: leaf + 0.1 * jnp.ones_like(leaf), state)


def computed(dtype: str, x: np.ndarray, bucket: int, state: nnx.State | None = None) -> np.ndarray:
    """The first rows of a step of `bucket` tokens, as a program of the engine is compiled; what is padding is NaN."""
    graph, drawn = layer(dtype)
    padded = jnp.asarray(np.pad(x, ((0, bucket - len(x)), (0, 0)), constant_values=np.nan), dtype)
    ends = jnp.array([0, len(x), len(x)], jnp.int32)

    def forward(state: nnx.State, x: jax.Array, ends: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x, ends)

    arguments = drawn if state is None else state, padded, ends
    return np.asarray(jax.jit(forward).lower(*arguments).compile(compiler_options("cpu"))(*arguments))[: len(x)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_has_the_same_bits_among_any_others_and_beside_padding(dtype: str) -> None:
    x = np.random.default_rng(1).standard_normal((40, HIDDEN)).astype(np.float32)
    whole = computed(dtype, x, 40)
    assert np.isfinite(whole).all()
    for first, last, bucket in ((0, 1, 8), (3, 4, 16), (5, 37, 64)):
        assert np.array_equal(computed(dtype, x[first:last], bucket), whole[first:last]), (first, last)


def test_experts_that_no_token_chose_are_not_read() -> None:
    graph, state = layer("float32")
    x = np.random.default_rng(2).standard_normal((1, HIDDEN)).astype(np.float32)
    model = nnx.merge(graph, state)
    scores = x @ np.asarray(model.router[...]).T + np.asarray(model.router_bias[...])
    chosen = np.argsort(-scores[0])[:2]
    for parameter in (model.gate, model.up, model.down):
        poisoned = np.full(parameter.shape, np.nan, np.float32)
        poisoned[chosen] = np.asarray(parameter[...])[chosen]
        parameter[...] = jnp.asarray(poisoned)
    assert np.array_equal(computed("float32", x, 8, nnx.state(model)), computed("float32", x, 8))
