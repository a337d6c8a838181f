"""Implements the MLP of a layer. Letters in shapes: H hidden, I intermediate."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.models.layer_specs import MLPSpec
from jaxserve.models.layers.matmul import Products
from jaxserve.models.layers.parameter import Initial, Packing, Parameter, Source

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
"""The activations of `jaxserve.models.layer_specs.ACTIVATIONS`; they are computed in float32."""


class MLP(nnx.Module):
    """Computes down(activation(gate(x)) * up(x)), or down(activation(up(x))) where there is no gate.

    Gate and up are fused: gate_up [2, I, H]; up alone is [I, H], and down is [H, I]. `name` is that of the MLP in
    checkpoints.
    """

    def __init__(
        self,
        spec: MLPSpec,
        hidden: int,
        dtype: jnp.dtype,
        products: Products,
        rngs: nnx.Rngs,
        name: str = "mlp",
    ):
        wide = spec.intermediate_size
        self.products = products
        self.activation = spec.activation
        self.gated = spec.kind == "gated"
        # The packed kernel for both products at once knows this activation and no bias.
        self.fused = self.gated and spec.activation == "silu" and not spec.bias

        def make(parameter: Parameter) -> nnx.Param:
            return parameter.make(rngs, dtype)

        def gate_and_up(kind: str, *shape: int) -> tuple[Source, ...]:
            if not self.gated:
                return (Source(f"{name}.up_proj.{kind}", (wide, *shape)),)
            return tuple(
                Source(f"{name}.{matrix}.{kind}", (wide, *shape), 0, part, part + 1)
                for part, matrix in enumerate(("gate_proj", "up_proj"))
            )

        pair = (2,) if self.gated else ()
        split = (*(None for _ in pair), "tensor")
        packing = Packing.GATE_UP if self.fused else Packing.MATRIX
        up = Parameter((*pair, wide, hidden), P(*split, None), gate_and_up("weight", hidden), packing=packing)
        up_bias = Parameter((*pair, wide), P(*split), gate_and_up("bias"), initial=Initial.ZEROS)
        down = (Source(f"{name}.down_proj.weight", (hidden, wide)),)
        down_bias = Parameter((hidden,), P(None), (Source(f"{name}.down_proj.bias", (hidden,)),), initial=Initial.ZEROS)
        self.gate_up = make(up) if self.gated else None
        self.up = None if self.gated else make(up)
        self.down = make(Parameter((hidden, wide), P(None, "tensor"), down, packing=Packing.MATRIX))
        self.gate_up_bias = make(up_bias) if self.gated and spec.bias else None
        self.up_bias = make(up_bias) if spec.bias and not self.gated else None
        self.down_bias = make(down_bias) if spec.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.products.contract(self._activated(x), self.down[...])
        if self.down_bias is not None:
            y += self.down_bias[...].astype(y.dtype)
        return y.astype(x.dtype)

    def _activated(self, x: jax.Array) -> jax.Array:
        """Computes what `down` multiplies, [..., I] in x's dtype."""
        activation = ACTIVATIONS[self.activation]
        if self.gate_up is None:
            assert self.up is not None
            y = self.products.contract(x, self.up[...])
            if self.up_bias is not None:
                y += self.up_bias[...].astype(y.dtype)
            return activation(y.astype(jnp.float32)).astype(x.dtype)
        if self.fused:
            return self.products.swiglu(x, self.gate_up[...])
        gate, up = self.products.contract_pair(x, self.gate_up[...])
        if self.gate_up_bias is not None:
            gate_bias, up_bias = self.gate_up_bias[...].astype(gate.dtype)
            gate, up = gate + gate_bias, up + up_bias
        return (activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(x.dtype)
