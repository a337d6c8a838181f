"""Counts the bytes that quantized matrices take less than plain ones, without weights or jax."""

from __future__ import annotations

import dataclasses

from jaxserve.models.config import ModelConfig
from jaxserve.models.layer_specs import LayerSpec
from jaxserve.models.registry import lookup


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """Stands for a matrix as `TensorNames.stored` takes it; the fields are those of
    `jaxserve.models.layers.parameter.Source`."""

    tensor: str
    shape: tuple[int, int]
    rows: tuple[int, int] | None = None
    transposed: bool = False


def layers_saved(model: ModelConfig, item_bytes: int) -> int:
    """Returns the bytes that all layers' matrices are smaller by; item_bytes: of a weight that is not quantized."""
    if model.quantization is None:
        return 0
    return sum(
        _saved(model, matrices, number, item_bytes)
        for number, layer in enumerate(model.layer_specs)
        for matrices in _matrices(model, layer)
    )


def head_saved(model: ModelConfig, item_bytes: int) -> int:
    """Returns the bytes that the output matrix is smaller by."""
    if model.quantization is None or model.quantization.method == "load" or model.tie_word_embeddings:
        return 0
    size = model.embedding_size or model.hidden_size
    return _saved(model, (_Matrix("lm_head.weight", (model.vocab_size, size)),), None, item_bytes)


def _matrices(model: ModelConfig, layer: LayerSpec) -> list[tuple[_Matrix, ...]]:
    """Returns the matrices of a layer, together those that are one parameter; experts are held as they are."""
    hidden, dim = model.hidden_size, model.head_dim
    queries, keys = model.num_attention_heads * dim, model.num_key_value_heads * dim
    qkv = tuple(
        _Matrix(f"self_attn.{name}_proj.weight", (size, hidden))
        for name, size in (("q", queries), ("k", keys), ("v", keys))
    )
    found = [qkv, (_Matrix("self_attn.o_proj.weight", (hidden, queries)),)]
    wide, prefix = layer.mlp.intermediate_size, "mlp"
    if layer.mlp.router is not None:
        if layer.mlp.router.shared_size is None:
            return found
        wide, prefix = layer.mlp.router.shared_size, "mlp.shared_expert"
    gated = layer.mlp.kind != "plain"
    names = ("gate_proj", "up_proj") if gated else ("up_proj",)
    found.append(tuple(_Matrix(f"{prefix}.{name}.weight", (wide, hidden)) for name in names))
    found.append((_Matrix(f"{prefix}.down_proj.weight", (hidden, wide)),))
    return found


def _saved(model: ModelConfig, matrices: tuple[_Matrix, ...], layer: int | None, item_bytes: int) -> int:
    """Returns the bytes that one parameter is smaller by, by the rules of `jaxserve.models.params.parameters`."""
    quantization = model.quantization
    assert quantization is not None
    stored = lookup(model.architecture).names.stored(matrices, layer)
    targets = {quantization.target(one.tensor.removesuffix(".weight")) for one in stored}
    target = targets.pop()
    if targets or target is None or target.scheme is None:
        return 0
    if quantization.method != "load" and any(one.transposed for one in stored):
        return 0
    rows, length = sum(one.shape[0] for one in matrices), matrices[0].shape[1]
    ordered = 4 * length if target.scheme.ordered else 0
    return round(rows * (length * item_bytes - target.scheme.row_bytes(length))) - ordered
