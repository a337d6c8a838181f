"""MLPs through the packed products of CPUs: values of unpacked ones, and bits of rows that do not depend on others."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.models.layer_specs import MLPSpec
from jaxserve.models.layers import matmul
from jaxserve.models.layers.matmul import Products
from jaxserve.models.layers.mlp import MLP
from jaxserve.models.layers.parameter import Packing
from jaxserve.pallas_kernels.cpu import linear, panel_products

KERNELS = {
    "pairs": pytest.param(
        linear.kernels,
        jnp.bfloat16,
        marks=pytest.mark.skipif(not linear.runs_here(), reason="this CPU has no AVX512_BF16 instructions"),
    ),
    "panels": pytest.param(panel_products.kernels, jnp.bfloat16),
    "panels of float32": pytest.param(panel_products.kernels, jnp.float32),
}

SPECS = {
    "SwiGLU": MLPSpec(96),
    "SwiGLU with biases": MLPSpec(96, bias=True),
    "GeGLU": MLPSpec(96, activation="gelu_tanh"),
    "plain": MLPSpec(96, bias=True, kind="plain", activation="relu"),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("kernels", "dtype"), KERNELS.values(), ids=KERNELS)
def test_every_kind_of_mlp_has_packed_products(name: str, kernels: Callable[[], str], dtype: Any) -> None:
    products = Products(packed=kernels(), rows=jnp.dtype(dtype).name)
    plain, packed = (MLP(SPECS[name], 64, dtype, each, nnx.Rngs(params=0)) for each in (Products(), products))
    for leaf in ("gate_up", "up", "down", "gate_up_bias", "up_bias", "down_bias"):
        variable = getattr(packed, leaf)
        if variable is None:
            continue
        if leaf.endswith("bias"):
            drawn = jax.random.normal(jax.random.key(1), variable[...].shape, dtype)
            getattr(plain, leaf)[...] = variable[...] = drawn
            continue
        spec = variable.get_metadata("spec")
        assert spec.packing is not Packing.NONE, leaf
        variable[...] = matmul.packed(variable[...], spec, products)
    x = jax.random.normal(jax.random.key(2), (11, 64), dtype)
    whole = np.asarray(nnx.jit(packed)(x))
    off = 0.02 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(whole.astype(np.float32), np.asarray(plain(x), np.float32), rtol=off, atol=off)
    assert np.array_equal(np.asarray(nnx.jit(packed)(x[4:7])), whole[4:7])
