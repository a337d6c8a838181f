"""Counts the bytes and operations of a model's steps from its architecture, without weights or jax."""

from __future__ import annotations

import collections
import dataclasses

from jaxserve.models.config import ModelConfig
from jaxserve.models.layer_specs import MLPSpec
from jaxserve.planning.quantized_bytes import head_saved, layers_saved

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}
"""Bytes per number by dtype."""


@dataclasses.dataclass(frozen=True)
class ExpertCost:
    """Counts the experts of layers that are alike.

    Attributes:
        layers: number of the layers.
        count: experts of each.
        per_token: experts that a token goes through.
        numbers: weights of one expert.
    """

    layers: int
    count: int
    per_token: int
    numbers: int

    def unread(self, tokens: float) -> float:
        """Returns the weights of experts that no one of so many tokens goes through, if all experts are as likely."""
        return self.layers * self.numbers * self.count * (1 - self.per_token / self.count) ** tokens


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """Counts of one model; numbers of elements unless a name says bytes.

    Attributes:
        layers: weights of the layers' matrices, those of all experts included.
        head: of the output matrix.
        norms: weights that no matmul uses.
        embedding_row: numbers looked up for a token; 0 where the embedding is the output matrix.
        embedding: numbers of an embedding that is no output matrix, and of learned positions.
        attention_flops: of one query token and one position, in all layers.
        token_bytes: keys and values of one token in all layers.
        windows: of each layer, the positions that it attends to; () where no layer has a window.
        item_bytes: of one weight that is not quantized.
        saved: bytes that the layers' matrices are smaller by because they are quantized.
        head_saved: those of the output matrix.
        experts: of the layers that have some.
    """

    layers: int
    head: int
    norms: int
    embedding_row: int
    embedding: int
    attention_flops: int
    token_bytes: int
    item_bytes: int
    windows: tuple[int | None, ...] = ()
    experts: tuple[ExpertCost, ...] = ()
    saved: int = 0
    head_saved: int = 0

    @classmethod
    def of(cls, model: ModelConfig, dtype: str, pool_dtype: str) -> ModelCost:
        """Counts a decoder as in models/layers/decoder.py. dtype: of the weights; pool_dtype: of the pages.

        Raises ValueError for a dtype of unknown size.
        """
        for name, value in (("dtype", dtype), ("pool dtype", pool_dtype)):
            if value not in ITEM_BYTES:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(ITEM_BYTES)}")
        hidden, heads = model.hidden_size, model.num_attention_heads
        projected = (heads + 2 * model.num_key_value_heads) * model.head_dim
        last, size = model.layer_specs[-1], model.embedding_size or hidden
        norms = 0 if last.norm_place == "sum" else hidden * (1 + (last.norm == "layer"))
        layers = 0 if size == hidden else 2 * hidden * size  # the projections of embeddings
        experts: collections.Counter[tuple[int, int, int]] = collections.Counter()
        for layer in model.layer_specs:
            attention, mlp = layer.attention, layer.mlp
            layers += hidden * (projected + heads * model.head_dim) + _mlp_matrices(mlp, hidden)
            # What has several axes counts with the matrices.
            layers += attention.qkv_bias * projected + attention.sinks * heads
            if mlp.router is not None:
                experts[mlp.router.num_experts, mlp.router.per_token, _expert(mlp, hidden)] += 1
            count = 4 if layer.norm_place == "both" else 2
            norms += hidden * (count * (1 + (layer.norm == "layer")) + attention.out_bias)
            norms += mlp.router.bias * mlp.router.num_experts if mlp.router else hidden * mlp.bias
            norms += attention.qk_norm * 2 * model.head_dim
            norms += attention.whole_qk_norm * (heads + model.num_key_value_heads) * model.head_dim
        table = model.vocab_size * size
        places = model.max_position_embeddings * hidden if model.learned_positions else 0
        looked_up = 0 if model.tie_word_embeddings else size
        windows = tuple(layer.attention.sliding_window for layer in model.layer_specs)
        return cls(
            layers=layers,
            head=table,
            norms=norms,
            embedding_row=looked_up + (hidden if model.learned_positions else 0),
            embedding=places + (0 if model.tie_word_embeddings else table),
            attention_flops=4 * heads * model.head_dim * model.num_hidden_layers,
            token_bytes=2
            * model.num_key_value_heads
            * model.head_dim
            * model.num_hidden_layers
            * ITEM_BYTES[pool_dtype],
            item_bytes=ITEM_BYTES[dtype],
            windows=windows if any(windows) else (),
            experts=tuple(ExpertCost(count, *alike) for alike, count in experts.items()),
            saved=layers_saved(model, ITEM_BYTES[dtype]),
            head_saved=head_saved(model, ITEM_BYTES[dtype]),
        )

    def read(self, tokens: float) -> float:
        """Returns the weights of the layers' matrices that a step of so many tokens reads: of experts those that are
        chosen, on average."""
        return self.layers - sum(each.unread(tokens) for each in self.experts)

    def layer_bytes(self, tokens: float) -> float:
        """Returns the bytes of the layers' matrices that a step of so many tokens reads."""
        return self.read(tokens) * self.item_bytes - self.saved

    @property
    def head_bytes(self) -> int:
        """Bytes of the output matrix."""
        return self.head * self.item_bytes - self.head_saved

    @property
    def multiplied(self) -> int:
        """Weights of the layers' matrices that a token is multiplied by."""
        return self.layers - sum(each.layers * (each.count - each.per_token) * each.numbers for each in self.experts)

    def seen(self, positions: float, tokens: float) -> float:
        """Returns the positions that tokens attend to, a layer's on average, where they would attend to `positions` in
        all without windows. The tokens count as equally far from the begin of their sequences."""
        if not self.windows or not tokens:
            return positions
        mean = positions / tokens
        return (
            tokens * sum(mean if window is None else min(mean, window) for window in self.windows) / len(self.windows)
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        whole = (self.layers + self.head + self.norms + self.embedding) * self.item_bytes
        return whole - self.saved - self.head_saved


def _mlp_matrices(mlp: MLPSpec, hidden: int) -> int:
    """Returns the weights of an MLP's matrices and of the biases of its hidden layer; of experts those of all."""
    router = mlp.router
    if router is None:
        inward = (1 + (mlp.kind == "gated")) * mlp.intermediate_size
        return hidden * (inward + mlp.intermediate_size) + mlp.bias * inward
    shared = 0 if router.shared_size is None else hidden * (3 * router.shared_size + 1)
    return router.num_experts * (hidden + _expert(mlp, hidden)) + shared


def _expert(mlp: MLPSpec, hidden: int) -> int:
    """Returns the weights of one expert."""
    return 3 * hidden * mlp.intermediate_size + mlp.bias * (2 * mlp.intermediate_size + hidden)
