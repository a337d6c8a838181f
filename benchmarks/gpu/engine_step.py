"""The engine's own programs over random weights and pages: a decode step as the server dispatches it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import device
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import abstract_params, bind, make_mesh, products_for, random_params
from jaxserve.programs.compiler import compile_program, compiler_options
from jaxserve.programs.penalties import Penalties
from jaxserve.programs.slots import Slots
from jaxserve.programs.step_programs import (
    ProgramKey,
    Shapes,
    Weights,
    abstract_kv_scales,
    abstract_masks,
    abstract_pools,
    abstract_state,
)
from jaxserve.runner.packing import ForwardPacker, SamplePacker
from jaxserve.scheduler.plan import DecodeRows, Samples, StepPlan


@dataclasses.dataclass(frozen=True)
class Vectors:
    """What the host tells the two programs of a step, int32."""

    forward: np.ndarray
    sample: np.ndarray


class Engine:
    """Weights, pages and slots on the device; programs are compiled when they are first asked for."""

    def __init__(self, shapes: Shapes, seed: int):
        self.shapes = shapes
        self.mesh = make_mesh()
        scales = abstract_kv_scales(shapes, self.mesh)
        self.weights = Weights(
            random_params(shapes.model, shapes.dtype, self.mesh, seed),
            jax.tree.map(lambda scale: jnp.full(scale.shape, 0.02, scale.dtype, device=scale.sharding), scales),
        )
        key = jax.random.key(seed)
        self.pools = [
            device.random_array(jax.random.fold_in(key, layer), pool.shape, pool.dtype)
            for layer, pool in enumerate(abstract_pools(shapes, self.mesh))
        ]
        _, hidden = abstract_state(shapes, self.mesh)
        self.hidden = jnp.zeros(hidden.shape, hidden.dtype, device=hidden.sharding)
        self.slots = Slots.zeros(shapes.num_slots, shapes.max_pages)
        masks = abstract_masks(shapes, self.mesh)
        self._masks = jnp.zeros(masks.shape, masks.dtype, device=masks.sharding)
        self._penalties = Penalties.zeros(shapes.num_penalty_rows, shapes.model.vocab_size)
        self._programs: dict[ProgramKey, Any] = {}
        self._dense: dict[int, Any] = {}

    def set_tables(self, batch: int, context: int, seed: int, *, temperature: float = 0.0, top_p: float = 1.0) -> None:
        """Gives the first `batch` slots pages of their own for `context` positions, and all slots these parameters."""
        size = self.shapes.page_size
        table = np.zeros((self.shapes.num_slots, self.shapes.max_pages), np.int32)
        pages = -(-context // size)
        table[:batch, :pages] = device.page_tables(1, batch, pages, self.shapes.num_pages, seed)[0]
        fresh = Slots.zeros(self.shapes.num_slots, self.shapes.max_pages)
        given = {"temperature": temperature, "top_p": top_p}
        sampling = fresh.sampling | {name: jnp.full_like(fresh.sampling[name], value) for name, value in given.items()}
        self.slots = dataclasses.replace(fresh, page_table=jnp.asarray(table), sampling=sampling)

    def plan(self, batch: int, context: int) -> StepPlan:
        """A step in which each of `batch` rows decodes the token at position `context` - 1."""
        rows = DecodeRows(
            request_ids=tuple(str(slot) for slot in range(batch)),
            orders=np.arange(batch),
            slots=np.arange(batch, dtype=np.int32),
            starts=np.full(batch, context - 1, np.int32),
            page_rows=np.zeros(0, np.int32),
            pages=np.zeros(0, np.int32),
            page_size=self.shapes.page_size,
        )
        buckets = self.shapes.buckets
        return StepPlan(
            step=0,
            decodes=rows,
            chunks=(),
            samples=Samples.of((slot, slot, context, False, 0) for slot in range(batch)),
            token_bucket=buckets.token_bucket(batch),
            row_bucket=buckets.row_bucket(batch),
            num_tokens=batch,
        )

    def vectors(self, plan: StepPlan) -> Vectors:
        """The packed plan."""
        shapes, tokens = self.shapes, plan.token_bucket
        forward = ForwardPacker(tokens, shapes.buckets.rows_of(tokens), shapes.page_size, shapes.num_slots)
        return Vectors(forward.pack(plan), SamplePacker(plan.row_bucket, shapes.num_slots).pack(plan))

    def use(self, programs: Mapping[ProgramKey, Any]) -> None:
        """Takes these executables; those that are not among them are compiled when they are first asked for."""
        self._programs = dict(programs)

    def program(self, key: ProgramKey) -> Any:
        """The executable, compiled as the server compiles it."""
        if key not in self._programs:
            self._programs[key] = compile_program(key, self.shapes, self.mesh)
        return self._programs[key]

    def forward(self, key: ProgramKey, vector: Any) -> jax.Array:
        """Runs a forward program; returns what is ready when it is done."""
        self.pools, self.slots, self.hidden = self.program(key)(
            self.weights, self.pools, self.slots, self.hidden, vector
        )
        return self.hidden

    def sample(self, size: int, vector: Any) -> jax.Array:
        """Runs a sample program; returns the ids."""
        self.slots, self._penalties, ids, _ = self.program(ProgramKey("sample", size))(
            self.weights.params, self.slots, self.hidden, self._masks, self._penalties, vector
        )
        return ids

    def without_attention(self, tokens: int) -> tuple[Any, tuple[Any, ...]]:
        """The forward program less attention and KV write, and its arguments: the matrices, norms and activations."""
        shapes = self.shapes
        products = products_for(shapes.dtype, self.mesh)

        def attend(qkv: jax.Array, rotation: Any, cache: Any, spec: Any, sinks: Any, dtype: Any) -> Any:
            # Keys and values take part, so that no column of the projection is left out.
            return (qkv[..., :-2, :] + qkv[..., -2:-1, :] + qkv[..., -1:, :]).astype(dtype), cache

        def dense(params: Any, token_ids: jax.Array, positions: jax.Array) -> jax.Array:
            model = bind(shapes.model, params, products)
            hidden, _ = model(token_ids, positions, [None] * shapes.model.num_hidden_layers, attend)
            return hidden

        ids = jnp.arange(tokens, dtype=jnp.int32)
        arguments = (self.weights.params, ids, ids)
        if tokens not in self._dense:
            options = compiler_options(self.mesh.devices.flat[0].platform)
            self._dense[tokens] = jax.jit(dense).lower(*arguments).compile(options)
        return self._dense[tokens], arguments


def page_bytes(shapes: Shapes) -> int:
    """Bytes of one page in all layers."""
    model = shapes.model
    itemsize = jnp.dtype(shapes.pool_dtype).itemsize
    return 2 * model.num_key_value_heads * shapes.page_size * model.head_dim * itemsize * model.num_hidden_layers


def weight_bytes(model: ModelConfig, dtype: str) -> int:
    """Of all parameters."""
    leaves = jax.tree.leaves(abstract_params(model, dtype, make_mesh()))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def step_bytes(shapes: Shapes, batch: int, context: int) -> int:
    """What a decode step must move: every weight but the embedding's rows that no token has, and the context's pages.

    The step's own keys and values are written; activations and logits are left out.
    """
    model, itemsize = shapes.model, jnp.dtype(shapes.dtype).itemsize
    weights = weight_bytes(model, shapes.dtype)
    if not model.tie_word_embeddings:
        weights -= (model.vocab_size - batch) * model.hidden_size * itemsize
    return weights + batch * (context + 1) * (page_bytes(shapes) // shapes.page_size)
