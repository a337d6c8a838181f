"""Lists the tensors of a checkpoint directory from the headers of its safetensors files.

Imports no jax, so that a configuration can be compared with the tensors wherever it is read.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from jaxserve.models.families import tensor_names
from jaxserve.models.families.tensor_names import TensorNames
from jaxserve.models.loading import mxfp4
from jaxserve.models.loading.json_files import parse
from jaxserve.models.loading.mxfp4 import MXFP4Tensor
from jaxserve.models.loading.safetensors_file import DTYPES, StoredTensor, read_header, same_values

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

EMBEDDING = f"{tensor_names.EMBEDDING}.weight"
HEAD = "lm_head.weight"
ROTARY_BUFFER = "rotary_emb.inv_freq"
"""Suffix of the names of rotary frequencies, which early releases of transformers saved."""

_NAMES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Serving dtype of weights by their stored dtype; float64 is never served."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Lists the tensors of a checkpoint directory.

    Attributes:
        directory: directory of the files.
        tensors: every tensor that was found, by name.
        absent: the error for a tensor that is not in the file that the index names, by its name.
        unusable: the error for one in a file that is missing or malformed, or in two files.
        names: how the model's family names its tensors.
    """

    directory: pathlib.Path
    tensors: Mapping[str, StoredTensor]
    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unusable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    names: TensorNames = TensorNames()

    @property
    def embedding(self) -> str:
        """Name of the tensor that holds the embedding."""
        return self.names.embedding

    def find(self, name: str) -> StoredTensor | MXFP4Tensor | None:
        """Returns a tensor that the model needs, or what stands for it; None where neither a file nor the index has it.

        Raises ValueError, one line, where it cannot be had as the index says. What the index says of other tensors does
        not matter.
        """
        return self.get(name) or mxfp4.find(self.tensors, name)

    def get(self, name: str) -> StoredTensor | None:
        """Returns a tensor that is stored under this name. Raises ValueError as `find` does."""
        for faults in (self.unusable, self.absent):
            if name in faults:
                raise ValueError(faults[name])
        return self.tensors.get(name)

    @property
    def num_layers(self) -> int:
        """Number of layers with listed tensors: one more than the greatest layer index."""
        layer = re.compile(re.escape(self.names.layer_prefix) + r"(\d+)\.")
        found = [layer.match(name) for name in (*self.tensors, *self.absent, *self.unusable)]
        return max((int(match[1]) + 1 for match in found if match and len(match[1]) < 10), default=0)

    @property
    def dtype(self) -> str | None:
        """Name of the dtype of most bytes of the weights; None where no weight has a dtype of `DTYPES`."""
        sizes: collections.Counter[str] = collections.Counter()
        for tensor in self.tensors.values():
            if tensor.dtype in DTYPES:
                sizes[_NAMES[tensor.dtype]] += math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        return max(sizes, key=lambda name: sizes[name]) if sizes else None


def has_safetensors(directory: pathlib.Path) -> bool:
    """Returns whether a directory holds weights as safetensors."""
    return (directory / SINGLE_FILE).exists() or (directory / INDEX_FILE).exists()


def has_own_head(stored: Stored) -> bool:
    """Returns whether a checkpoint configured as tied holds an output matrix that differs from its embedding.

    Raises ValueError where both are listed and cannot be compared.
    """
    # One that is listed and in no file is none: indexes are copied. One in a file that is missing may differ.
    if HEAD not in stored.tensors and HEAD not in stored.unusable:
        return False
    stored.find(HEAD)  # raises where it cannot be had
    head, embedding = stored.tensors.get(HEAD), stored.tensors.get(stored.embedding)
    if head is None or embedding is None:
        return False
    if head.dtype not in DTYPES or embedding.dtype not in DTYPES:
        return True  # loading names the dtype
    stats = [tensor.path.stat() for tensor in (head, embedding)]
    return not _same_values(head, embedding, tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats))


@functools.lru_cache(maxsize=8)  # a start asks several times, and the two may be a gigabyte
def _same_values(one: StoredTensor, other: StoredTensor, files: tuple[tuple[int, ...], ...]) -> bool:
    """Computes `same_values` of tensors in files with that identity."""
    return same_values(one, other)


def read_stored(directory: pathlib.Path, names: TensorNames = TensorNames()) -> Stored:
    """Reads the headers of a directory's files; like transformers, it prefers the single file to an index.

    Args:
        directory: of the checkpoint.
        names: of the family's tensors; those with another prefix get the usual one, and those that are no weights are
            left out.

    Raises:
        ValueError: one line, where there is neither or where a file is malformed.
    """
    stored = _read_stored(directory)
    parts: list[Mapping[str, Any]] = [stored.tensors, stored.absent, stored.unusable]
    renamed = [{names.canonical(name): value for name, value in part.items() if names.counts(name)} for part in parts]
    return Stored(directory, renamed[0], renamed[1], renamed[2], names)


def _read_stored(directory: pathlib.Path) -> Stored:
    if (directory / SINGLE_FILE).exists():
        return Stored(directory, read_header(directory / SINGLE_FILE))
    index = directory / INDEX_FILE
    if not index.exists():
        raise ValueError(f"checkpoint {directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    shard_of = _shard_of(index)
    tensors: dict[str, StoredTensor] = {}
    unusable: dict[str, str] = {}
    faulty: dict[str, str] = {}
    for shard in sorted(set(shard_of.values())):
        path = directory / shard
        try:
            held = read_header(path)
        except ValueError as error:  # it may hold nothing that is needed
            faulty[shard] = str(error) if path.exists() else f"{error}; {INDEX_FILE} lists it"
            continue
        for name in held.keys() & tensors.keys():
            unusable[name] = f"checkpoint files {tensors[name].path} and {path} both hold tensor {name}"
        tensors |= held
    unusable |= {name: faulty[shard] for name, shard in shard_of.items() if shard in faulty}
    absent = {
        name: f"checkpoint file {directory / shard} has no tensor {name}; {INDEX_FILE} says it does"
        for name, shard in shard_of.items()
        if shard not in faulty and (name not in tensors or tensors[name].path.name != shard)
    }
    return Stored(directory, tensors, absent, unusable)


def _shard_of(index: pathlib.Path) -> dict[str, str]:
    """Returns the file of each tensor according to the index."""
    try:
        shard_of: Any = parse(index.read_bytes())["weight_map"]
        shards = set(shard_of.values())
    except OSError as error:
        raise ValueError(f"checkpoint file {index} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint file {index} is invalid: it needs a weight_map of tensor to file") from error
    for shard in shards:
        if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard:
            raise ValueError(f"checkpoint file {index} is invalid: {shard!r} is no name of a file beside it")
    return shard_of
