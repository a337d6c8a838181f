"""How the tensors of a Hugging Face checkpoint map to a model's parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

Path = tuple[str | int, ...]
"""Place of a parameter in the parameter tree, such as ("layers", 0, "attention", "qkv")."""

Params = dict[Any, Any]
"""Nested dicts of arrays (or of ShapeDtypeStructs), keyed by the parts of each parameter's path."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A tensor of a checkpoint and the part of a parameter that it fills.

    Attributes:
        tensor: name in the checkpoint.
        shape: shape in the checkpoint; reshaping it in C order to the shape of the part gives the part.
        index: the part, as an index of the parameter; () is all of it.
    """

    tensor: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()


def put(tree: Params, path: Path, leaf: Any) -> None:
    """Stores a leaf, making the dicts on the way."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def get(tree: Params, path: Path) -> Any:
    """The leaf, or KeyError."""
    for name in path:
        tree = tree[name]
    return tree


def path_text(path: Path) -> str:
    """The path as messages write it: layers.0.attention.qkv."""
    return ".".join(str(part) for part in path)
