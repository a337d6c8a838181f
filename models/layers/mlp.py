"""Implements the MLP of a layer. Letters in shapes: H hidden, I intermediate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.models.layer_specs import MLPSpec
from jaxserve.models.layers.matmul import Products
from jaxserve.models.layers.parameter import Initial, Packing, Parameter, Source


class MLP(nnx.Module):
    """Computes SwiGLU with the gate and up projections fused: gate_up [2, I, H], down [H, I]."""

    def __init__(self, spec: MLPSpec, hidden: int, dtype: jnp.dtype, products: Products, rngs: nnx.Rngs):
        wide = spec.intermediate_size
        self.products = products

        def gate_and_up(kind: str, *shape: int) -> tuple[Source, ...]:
            return tuple(
                Source(f"mlp.{name}.{kind}", (wide, *shape), 0, part, part + 1)
                for part, name in enumerate(("gate_proj", "up_proj"))
            )

        def make(parameter: Parameter) -> nnx.Param:
            return parameter.make(rngs, dtype)

        # There is no packed kernel for gate and up with a bias.
        packing = Packing.NONE if spec.bias else Packing.GATE_UP
        self.gate_up = make(
            Parameter((2, wide, hidden), P(None, "tensor", None), gate_and_up("weight", hidden), packing=packing)
        )
        down = (Source("mlp.down_proj.weight", (hidden, wide)),)
        self.down = make(Parameter((hidden, wide), P(None, "tensor"), down, packing=Packing.MATRIX))
        gate_up_bias = Parameter((2, wide), P(None, "tensor"), gate_and_up("bias"), initial=Initial.ZEROS)
        down_bias = Parameter((hidden,), P(None), (Source("mlp.down_proj.bias", (hidden,)),), initial=Initial.ZEROS)
        self.gate_up_bias = make(gate_up_bias) if spec.bias else None
        self.down_bias = make(down_bias) if spec.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        bias = None if self.gate_up_bias is None else self.gate_up_bias[...]
        y = self.products.contract(self.products.swiglu(x, self.gate_up[...], bias), self.down[...])
        if self.down_bias is not None:
            y += self.down_bias[...].astype(y.dtype)
        return y.astype(x.dtype)
