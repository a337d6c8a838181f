"""The model architectures that can be served, by the name a `config.json` gives them.

To add a model: write its module and tables beside llama.py, and add one entry to `ARCHITECTURES` and its name to
`jaxserve.models.config.ARCHITECTURES`, which is there for those who do without jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec as P

from jaxserve.models import llama
from jaxserve.models.config import ModelConfig, check_architecture
from jaxserve.models.weights import Params, Path, Slice


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the loader and the engine need to know of a model.

    Attributes:
        module: the nnx module, called as module(config, dtype=, products=, rngs=); its interface is `llama.Llama`'s.
        weights: the checkpoint's tensors of each parameter; its keys are exactly the module's parameters.
        unneeded: whether a checkpoint may hold a tensor that no parameter takes.
        kv_scale: (layer, sides) of a tensor that scales quantised keys (side 0), values (1) or both; None for others.
        partition: PartitionSpec over the axis `tensor` of each parameter, by the last name of its path.
        split_fields: fields of the configuration that the size of that axis must divide.
        contracted_axes: how many trailing axes of a parameter its dot sums over, where not 1, by the last name.
        packable: whether this CPU has kernels that read weights of a dtype in packed order.
        pack: puts the parameters in that order, in place.
    """

    module: Callable[..., Any]
    weights: Callable[[ModelConfig], dict[Path, tuple[Slice, ...]]]
    unneeded: Callable[[ModelConfig, str], bool]
    kv_scale: Callable[[str], tuple[int, tuple[int, ...]] | None]
    partition: Mapping[str, P]
    split_fields: tuple[str, ...]
    contracted_axes: Mapping[str, int]
    packable: Callable[[ModelConfig, np.dtype], bool]
    pack: Callable[[ModelConfig, Params], None]


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        module=llama.Llama,
        weights=llama.hf_weights,
        unneeded=llama.unneeded,
        kv_scale=llama.kv_scale,
        partition=llama.PARTITION,
        split_fields=llama.SPLIT_FIELDS,
        contracted_axes=llama.CONTRACTED_AXES,
        packable=llama.packable,
        pack=llama.pack,
    ),
}


def lookup(name: str) -> Architecture:
    """The entry of an architecture; an unknown name is a ValueError that lists the known ones."""
    check_architecture(name)
    return ARCHITECTURES[name]
