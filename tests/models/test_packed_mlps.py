"""MLPs through the packed products of CPUs: values of unpacked ones, and bits of rows that do not depend on others."""

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
from jaxserve.pallas_kernels.cpu import features

pytestmark = pytest.mark.skipif(not features.has("avx512_bf16"), reason="this CPU has no AVX512_BF16 instructions")

SPECS = {
    "SwiGLU": MLPSpec(96),
    "SwiGLU with biases": MLPSpec(96, bias=True),
    "GeGLU": MLPSpec(96, activation="gelu_tanh"),
    "plain": MLPSpec(96, bias=True, kind="plain", activation="relu"),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_mlp_has_packed_products(name):
    plain, packed = (
        MLP(SPECS[name], 64, jnp.bfloat16, Products(packed=packed), nnx.Rngs(params=0)) for packed in (False, True)
    )
    for leaf in ("gate_up", "up", "down", "gate_up_bias", "up_bias", "down_bias"):
        variable = getattr(packed, leaf)
        if variable is None:
            continue
        if leaf.endswith("bias"):
            drawn = jax.random.normal(jax.random.key(1), variable[...].shape, jnp.bfloat16)
            getattr(plain, leaf)[...] = variable[...] = drawn
            continue
        spec = variable.get_metadata("spec")
        assert spec.packing is not Packing.NONE, leaf
        variable[...] = matmul.packed(variable[...], spec)
    x = jax.random.normal(jax.random.key(2), (11, 64), jnp.bfloat16)
    whole = np.asarray(nnx.jit(packed)(x))
    np.testing.assert_allclose(whole.astype(np.float32), np.asarray(plain(x), np.float32), rtol=0.02, atol=0.02)
    assert np.array_equal(np.asarray(nnx.jit(packed)(x[4:7])), whole[4:7])
