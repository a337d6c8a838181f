"""Declares parameters where layers use them: everything that is known of one stands in its `Parameter`.

What is held, where it lives on a mesh, how a dot reads it and which tensors of a checkpoint fill it follow from these
declarations alone (`jaxserve.models.params.parameters` lists those of a model).
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.models.quantization import Scheme

Path = tuple[str | int, ...]
"""Path of a parameter in the parameter tree, such as ("layers", 0, "attention", "qkv")."""

Params = dict[Any, Any]
"""Nested dicts of arrays (or of ShapeDtypeStructs), keyed by the parts of each parameter's path."""


class Form(enum.Enum):
    """Storage format of a parameter; those that are not dense have a `Scheme`, which says what scales they have."""

    DENSE = "dense"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


class Packing(enum.Enum):
    """Selects the CPU kernel whose packed order a parameter can take (`jaxserve.models.layers.matmul`)."""

    NONE = "none"
    MATRIX = "matrix"
    GATE_UP = "gate and up"
    EXPERTS = "matrices of experts"


class Initial(enum.Enum):
    """Initial value of a parameter before training."""

    NORMAL = "normal"
    ZEROS = "zeros"
    ONES = "ones"


@dataclasses.dataclass(frozen=True)
class Source:
    """Says which tensor of a checkpoint fills a parameter, or a range of one of its axes.

    Attributes:
        tensor: name in the checkpoint.
        shape: shape in the checkpoint.
        axis: axis of the parameter of which the range [start, stop) is filled; None fills all of it.
        start: see `axis`.
        stop: see `axis`.
        rows: the rows [first, last) of the tensor that are taken, where it holds several parts; None takes all.
        transposed: the tensor's two axes are the other way round; `rows` are those of the tensor turned back.
        order: index along the parameter's axis 2 (the elements of a head) of each element that is taken; None for all
            in order.
        item: the index along the tensor's first axis that is taken, where it holds what several parameters, or parts of
            one, are filled with; the other fields are then about this item.
        every: (first, step) of the rows that are taken, where it holds several parts row by row; None takes all.
    """

    tensor: str
    shape: tuple[int, ...]
    axis: int | None = None
    start: int = 0
    stop: int = 0
    rows: tuple[int, int] | None = None
    transposed: bool = False
    order: tuple[int, ...] | None = None
    item: int | None = None
    every: tuple[int, int] | None = None

    def target(self, parameter: np.ndarray) -> np.ndarray:
        """Returns the part of a parameter that this source fills, as a view."""
        if self.axis is None:
            return parameter
        return parameter[(slice(None),) * self.axis + (slice(self.start, self.stop),)]

    def values(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the numbers of a tensor, or of its `item`, that fill a part of this shape; a view unless they come in
        another order.
        """
        tensor = tensor.T if self.transposed else tensor
        if self.rows is not None:
            tensor = tensor[self.rows[0] : self.rows[1]]
        if self.every is not None:
            tensor = tensor[self.every[0] :: self.every[1]]
        values = tensor.reshape(shape)
        return values if self.order is None else np.take(values, np.array(self.order), axis=2)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Describes one parameter.

    Attributes:
        shape: its shape.
        partition: which of its axes the mesh's axis `tensor` splits; an entry for each axis.
        sources: the tensors that fill it, together once; names are relative to the layer where there is one.
        contracted: how many trailing axes a dot sums over.
        packing: the order that packed matrix products read it in.
        initial: what it is before training.
        fan_in: length of the dot that its variance before training is 1 over; None for that of `contracted`.
        whole_if_uneven: every device holds all of it where the mesh does not divide it (odd vocabularies).
        scheme: what its quantized numbers and their scales are; None for one that is held as it is. `form` follows.
        neutral: random weights have it as before training, so that it changes nothing: norms.
    """

    shape: tuple[int, ...]
    partition: P
    sources: tuple[Source, ...]
    contracted: int = 1
    packing: Packing = Packing.NONE
    initial: Initial = Initial.NORMAL
    fan_in: int | None = None
    whole_if_uneven: bool = False
    scheme: Scheme | None = None
    neutral: bool = False

    @property
    def form(self) -> Form:
        """How it is held."""
        return Form.DENSE if self.scheme is None else Form(self.scheme.kind)

    @property
    def dot_length(self) -> int:
        """Number of products that a dot with it sums up."""
        return math.prod(self.shape[len(self.shape) - self.contracted :])

    def make(self, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> nnx.Param:
        """Returns the module's variable, initialized as before training; its metadata holds this parameter as
        `spec`.
        """
        if self.initial is Initial.NORMAL:
            drawn = jax.random.normal(rngs.params(), self.shape, jnp.float32)
            value = (drawn / math.sqrt(self.fan_in or self.dot_length)).astype(dtype)
        else:
            value = jnp.full(self.shape, self.initial is Initial.ONES, dtype)
        return nnx.Param(value, spec=self)


def put(tree: Params, path: Path, leaf: Any) -> None:
    """Stores a leaf, making the dicts on the way."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def get(tree: Params, path: Path) -> Any:
    """Returns the leaf, or raises KeyError."""
    for name in path:
        tree = tree[name]
    return tree


def path_text(path: Path) -> str:
    """Writes the path as messages do: layers.0.attention.qkv."""
    return ".".join(str(part) for part in path)
