"""Defines the programs of a step, and the closed set of them that a server can need.

    forward(weights, pools, slots, hidden, vector)          -> pools, slots, hidden            one for each token bucket
    sample(params, slots, hidden, masks, penalties, vector) -> slots, penalties, ids, logprobs  one for each row bucket
    score(params, hidden, vector)                           -> logprobs                        one, for a block of rows
    pooling(hidden, vector)                                 -> sums                            for few rows, and for all

One program each of `state_programs` sets page tables, wide options and masks, one of a few sizes fills penalty rows
(`penalties.py`), and one of `swap_programs` copies pages. Where sequences are swapped to host memory, `swap_programs`
for a few numbers of pages join them.

Where the attention kernels benefit, decode-only steps have forward programs of their own, without the attention for
prompts.

Pools, slots and the hidden buffer are donated: they keep their addresses. The hidden buffer has room for the largest
token bucket, so the shapes of the programs that read it do not depend on the forward program that filled it. The sample
program reads the masks where a row is masked, and the penalty rows, which are donated too, where a row has one; it
computes log-probabilities where a row wants them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.config.logprobs_config import MAX_LOGPROBS
from jaxserve.models.config import ModelConfig
from jaxserve.models.layer_groups import LayerGroups, layer_groups
from jaxserve.models.layers.attention_backends import (
    POOL_PARTITION,
    SCALE_PARTITION,
    AttentionMetadata,
    LayerCaches,
    paged_attend,
)
from jaxserve.models.layers.matmul import Products
from jaxserve.models.params import abstract_params, bind, products_for
from jaxserve.pallas_kernels.paged_attention import IMPLEMENTATIONS, is_quantized, pool_spec
from jaxserve.programs.layout import (
    MASK_ROWS,
    PENALTY_RUNS,
    forward_layout,
    mask_layout,
    option_layout,
    penalty_layout,
    pooling_layout,
    sample_layout,
    score_layout,
    table_layout,
)
from jaxserve.programs.logprobs import drawn_logprobs, packed_logprobs, packed_width
from jaxserve.programs.penalties import Penalties, add_ids, counted
from jaxserve.programs.pooling import pool
from jaxserve.programs.sampler import processed_logits, sample
from jaxserve.programs.slots import Slots
from jaxserve.programs.state_programs import mask_words, write_masks, write_options, write_tables
from jaxserve.programs.swap_programs import COPY_PAGES, SWAP_SIZES, page_copy, swap_in, swap_out
from jaxserve.sampling_params import PENALTY_ROW
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.plan import TABLE_RUN, StepPlan

NULL_SLOT = 0
"""Slot to which padding tokens write their keys and values: the first slot of the null page."""


class Weights(NamedTuple):
    """Holds the weights of a forward program.

    Attributes:
        params: the model's parameters.
        kv_scales: for each layer float32 [K] and [K], per-head factors of the stored keys and values; None unless
            pages are quantized.
    """

    params: Any
    kv_scales: Any = None


@dataclasses.dataclass(frozen=True, order=True)
class ProgramKey:
    """Identifies a program of the closed set.

    Attributes:
        kind: "forward", "decode" (forward for a step in which no row has more than one token), "sample", "score",
            "pooling", "table_write", "option_write", "mask_write", "penalty_write", "page_copy", "swap_in" or
            "swap_out".
        size: its token or row bucket, its rows, its entries of page tables, its slots, its masks, its token ids, or its
            pages.
    """

    kind: str
    size: int

    @property
    def uses_pools(self) -> bool:
        """Returns whether the pools are among its arguments, so that it depends on their size."""
        return self.kind in ("forward", "decode", "swap_in", "swap_out", "page_copy")


SCORE_ROWS = 64
"""Maximum number of tokens whose successors one call of the score program scores."""

TABLE_WRITE = ProgramKey("table_write", TABLE_RUN)
OPTION_WRITE = ProgramKey("option_write", 1)
MASK_WRITE = ProgramKey("mask_write", MASK_ROWS)
PAGE_COPY = ProgramKey("page_copy", COPY_PAGES)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Holds everything that determines the shapes of the programs.

    Attributes:
        kv_cache_dtype: name of the dtype of keys and values in pages; None is `dtype`.
        packed: name of the CPU kernels in whose order weights are packed; "" for unpacked weights.
        row_products: name of the CPU kernels that multiply by weights that are not packed; "" for XLA's dots.
        quantized: name of the CPU kernels that multiply by quantized weights; "" for XLA's dots.
        num_host_pages: pages of host memory for swapped sequences; 0 where none are swapped.
        num_penalty_rows: requests with penalties that can run at once.
        max_logprobs: likeliest ids of one position that a request may ask for, at most as many as the vocabulary has.
        logprobs_mode: as `LogprobsConfig.logprobs_mode`.
        cascade: as `EngineConfig.cascade_attention`.
    """

    model: ModelConfig
    dtype: str
    buckets: Buckets
    num_slots: int
    max_model_len: int
    page_size: int
    num_pages: int
    attention: str
    kv_cache_dtype: str | None = None
    packed: str = ""
    row_products: str = ""
    quantized: str = ""
    num_host_pages: int = 0
    num_penalty_rows: int = 1
    max_logprobs: int = MAX_LOGPROBS
    logprobs_mode: str = "raw_logprobs"
    cascade: str = "auto"

    @functools.cached_property
    def groups(self) -> LayerGroups:
        """Groups of layers, which share the pools' arrays and have page tables of their own."""
        return layer_groups(self.model.layer_kinds, self.page_size, self.max_model_len)

    @property
    def num_groups(self) -> int:
        """Number of groups of layers, and of page tables of a sequence."""
        return len(self.groups.windows)

    @property
    def swap_sizes(self) -> tuple[int, ...]:
        """Numbers of pages that the swap programs copy; () where no sequences are swapped to host memory."""
        return tuple(size for size in SWAP_SIZES if size <= self.num_host_pages)

    @property
    def pooling_sizes(self) -> tuple[int, ...]:
        """Numbers of rows of the pooling programs: prompts to be embedded come alone, or as many as run at once."""
        rows = self.buckets.rows
        return tuple(sorted({rows[0], rows[-1]}))

    def pooling_key(self, num_pooled: int) -> ProgramKey:
        """Returns the pooling program for so many rows."""
        return ProgramKey("pooling", min(size for size in self.pooling_sizes if size >= num_pooled))

    @property
    def pool_dtype(self) -> str:
        """Name of the dtype of keys and values in pages."""
        return self.kv_cache_dtype or self.dtype

    @property
    def max_pages(self) -> int:
        """Maximum number of pages of a sequence."""
        return -(-self.max_model_len // self.page_size)

    @property
    def score_key(self) -> ProgramKey:
        """Identifies the program that scores tokens of a prompt: no step has more of them than it has tokens."""
        return ProgramKey("score", min(SCORE_ROWS, self.buckets.tokens[-1]))

    def forward_key(self, plan: StepPlan) -> ProgramKey:
        """Returns the forward program that computes a step."""
        decode = plan.decode_only and IMPLEMENTATIONS[self.attention].decode_programs
        return ProgramKey("decode" if decode else "forward", plan.token_bucket)


def products_of(shapes: Shapes, mesh: Mesh) -> Products:
    """Returns the matrix products of the model's layers."""
    experts = any(layer.mlp.kind == "experts" for layer in shapes.model.layer_specs)
    return products_for(
        shapes.dtype,
        mesh,
        packed=shapes.packed,
        by_rows=bool(shapes.row_products),
        experts=experts,
        quantized=shapes.quantized,
        quantization=shapes.model.quantization,
    )


def program_keys(shapes: Shapes) -> list[ProgramKey]:
    """Returns the closed set, largest first, so that a shape that does not fit fails at once."""
    buckets = shapes.buckets
    keys = [ProgramKey("forward", size) for size in buckets.tokens]
    if IMPLEMENTATIONS[shapes.attention].decode_programs:
        keys += [ProgramKey("decode", size) for size in buckets.decode_tokens]
    keys += [ProgramKey("sample", size) for size in buckets.rows]
    keys += [shapes.score_key, TABLE_WRITE, OPTION_WRITE, MASK_WRITE, PAGE_COPY]
    keys += [ProgramKey("penalty_write", size) for size in PENALTY_RUNS]
    keys += [ProgramKey("pooling", size) for size in shapes.pooling_sizes]
    keys += [ProgramKey(kind, size) for kind in ("swap_in", "swap_out") for size in shapes.swap_sizes]
    return sorted(keys, key=lambda key: (key.kind, -key.size))


def decisive_shapes(shapes: Shapes) -> Shapes:
    """Returns `shapes` with normalized values in fields that affect no program: equal ones have the same set of
    programs.

    Only the part of the context that is used counts. The number of host pages determines only whether some programs are
    in the set.
    """
    model = shapes.model.decisive
    used = max(1, int(shapes.max_model_len / model.rope_scaling.context_factor))
    if not model.learned_positions:  # they are parameters, as many as the checkpoint has
        model = dataclasses.replace(model, max_position_embeddings=used)
    return dataclasses.replace(shapes, model=model, num_host_pages=0)  # swapped pages are arrays of their own


def program_shapes(key: ProgramKey, shapes: Shapes) -> Shapes:
    """Returns `shapes` with normalized values in fields that do not affect the program: equal ones have the same
    one.
    """
    shapes = decisive_shapes(shapes)
    if key.kind != "sample":
        shapes = dataclasses.replace(shapes, logprobs_mode="raw_logprobs")
        if key.kind != "score":
            shapes = dataclasses.replace(shapes, max_logprobs=0)
    if key.kind not in ("sample", "penalty_write"):
        shapes = dataclasses.replace(shapes, num_penalty_rows=1)
    return shapes if key.uses_pools else dataclasses.replace(shapes, num_pages=2)


def lower(key: ProgramKey, shapes: Shapes, mesh: Mesh) -> jax.stages.Lowered:
    """Traces and lowers one program for the devices of `mesh`; nothing is allocated."""
    # The mesh says what the kernels are lowered for: compile-only devices are not those of the default backend.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return trace(key, shapes, mesh).lower()


def trace(key: ProgramKey, shapes: Shapes, mesh: Mesh, platform: str | None = None) -> jax.stages.Traced:
    """Traces one program, as `lower` does. platform: that it is for ("cpu", "gpu"), where `mesh` is of another."""
    function = _function(key, shapes, mesh, platform or mesh.devices.flat[0].platform)
    arguments = abstract_arguments(key, shapes, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_results(key, shapes, mesh))
    named: Callable[..., Any] = _named(function, f"{key.kind}_{key.size}")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(named, donate_argnums=donated_arguments(key), out_shardings=shardings).trace(*arguments)


def _function(key: ProgramKey, shapes: Shapes, mesh: Mesh, platform: str) -> Callable[..., Any]:
    match key.kind:
        case "sample":
            return functools.partial(sample_step, rows=key.size, shapes=shapes, mesh=mesh, on_cpu=platform == "cpu")
        case "score":
            return functools.partial(score_step, rows=key.size, shapes=shapes, mesh=mesh)
        case "pooling":
            return functools.partial(pool, rows=key.size)
        case "table_write":
            return write_tables
        case "option_write":
            return write_options
        case "mask_write":
            return write_masks
        case "penalty_write":
            return functools.partial(add_ids, ids=key.size)
        case "page_copy":
            return page_copy
        case "swap_in":
            return swap_in
        case "swap_out":
            return functools.partial(swap_out, pages=key.size)
        case _:
            decode_only = key.kind == "decode"
            return functools.partial(forward, tokens=key.size, shapes=shapes, mesh=mesh, decode_only=decode_only)


def abstract_arguments(key: ProgramKey, shapes: Shapes, mesh: Mesh) -> tuple[Any, ...]:
    """Returns the program's arguments as ShapeDtypeStructs with shardings."""
    slots, hidden = abstract_state(shapes, mesh)
    match key.kind:
        case "sample":
            params = abstract_params(shapes.model, shapes.dtype, mesh)
            rows = abstract_masks(shapes, mesh), abstract_penalties(shapes, mesh)
            return params, slots, hidden, *rows, _int32(mesh, sample_layout(key.size).size)
        case "score":
            params = abstract_params(shapes.model, shapes.dtype, mesh)
            return params, hidden, _int32(mesh, score_layout(key.size).size)
        case "pooling":
            return hidden, _int32(mesh, pooling_layout(key.size).size)
        case "table_write":
            return slots, _int32(mesh, table_layout(shapes.num_groups).size)
        case "option_write":
            return slots, _int32(mesh, option_layout().size)
        case "penalty_write":
            return abstract_penalties(shapes, mesh), _int32(mesh, penalty_layout(key.size).size)
        case "mask_write":
            masks = abstract_masks(shapes, mesh)
            return masks, _int32(mesh, mask_layout(masks.shape[1]).size)
        case "page_copy":
            return abstract_pools(shapes, mesh), _int32(mesh, 2 * key.size)
        case "swap_in":
            return abstract_pools(shapes, mesh), abstract_pages(key.size, shapes, mesh), _int32(mesh, key.size)
        case "swap_out":
            return abstract_pools(shapes, mesh), _int32(mesh, key.size)
        case _:
            weights = Weights(abstract_params(shapes.model, shapes.dtype, mesh), abstract_kv_scales(shapes, mesh))
            size = forward_layout(key.size, shapes.buckets.rows_of(key.size), shapes.page_size, shapes.num_groups).size
            return weights, abstract_pools(shapes, mesh), slots, hidden, _int32(mesh, size)


def abstract_results(key: ProgramKey, shapes: Shapes, mesh: Mesh) -> Any:
    """Returns the program's results as ShapeDtypeStructs with shardings."""
    match key.kind:
        case "sample":
            slots, _ = abstract_state(shapes, mesh)
            drawn = _int32(mesh, key.size), _abstract_logprobs(key, shapes, mesh)
            return slots, abstract_penalties(shapes, mesh), *drawn
        case "score":
            return _abstract_logprobs(key, shapes, mesh)
        case "pooling":
            sums = (key.size, 2 * shapes.model.hidden_size + 1)
            return jax.ShapeDtypeStruct(sums, jnp.int32, sharding=NamedSharding(mesh, P()))
        case "table_write" | "option_write" | "mask_write" | "penalty_write" | "page_copy":
            return abstract_arguments(key, shapes, mesh)[0]
        case "swap_in":
            return abstract_pools(shapes, mesh), _int32(mesh, 1)
        case "swap_out":
            return abstract_pages(key.size, shapes, mesh)
        case _:
            return abstract_arguments(key, shapes, mesh)[1:4]


def donated_arguments(key: ProgramKey) -> tuple[int, ...]:
    """Returns the indices of the donated arguments: of pools, slots, the hidden buffer, masks and penalty rows those
    that it changes.
    """
    few = {"sample": (1, 4), "score": (), "pooling": (), "swap_out": ()}
    of_kind = (1, 2, 3) if key.kind in ("forward", "decode") else (0,)
    return few.get(key.kind, of_kind)


def abstract_pages(count: int, shapes: Shapes, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns pages in transit to or from host memory, [m, 2, K, page_size, D] each, split as the pools are."""
    pools = abstract_pools(shapes, mesh)
    shape = (len(pools), *pools[0].shape[1:])
    return (jax.ShapeDtypeStruct(shape, pools[0].dtype, sharding=NamedSharding(mesh, POOL_PARTITION)),) * count


def _int32(mesh: Mesh, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, P()))


def _abstract_logprobs(key: ProgramKey, shapes: Shapes, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return _int32(mesh, key.size, packed_width(shapes.max_logprobs))


def abstract_pools(shapes: Shapes, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """Returns one pool for each layer of a group, split over the mesh by key-value head."""
    model = shapes.model
    pool = pool_spec(
        shapes.num_pages,
        model.num_key_value_heads,
        shapes.page_size,
        model.head_dim,
        shapes.pool_dtype,
        platform=mesh.devices.flat[0].platform,
        sharding=NamedSharding(mesh, POOL_PARTITION),
    )
    return [pool] * shapes.groups.size


def abstract_kv_scales(shapes: Shapes, mesh: Mesh) -> list[tuple[jax.ShapeDtypeStruct, ...]] | None:
    """Returns the scales of quantized pages, split as the pools are; None where pages are not quantized."""
    if not is_quantized(shapes.pool_dtype):
        return None
    sharding = NamedSharding(mesh, SCALE_PARTITION)
    scale = jax.ShapeDtypeStruct((shapes.model.num_key_value_heads,), jnp.float32, sharding=sharding)
    return [(scale, scale)] * shapes.model.num_hidden_layers


def abstract_state(shapes: Shapes, mesh: Mesh) -> tuple[Any, jax.ShapeDtypeStruct]:
    """Returns the slots and the hidden buffer [largest token bucket, H], replicated on every device."""
    replicated = NamedSharding(mesh, P())
    slots = jax.eval_shape(lambda: Slots.zeros(shapes.num_slots, shapes.max_pages, shapes.num_groups))
    slots = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), slots)
    hidden = (shapes.buckets.tokens[-1], shapes.model.hidden_size)
    return slots, jax.ShapeDtypeStruct(hidden, jnp.dtype(shapes.dtype), sharding=replicated)


def abstract_masks(shapes: Shapes, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Returns the masks of the slots, uint32 [S, words of the vocabulary], replicated on every device."""
    shape = (shapes.num_slots, mask_words(shapes.model.vocab_size))
    return jax.ShapeDtypeStruct(shape, jnp.uint32, sharding=NamedSharding(mesh, P()))


def abstract_penalties(shapes: Shapes, mesh: Mesh) -> Penalties:
    """Returns the penalty rows, replicated on every device."""
    rows = jax.eval_shape(lambda: Penalties.zeros(shapes.num_penalty_rows, shapes.model.vocab_size))
    replicated = NamedSharding(mesh, P())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), rows)


def forward(
    weights: Weights,
    pools: list[jax.Array],
    slots: Slots,
    hidden: jax.Array,
    vector: jax.Array,
    *,
    tokens: int,
    shapes: Shapes,
    mesh: Mesh,
    decode_only: bool,
) -> tuple[list[jax.Array], Slots, jax.Array]:
    """Computes a step's tokens: keys and values into the pools, final hidden states into the first rows of `hidden`."""
    layout = forward_layout(tokens, shapes.buckets.rows_of(tokens), shapes.page_size, shapes.num_groups)
    fields = layout.read(vector)
    slots = slots.apply(fields)
    inputs = fields["token_ids"]
    token_ids = jnp.where(inputs < 0, slots.last_token[jnp.maximum(-1 - inputs, 0)], inputs)
    metadata = [attention_metadata(fields, table, shapes.page_size) for table in slots.tables]
    attend = paged_attend(metadata, shapes.attention, mesh, decode_only=decode_only, cascade=shapes.cascade)
    model = bind(shapes.model, weights.params, products_of(shapes, mesh))
    caches = LayerCaches(pools, weights.kv_scales, shapes.groups.places)
    computed, caches = model(token_ids, metadata[0].positions, caches, attend, metadata[0].query_start_loc)
    # Its index is always 0, but sent by the host: XLA makes an update at a constant index an asynchronous copy, which
    # cannot join the rest of the step in one CUDA graph.
    hidden = jax.lax.dynamic_update_slice_in_dim(hidden, computed, fields["query_start_loc"][0], axis=0)
    return caches.pools, slots, hidden


def sample_step(
    params: Any,
    slots: Slots,
    hidden: jax.Array,
    masks: jax.Array,
    penalties: Penalties,
    vector: jax.Array,
    *,
    rows: int,
    shapes: Shapes,
    mesh: Mesh,
    on_cpu: bool,
) -> tuple[Slots, Penalties, jax.Array, jax.Array]:
    """Draws the next token of each sampled row; the slots remember it for the forward program that follows, and the
    penalty rows count it.

    Returns slots, penalty rows, ids, and int32 [rows, columns] of `packed_logprobs`, which mean nothing unless a row
    wants them.
    """
    fields = sample_layout(rows).read(vector)
    model = bind(shapes.model, params, products_of(shapes, mesh))
    logits = model.logits(hidden[fields["token"]])
    ids = sample(logits, slots, masks, penalties, fields, on_cpu=on_cpu)
    last_token = slots.last_token.at[fields["slot"]].set(jnp.maximum(ids, 0), mode="drop")
    penalty_rows = slots.sampling[PENALTY_ROW].at[fields["slot"]].get(mode="fill", fill_value=-1)
    processed = lambda: processed_logits(logits, slots, masks, penalties, fields, on_cpu=on_cpu)  # noqa: E731
    most, mode = shapes.max_logprobs, shapes.logprobs_mode
    found = drawn_logprobs(logits, ids, fields["logprobs"], processed, most, mode, on_cpu=on_cpu)
    return dataclasses.replace(slots, last_token=last_token), counted(penalties, penalty_rows, ids), ids, found


def score_step(
    params: Any, hidden: jax.Array, vector: jax.Array, *, rows: int, shapes: Shapes, mesh: Mesh
) -> jax.Array:
    """Scores the token that follows each row's; returns int32 [rows, columns] of `packed_logprobs`."""
    fields = score_layout(rows).read(vector)
    model = bind(shapes.model, params, products_of(shapes, mesh))
    return packed_logprobs(model.logits(hidden[fields["token"]]), fields["target"], shapes.max_logprobs)


def attention_metadata(fields: dict[str, jax.Array], page_table: jax.Array, page_size: int) -> AttentionMetadata:
    """Returns positions, lengths, tables and slot mapping of a step, from the host inputs and the slots' page table of
    one group of layers, int32 [S, P]."""
    ends = fields["query_start_loc"]
    tokens = jnp.arange(fields["token_ids"].shape[0], dtype=jnp.int32)
    # Every comparison at once: a binary search is a loop, which cannot join the rest of the step in one CUDA graph.
    row = jnp.searchsorted(ends[1:], tokens, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, ends.shape[0] - 2)
    lengths = ends[1:] - ends[:-1]
    page_table = page_table[fields["row_slot"]]
    real = tokens < ends[-1]
    positions = jnp.where(real, fields["row_start"][row] + tokens - ends[row], 0)
    page = page_table[row, positions // page_size]
    return AttentionMetadata(
        positions=positions,
        page_table=page_table,
        kv_lens=jnp.where(lengths > 0, fields["row_start"] + lengths, 0),
        query_start_loc=ends,
        slot_mapping=jnp.where(real, page * page_size + positions % page_size, NULL_SLOT),
    )


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Returns `function` under a name that profiles and dumps show."""

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__name__ = name
    return call
