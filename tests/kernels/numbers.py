"""Random matrices for tests of products, and their numbers in float64."""

import jax
import jax.numpy as jnp
import numpy as np


def draw(seed: int, *shape: int, dtype: jax.typing.DTypeLike = "float32") -> jax.Array:
    """Draws standard normal numbers, rounded to a dtype."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(array: jax.Array | np.ndarray) -> np.ndarray:
    """Returns the same numbers as float64."""
    return np.asarray(array).astype(np.float64)


def assert_is_product(got: jax.Array, x: jax.Array, weight: jax.Array) -> None:
    """Raises AssertionError unless got [T, N] is x [T, K] times the transposed weight [N, K], summed in float32."""
    assert got.shape == (x.shape[0], weight.shape[0])
    assert got.dtype == jnp.float32
    magnitude = np.abs(wide(x)) @ np.abs(wide(weight)).T
    assert (np.abs(wide(got) - wide(x) @ wide(weight).T) <= 1e-5 * magnitude + 1e-30).all()
