"""Configures how embeddings are made where a request does not say, as a frozen dataclass that validates itself.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

from jaxserve.config.checks import one_of

POOLING_TYPES = ("LAST", "MEAN", "CLS")

_MODULES = "modules.json"
"""File of a checkpoint of sentence-transformers that lists what is done with hidden states."""

_MODES = {
    "pooling_mode_lasttoken": "LAST",
    "pooling_mode_mean_tokens": "MEAN",
    "pooling_mode_cls_token": "CLS",
    "lasttoken": "LAST",
    "mean": "MEAN",
    "cls": "CLS",
}
"""Kinds of pooling by the names of sentence-transformers: of flags, and since version 5.3 of `pooling_mode`."""


@dataclasses.dataclass(frozen=True)
class PoolerConfig:
    """Configures embeddings. Names are those of vLLM's PoolerConfig.

    pooling_type: LAST, MEAN or CLS. normalize: embeddings have length 1. None takes what the checkpoint's modules.json
    says (as sentence-transformers write it), else LAST, normalized.
    """

    pooling_type: str | None = None
    normalize: bool | None = None

    def __post_init__(self) -> None:
        if self.pooling_type is not None:
            one_of("pooling_type", self.pooling_type, POOLING_TYPES)
        if self.normalize is not None and not isinstance(self.normalize, bool):
            raise ValueError(f"normalize is {self.normalize!r}; it must be True, False or None")

    def resolved(self, model: str | None) -> tuple[str, bool]:
        """Returns the pooling type and whether embeddings are normalized, for a checkpoint directory or None.

        Raises ValueError for a file of the checkpoint that cannot be read, or asks for another kind of pooling.
        """
        pooling_type, normalize = self.pooling_type, self.normalize
        if model is not None and None in (pooling_type, normalize) and os.path.exists(os.path.join(model, _MODULES)):
            found = _of_modules(pathlib.Path(model))
            pooling_type = found[0] if pooling_type is None else pooling_type
            normalize = found[1] if normalize is None else normalize
        return pooling_type or "LAST", True if normalize is None else normalize


def _of_modules(directory: pathlib.Path) -> tuple[str | None, bool]:
    """Returns the pooling type that a checkpoint's modules ask for, None where none does, and whether they
    normalize.
    """
    modules = _read(directory / _MODULES)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ValueError(f"{directory / _MODULES} is no list of modules; set PoolerConfig.pooling_type and normalize")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    pooling_type = None
    for module, kind in zip(modules, kinds, strict=True):
        if kind == "Pooling":
            file = directory / str(module.get("path", "")) / "config.json"
            content = _read(file)
            modes = [name for name in _MODES if isinstance(content, dict) and content.get(name) is True]
            if isinstance(content, dict) and isinstance(content.get("pooling_mode"), str):
                modes = [content["pooling_mode"]]
            if len(modes) != 1 or modes[0] not in _MODES:
                raise ValueError(
                    f"{file} asks for another pooling than {', '.join(POOLING_TYPES)}; set PoolerConfig.pooling_type"
                )
            pooling_type = _MODES[modes[0]]
    return pooling_type, "Normalize" in kinds


def _read(file: pathlib.Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}; set PoolerConfig.pooling_type and normalize") from error
