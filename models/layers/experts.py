"""Implements experts: gated MLPs of which each token goes through a few. Letters in shapes: T tokens, H hidden, I
intermediate, E experts, M rows, one for each expert of each token.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.models.layer_specs import MLPSpec
from jaxserve.models.layers.matmul import Products
from jaxserve.models.layers.mlp import ACTIVATIONS, MLP
from jaxserve.models.layers.parameter import Initial, Packing, Parameter, Source
from jaxserve.models.layers.routing import Routes, combine, route


class Matrices(NamedTuple):
    """Holds the parameters of all experts, or on a mesh a device's part of each.

    Attributes:
        gate: [E, I, H].
        up: [E, I, H].
        down: [E, H, I].
        gate_bias: [E, I] or None.
        up_bias: [E, I] or None.
    """

    gate: jax.Array
    up: jax.Array
    down: jax.Array
    gate_bias: jax.Array | None
    up_bias: jax.Array | None


_TALL, _FLAT, _BIAS = P(None, "tensor", None), P(None, None, "tensor"), P(None, "tensor")
_PARTITIONS = (_TALL, _TALL, _FLAT, _BIAS, _BIAS)
"""Partition of each of `Matrices`: every device holds a part of the hidden layer of each expert."""


class Experts(nnx.Module):
    """Computes the weighted sum of the outputs of the experts that the router chooses for each token."""

    def __init__(self, spec: MLPSpec, hidden: int, dtype: jnp.dtype, products: Products, rngs: nnx.Rngs):
        assert spec.router is not None
        self.spec, self.router_spec = spec, spec.router
        self.products = products
        count, wide = spec.router.num_experts, spec.intermediate_size

        def matrices(name: str, out: int, into: int, partition: P) -> nnx.Param:
            sources = tuple(
                Source(f"mlp.experts.{number}.{name}.weight", (out, into), 0, number, number + 1)
                for number in range(count)
            )
            return Parameter((count, out, into), partition, sources, packing=Packing.EXPERTS).make(rngs, dtype)

        def biases(name: str, out: int, partition: P) -> nnx.Param | None:
            sources = tuple(
                Source(f"mlp.experts.{number}.{name}.bias", (out,), 0, number, number + 1) for number in range(count)
            )
            made = Parameter((count, out), partition, sources, initial=Initial.ZEROS)
            return made.make(rngs, dtype) if spec.bias else None

        def router(kind: str, *shape: int) -> Parameter:
            source = Source(f"mlp.gate.{kind}", (count, *shape))
            initial = Initial.NORMAL if shape else Initial.ZEROS
            return Parameter((count, *shape), P(None, *(None for _ in shape)), (source,), initial=initial)

        self.router = router("weight", hidden).make(rngs, dtype)
        self.router_bias = router("bias").make(rngs, dtype) if spec.router.bias else None
        self.gate = matrices("gate_proj", wide, hidden, _TALL)
        self.up = matrices("up_proj", wide, hidden, _TALL)
        self.down = matrices("down_proj", hidden, wide, _FLAT)
        self.gate_bias = biases("gate_proj", wide, _BIAS)
        self.up_bias = biases("up_proj", wide, _BIAS)
        self.down_bias = biases("down_proj", hidden, P(None, None))
        shared, size = None, spec.router.shared_size
        if size is not None:
            shared = MLP(
                MLPSpec(size, activation=spec.activation), hidden, dtype, products, rngs, name="mlp.shared_expert"
            )
        self.shared = shared
        source = Source("mlp.shared_expert_gate.weight", (1, hidden))
        shared_gate = Parameter((1, hidden), P(None, None), (source,))
        self.shared_gate = shared_gate.make(rngs, dtype) if size is not None else None

    def __call__(self, x: jax.Array, query_start_loc: jax.Array | None = None) -> jax.Array:
        """Computes [..., H] from x [..., H].

        query_start_loc: as in `jaxserve.models.layers.attention_backends.AttentionMetadata`: tokens past its last entry
            are padding, which goes through no expert. None where there is no padding.
        """
        tokens = x.reshape(-1, x.shape[-1])
        # Scores are not rounded: experts that are nearly as good as each other should not be chosen by it.
        whole = dataclasses.replace(self.products, dtype=np.dtype(np.float32))
        scores = whole.contract_unpacked(tokens, self.router[...])
        if self.router_bias is not None:
            scores += self.router_bias[...].astype(jnp.float32)
        routes = route(scores, self.router_spec, None if query_start_loc is None else query_start_loc[-1])
        y = self._multiplied(tokens[routes.tokens], routes)
        if self.down_bias is not None:
            # Rows of no expert get the last one's, times a weight of 0.
            y = y.astype(jnp.float32) + self.down_bias[...].astype(jnp.float32)[routes.experts]
        y = combine(y, routes)
        if self.shared is not None and self.shared_gate is not None:
            share = whole.contract_unpacked(tokens, self.shared_gate[...])
            y += jax.nn.sigmoid(share) * self.shared(tokens).astype(jnp.float32)
        return y.reshape(x.shape).astype(x.dtype)

    def _multiplied(self, x: jax.Array, routes: Routes) -> jax.Array:
        """Computes the outputs of the rows' experts, without the last bias, [M, H]."""
        biases = (None if each is None else each[...] for each in (self.gate_bias, self.up_bias))
        matrices = Matrices(self.gate[...], self.up[...], self.down[...], *biases)
        one = functools.partial(_through_experts, spec=self.spec, products=self.products)
        if self.products.mesh is None:
            return one(x, routes.offsets, routes.experts, matrices)
        # The kernels are opaque to the partitioner, so they are split explicitly.
        parts: Any = [None if each is None else part for each, part in zip(matrices, _PARTITIONS, strict=True)]
        return jax.shard_map(
            lambda *arguments: jax.lax.psum(one(*arguments), "tensor"),
            mesh=self.products.mesh,
            in_specs=(P(), P(), P(), Matrices(*parts)),
            out_specs=P(),
            check_vma=False,  # the kernels do not say over which axes their results vary
        )(x, routes.offsets, routes.experts, matrices)


# Traced and lowered once for each kind of layer, not for each layer; XLA inlines it.
@functools.partial(jax.jit, static_argnames=("spec", "products"))
def _through_experts(
    x: jax.Array, offsets: jax.Array, experts: jax.Array, matrices: Matrices, *, spec: MLPSpec, products: Products
) -> jax.Array:
    """Computes down(activated(gate(x), up(x))) of each row by its expert, [M, H]."""
    hidden = []
    for matrix, bias in ((matrices.gate, matrices.gate_bias), (matrices.up, matrices.up_bias)):
        y = products.grouped_matmul(x, matrix, offsets)
        hidden.append(y if bias is None else y + bias.astype(y.dtype)[experts])
    gate, up = (each.astype(jnp.float32) for each in hidden)
    if spec.clamp is not None:
        limit = spec.clamp.limit
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        activated = (up + 1) * (gate * jax.nn.sigmoid(spec.clamp.alpha * gate))
    else:
        activated = ACTIVATIONS[spec.activation](gate) * up
    return products.grouped_matmul(activated.astype(x.dtype), matrices.down, offsets)
