"""Products by packed quantized weights against float64, and the same bits in any company."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.pallas_kernels.cpu import panel_weights

KINDS = [
    ("fp8", None, False),
    ("fp8", 128, False),
    ("int8", None, False),
    ("int8", 64, True),
    ("int4", None, False),
    ("int4", 32, False),
    ("int4", 128, True),
    ("int4", 512, True),
]


def drawn(kind: str, n: int, k: int, group: int | None, zeros: bool, seed: int):
    """Numbers as they are stored, scales, zeros, and the weights in float64."""
    random = np.random.RandomState(seed)
    groups = 1 if group is None else k // group
    scales = random.uniform(0.01, 2, (groups, n)).astype(np.float32)
    offsets = random.randint(-100 if kind == "int8" else 0, 17, (groups, n)).astype(np.int16) if zeros else None
    if kind == "fp8":
        bits = np.arange(n * k).astype(np.uint8)
        bits[(bits & 0x7F) == 0x7F] = 1  # all numbers, the smallest included, but those that are none
        random.shuffle(bits)
        stored = bits.reshape(n, k).view(ml_dtypes.float8_e4m3fn)
        numbers = stored.astype(np.float64)
    elif kind == "int8":
        stored = random.randint(-128, 128, (n, k)).astype(np.int8)
        numbers = stored.astype(np.float64)
    else:
        whole = random.randint(0, 16, (n, k)).astype(np.uint8)
        stored = whole[:, ::2] + 16 * whole[:, 1::2]
        numbers = whole.astype(np.float64) - (0 if zeros else 8)
    each = numbers.reshape(n, groups, -1)
    if offsets is not None:
        each = each - offsets.T[..., None].astype(np.float64)
    return stored, scales, offsets, (each * scales.T[..., None].astype(np.float64)).reshape(n, k)


def multiplied(x, stored, scales, zeros, kind, group):
    packed = panel_weights.pack(jnp.asarray(stored))
    zeros = None if zeros is None else jnp.asarray(zeros)
    return np.asarray(panel_weights.multiply(jnp.asarray(x), packed, jnp.asarray(scales), zeros, kind, group))


@pytest.mark.parametrize(("kind", "group", "zeros"), KINDS)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 96, 1024), (13, 64, 512), (200, 32, 1536)])
def test_values_are_those_of_the_dequantized_weights(kind, group, zeros, rows, n, k):
    stored, scales, offsets, weights = drawn(kind, n, k, group, zeros, seed=rows)
    x = np.random.RandomState(1).standard_normal((rows, k)).astype(np.float32)
    found = multiplied(x, stored, scales, offsets, kind, group)
    expected = x.astype(np.float64) @ weights.T
    bound = np.abs(x).astype(np.float64) @ np.abs(weights).T
    assert (np.abs(found - expected) <= 1e-6 * bound + 1e-30).all()


@pytest.mark.parametrize(("kind", "group", "zeros"), KINDS)
def test_a_row_has_the_same_bits_alone_and_among_others(kind, group, zeros):
    stored, scales, offsets, _ = drawn(kind, 320, 512, group, zeros, seed=7)
    x = np.random.RandomState(2).standard_normal((33, 512)).astype(np.float32)
    together = multiplied(x, stored, scales, offsets, kind, group)
    for row in (0, 17, 32):
        alone = multiplied(x[row : row + 1], stored, scales, offsets, kind, group)
        assert alone.tobytes() == together[row : row + 1].tobytes()


def test_rows_of_any_even_length_have_one_scale():
    """Lengths that are no multiple of a piece or of a vector."""
    for kind, k in (("int8", 75), ("fp8", 98), ("int4", 100)):
        stored, scales, _, weights = drawn(kind, 32, k, None, False, seed=3)
        x = np.random.RandomState(3).standard_normal((5, k)).astype(np.float32)
        found = multiplied(x, stored, scales, None, kind, None)
        np.testing.assert_allclose(found, x.astype(np.float64) @ weights.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("n", "k", "group", "kind", "fits"),
    [
        (64, 128, 128, "int4", True),
        (48, 128, 128, "int4", False),
        (64, 130, 130, "int4", False),
        (64, 130, 130, "int8", True),
        (64, 1024, 512, "int4", True),
        (64, 96, 48, "int4", False),
        (64, 64, 16, "int4", False),
    ],
)
def test_what_can_be_packed(n, k, group, kind, fits):
    assert panel_weights.fits(n, k, group, kind) is fits
