"""Defines how a family names and lays out the tensors of its checkpoints. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

EMBEDDING = "model.embed_tokens"
LAYERS = "model.layers"
EXPERTS = "mlp.experts"


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """Maps the names that layers give to tensors, which are Llama's, to those of a family's checkpoints.

    Modules are named without `.weight` and `.bias`, and within a layer without what stands before its number.

    Attributes:
        renamed: the family's name of a module, where it differs.
        fused: modules that one tensor holds one after the other, by its module.
        expert_matrices: the family's names of the matrices of an expert, where they differ.
        fused_experts: tensors that hold matrices of all experts, by what stands behind the experts' module: the
            matrices whose rows they hold in turn, transposed. Their biases have the same name with `_bias`.
        transposed: modules whose matrices are stored [in, out].
        skipped_rows: rows of a module's tensor that stand before the first that is used.
        prefixes: beginnings of names as some checkpoints have them, and what stands for them in the others.
        ignored: ends of names of tensors that are no weights, such as masks.
        other_parts: beginnings of names of tensors that are no part of the language model.
    """

    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    expert_matrices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused_experts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    skipped_rows: Mapping[str, int] = dataclasses.field(default_factory=dict)
    prefixes: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    other_parts: tuple[str, ...] = ()

    @property
    def embedding(self) -> str:
        """Name of the tensor that holds the embedding."""
        return f"{self._module(EMBEDDING)}.weight"

    @property
    def layer_prefix(self) -> str:
        """What stands before the number of a layer."""
        return f"{self._module(LAYERS)}."

    def stored(self, sources: tuple[Any, ...], layer: Any = None) -> tuple[Any, ...]:
        """Returns the sources of a parameter (`jaxserve.models.layers.parameter.Source`) as checkpoints hold them.

        Args:
            sources: as the layers declare them; all parts of a fused tensor that come before one of them are there.
            layer: number of the layer; None outside of layers.
        """
        prefix = "" if layer is None else f"{self.layer_prefix}{layer}."
        rows = {source.tensor.rpartition(".")[0]: source.shape[0] for source in sources}
        if sources and sources[0].tensor.startswith(f"{EXPERTS}."):
            return tuple(self._of_expert(source, len(sources), prefix) for source in sources)
        return tuple(self._stored(source, rows, prefix) for source in sources)

    def canonical(self, name: str) -> str:
        """Returns the name of a checkpoint's tensor with the prefix that most checkpoints of the family have."""
        for found, wanted in self.prefixes:
            if name.startswith(found):
                return wanted + name.removeprefix(found)
        return name

    def counts(self, name: str) -> bool:
        """Returns whether a checkpoint's tensor may be one of the model's weights."""
        return not (name.startswith(self.other_parts) or name.endswith(self.ignored))

    def _module(self, name: str) -> str:
        return self.renamed.get(name, name)

    def _of_expert(self, source: Any, count: int, prefix: str) -> Any:
        """Returns a source of one of `count` experts."""
        number, matrix, kind = source.tensor.removeprefix(f"{EXPERTS}.").split(".")
        module = prefix + self._module(EXPERTS)
        for fused, matrices in self.fused_experts.items():
            if matrix in matrices:
                rows, *rest = source.shape
                return dataclasses.replace(
                    source,
                    tensor=f"{module}.{fused}{'_bias' if kind == 'bias' else ''}",
                    shape=(count, *rest, rows * len(matrices)),
                    transposed=bool(rest),
                    item=int(number),
                    every=(matrices.index(matrix), len(matrices)) if len(matrices) > 1 else None,
                )
        return dataclasses.replace(
            source, tensor=f"{module}.{number}.{self.expert_matrices.get(matrix, matrix)}.{kind}"
        )

    def _stored(self, source: Any, rows: Mapping[str, int], prefix: str) -> Any:
        module, _, kind = source.tensor.rpartition(".")
        shape, taken = source.shape, source.rows
        for fused, parts in self.fused.items():
            if module in parts:
                start = sum(rows[part] for part in parts[: parts.index(module)])
                taken = start, start + shape[0]
                shape = (sum(rows[part] for part in parts), *shape[1:])
                module = fused
        if skipped := self.skipped_rows.get(module):
            taken, shape = (skipped, skipped + shape[0]), (skipped + shape[0], *shape[1:])
        turned = module in self.transposed and len(shape) == 2
        return dataclasses.replace(
            source,
            tensor=f"{prefix}{self._module(module)}.{kind}",
            shape=shape[::-1] if turned else shape,
            rows=taken,
            transposed=turned,
        )
