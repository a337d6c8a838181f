"""Computes the bytes and operations of a decode step, and its time at a device's peak rates.

Counted: every weight once (of an embedding that is no output matrix, the rows of the step's tokens; of experts, as many
as the tokens would choose on average if all were as likely), the keys and values of every position once, those of the
step's tokens written. Not counted: activations, logits, the sampler; so a measured step is slower than this bound.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxserve.planning.model_cost import ModelCost
from jaxserve.programs.step_programs import Shapes
from jaxserve.programs.target_devices import Target


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """Describes a step of one token for each of `batch` sequences of `context` positions, the new one included.

    Attributes:
        bytes: that must be moved.
        flops: floating-point operations, an FMA counted as two.
        seconds: the longer of the two at peak rates, 0 where the target states none.
        bound: "memory" or "compute", "" where the target states none.
    """

    batch: int
    context: int
    bytes: int
    flops: int
    seconds: float
    bound: str

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds if self.seconds else 0.0


def token_bytes(shapes: Shapes) -> int:
    """Returns the bytes of one token's keys and values in all layers."""
    model = shapes.model
    numbers = 2 * model.num_key_value_heads * model.head_dim * model.num_hidden_layers
    return numbers * jnp.dtype(shapes.pool_dtype).itemsize


def page_bytes(shapes: Shapes) -> int:
    """Returns the bytes of one page: of as many layers as a group has, whether its group uses them all or not."""
    return token_bytes(shapes) // shapes.model.num_hidden_layers * shapes.groups.size * shapes.page_size


def decode_step(shapes: Shapes, target: Target, batch: int, context: int) -> DecodeStep:
    """Returns the roofline bound of one step on one device of the target."""
    model = shapes.model
    cost = ModelCost.of(model, jnp.dtype(shapes.dtype).name, jnp.dtype(shapes.pool_dtype).name)
    count = model.num_hidden_layers
    seen = sum(min(context, layer.attention.sliding_window or context) for layer in model.layer_specs)
    kept = batch * (seen + count) * (token_bytes(shapes) // count)
    plain = cost.norms + batch * cost.embedding_row
    read = round(cost.layer_bytes(batch)) + cost.head_bytes + plain * cost.item_bytes
    moved = read + kept
    attention = cost.attention_flops // count * seen
    flops = batch * (2 * (cost.multiplied + cost.head) + attention)
    by_memory = moved / target.memory_bandwidth if target.memory_bandwidth else 0.0
    by_compute = flops / target.peak_flops[shapes.dtype] if target.peak_flops.get(shapes.dtype) else 0.0
    bound = ("memory" if by_memory >= by_compute else "compute") if by_memory or by_compute else ""
    return DecodeStep(batch, context, moved, flops, max(by_memory, by_compute), bound)
