"""Loads weights: Hugging Face directories of safetensors, and the same weights saved with orbax.

A Hugging Face directory is read tensor by tensor. Each parameter is put together in one host buffer of the target
dtype, straight from the mapped file, sent to its devices, and the buffer is dropped before the next is made: beside the
parameters themselves, host memory holds one of them at a time.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.parameter import Parameter, Params, Path, Source, get, path_text, put
from jaxserve.models.layers.quantized import Quantized
from jaxserve.models.layers.rope import Rope
from jaxserve.models.loading import kv_scales, quantized_tensors
from jaxserve.models.loading.json_files import read_object
from jaxserve.models.loading.kv_scales import KVScales
from jaxserve.models.loading.mxfp4 import MXFP4Tensor
from jaxserve.models.loading.placing import LoadProgress, filled, filled_quantized
from jaxserve.models.loading.quantized_tensors import QuantizedTensor
from jaxserve.models.loading.safetensors_file import DTYPES, NUMBERS, StoredTensor
from jaxserve.models.loading.stored import (
    HEAD,
    ROTARY_BUFFER,
    Stored,
    has_own_head,
    has_safetensors,
    read_stored,
)
from jaxserve.models.loading.text_part import text_names
from jaxserve.models.params import abstract_params, leaves, make_mesh, parameters
from jaxserve.models.registry import lookup

ORBAX_FOLDER = "orbax"
KV_SCALES_FILE = "kv_scales.json"


Found = StoredTensor | MXFP4Tensor | QuantizedTensor
"""What a parameter is filled from."""

READ_BYTES = 16 * 1024 * 1024
"""Bytes that `read_ahead` reads at a time."""

_log = logging.getLogger(__name__)


def has_weights(directory: str | pathlib.Path) -> bool:
    """Returns whether a directory holds weights of either kind."""
    directory = pathlib.Path(directory)
    return has_safetensors(directory) or (directory / ORBAX_FOLDER).is_dir()


def check(directory: str | pathlib.Path, config: ModelConfig, *, scales: bool = False) -> None:
    """Compares a checkpoint's tensors with the architecture, without reading the weights.

    Args:
        directory: as for `load`.
        config: from `ModelConfig.from_directory`.
        scales: also checks scales of quantized keys and values, which are read.

    Raises:
        ValueError: as `load` and, with `scales`, `load_kv_scales` raise it.
    """
    directory = pathlib.Path(directory)
    if _holds_orbax(directory):
        _check_orbax(directory, config)
    else:
        stored = _stored(directory, config)
        _used_tensors(stored, config)
        for line in _differing_buffers(stored, config):
            _log.warning("%s", line)
    if scales:
        load_kv_scales(directory, config)


def load(directory: str | pathlib.Path, config: ModelConfig, dtype: Any, mesh: Mesh) -> Params:
    """Loads the parameters of a checkpoint directory onto the mesh's devices.

    Args:
        directory: holds `model.safetensors`, or `model.safetensors.index.json` and its shards, or what `save_orbax`
            wrote.
        config: the architecture, from `ModelConfig.from_directory` for either kind.
        dtype: of the parameters; the file's are converted ("float32", "bfloat16" or "float16").
        mesh: with the axis `tensor`.

    Returns:
        The tree of `abstract_params(config, dtype, mesh)`, filled.

    Raises:
        ValueError: of one line, naming the file, the tensor and what was expected and found; also where the checkpoint
            holds a tensor that the model does not use. All of it is checked before the first byte of a weight is read.
    """
    directory = pathlib.Path(directory)
    if _holds_orbax(directory):
        return restore_orbax(directory, config, dtype, mesh)
    return _load_safetensors(directory, config, dtype, mesh)


def read_ahead(directory: str | pathlib.Path, config: ModelConfig) -> None:
    """Reads a checkpoint's files once, so that `load` then finds them in the host's file cache.

    Raises ValueError as `load` does where there is no checkpoint, and where tensors of safetensors files are missing,
    malformed or not the architecture's. What orbax saved is not looked into.
    """
    directory = pathlib.Path(directory)
    if _holds_orbax(directory):
        files = [path for path in (directory / ORBAX_FOLDER).rglob("*") if path.is_file()]
    else:
        used = _used_tensors(_stored(directory, config), config).values()
        files = sorted({part.path for tensor in used for part in tensor.parts})
    block = bytearray(READ_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def load_kv_scales(directory: str | pathlib.Path, config: ModelConfig) -> KVScales | None:
    """Loads the scales of quantized keys and values of a checkpoint directory; None where it has none.

    Arguments are those of `load`. Raises ValueError where the scales are malformed or incomplete.
    """
    directory = pathlib.Path(directory)
    if (directory / ORBAX_FOLDER).is_dir():
        path = directory / KV_SCALES_FILE
        return kv_scales.read(path, config) if path.is_file() else None
    raw = read_object(directory / "config.json")
    return kv_scales.from_tensors(config, _stored(directory, config).tensors, raw.get("quantization_config"))


def save_orbax(
    params: Params, config: ModelConfig, directory: str | pathlib.Path, scales: KVScales | None = None
) -> None:
    """Saves parameters with orbax, and the architecture beside them as `config.json`.

    Args:
        params: as `load` or `params_of` return them.
        config: their architecture.
        directory: made if missing; one that holds a checkpoint already is a ValueError.
        scales: of quantized keys and values, as `load_kv_scales` returns them; saved as `kv_scales.json`.
    """
    directory = pathlib.Path(directory).absolute()
    if any(isinstance(leaf, Quantized) for _, leaf in leaves(params)):
        raise ValueError("quantized weights are not saved with orbax; save the checkpoint's plain weights")
    if (directory / ORBAX_FOLDER).exists() or has_safetensors(directory):
        raise ValueError(f"checkpoint {directory} holds weights already; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    with _orbax().StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / ORBAX_FOLDER, {path_text(path): leaf for path, leaf in leaves(params)})
    (directory / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n", encoding="utf-8")
    if scales is not None:
        kv_scales.save(scales, directory / KV_SCALES_FILE)


def _orbax() -> Any:
    """Imports orbax, late: it takes half a second, which a start from safetensors need not pay."""
    return importlib.import_module("orbax.checkpoint")


def restore_orbax(directory: str | pathlib.Path, config: ModelConfig, dtype: Any, mesh: Mesh) -> Params:
    """Restores the parameters that `save_orbax` saved, directly into `dtype` and the mesh's shardings.

    Arguments and result are those of `load`. Raises ValueError where nothing is saved there, where it cannot be read,
    and where its parameters are not those of the architecture.
    """
    folder = (pathlib.Path(directory) / ORBAX_FOLDER).absolute()
    if not folder.is_dir():
        raise ValueError(f"checkpoint folder {folder} is missing")
    if config.quantization is not None:
        raise ValueError(
            f"checkpoint folder {folder} holds plain weights; quantization while loading reads safetensors only"
        )
    abstract = abstract_params(config, dtype, mesh)
    flat = {path_text(path): leaf for path, leaf in leaves(abstract)}
    with _reading(folder) as checkpointer:
        _check_saved(checkpointer, folder, flat)
        restored = checkpointer.restore(folder, flat)
    tree: Params = {}
    for path, _ in leaves(abstract):
        put(tree, path, restored[path_text(path)])
    return tree


def _check_orbax(directory: pathlib.Path, config: ModelConfig) -> None:
    """Compares the saved parameters with the architecture's; their dtypes may differ."""
    abstract = abstract_params(config, "float32", make_mesh())
    folder = (directory / ORBAX_FOLDER).absolute()
    with _reading(folder) as checkpointer:
        _check_saved(checkpointer, folder, {path_text(path): leaf for path, leaf in leaves(abstract)})


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[Any]:
    """Yields an orbax checkpointer whose errors become a one-line ValueError."""
    with _orbax().StandardCheckpointer() as checkpointer:
        try:
            yield checkpointer
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())  # orbax writes several lines
            raise ValueError(f"checkpoint folder {folder} cannot be read: {reason}") from error


def _check_saved(checkpointer: Any, folder: pathlib.Path, expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    metadata = checkpointer.metadata(folder).item_metadata
    if metadata is None:
        raise ValueError("it is no orbax checkpoint")
    saved = metadata.tree
    for name, leaf in expected.items():
        if name not in saved:
            raise ValueError(f"parameter {name} is not in it")
        if tuple(saved[name].shape) != leaf.shape:
            raise ValueError(f"parameter {name} has shape {list(saved[name].shape)}; expected {list(leaf.shape)}")
    if extra := sorted(saved.keys() - expected.keys()):
        raise ValueError(f"it holds {_some(extra)} that the model does not use")


def _holds_orbax(directory: pathlib.Path) -> bool:
    """Returns whether a checkpoint was saved with orbax.

    Raises ValueError without a directory, or where it has both kinds.
    """
    if not directory.is_dir():
        raise ValueError(f"model is {str(directory)!r}; there is no such directory")
    orbax = (directory / ORBAX_FOLDER).is_dir()
    if orbax and has_safetensors(directory):
        raise ValueError(f"checkpoint {directory} holds safetensors and {ORBAX_FOLDER}/; only one may stay")
    return orbax


def _stored(directory: pathlib.Path, config: ModelConfig) -> Stored:
    return read_stored(directory, text_names(directory, lookup(config.architecture).names))


def _load_safetensors(directory: pathlib.Path, config: ModelConfig, dtype: Any, mesh: Mesh) -> Params:
    abstract = abstract_params(config, dtype, mesh)
    used = _used_tensors(_stored(directory, config), config)
    tree: Params = {}
    progress = LoadProgress(directory, {part for tensor in used.values() for part in tensor.parts})
    for path, parameter in parameters(config).items():
        leaf = get(abstract, path)
        # Each host buffer is freed before the next one is made.
        if isinstance(leaf, Quantized):
            put(tree, path, filled_quantized(leaf, parameter, used))
        else:
            put(tree, path, filled(leaf, parameter.sources, used))
        progress.add(part for source in parameter.sources for part in used[source.tensor].parts)
    progress.finish(tree)
    return tree


def _used_tensors(stored: Stored, config: ModelConfig) -> dict[str, Found]:
    """Returns the stored tensor of each tensor the model needs. Raises ValueError where they do not match."""
    if stored.tensors and stored.num_layers < config.num_hidden_layers:
        raise ValueError(
            f"config.json num_hidden_layers is {config.num_hidden_layers}; checkpoint {stored.directory} has tensors "
            f"of {stored.num_layers} layers"
        )
    used: dict[str, Found] = {}
    for path, parameter in parameters(config).items():
        for source in parameter.sources:
            used[source.tensor] = _check_tensor(stored, path, parameter, source, config)
        _check_orders(parameter, used)
    taken = {part for tensor in used.values() for part in tensor.parts}
    left = (tensor for tensor in stored.tensors.values() if tensor not in taken)
    unused = sorted(tensor.name for tensor in left if not _unneeded(tensor, config))
    if unused:
        more = (
            f"; num_hidden_layers is {config.num_hidden_layers}" if stored.num_layers > config.num_hidden_layers else ""
        )
        if any(".experts." in name for name in unused):
            counts = {layer.mlp.router.num_experts for layer in config.layer_specs if layer.mlp.router}
            more += f"; layers have {max(counts, default=0)} experts"
        raise ValueError(
            f"checkpoint {stored.directory} holds {_some(unused)} that {config.architecture} does not use as "
            f"configured{more}"
        )
    if config.tie_word_embeddings and has_own_head(stored):
        raise ValueError(
            f"checkpoint {stored.directory}: tensor {HEAD} differs from {stored.embedding}; with tie_word_embeddings "
            "it would not be used"
        )
    return used


def _unneeded(tensor: StoredTensor, config: ModelConfig) -> bool:
    """Returns whether a checkpoint may hold this tensor although no parameter uses it."""
    name = tensor.name
    if name == HEAD:
        return config.tie_word_embeddings  # a duplicate of the embedding: they were compared
    if config.quantization is not None and name.endswith(".bias") and tensor.dtype in DTYPES:
        # Tools that quantize give every matrix a bias.
        return config.quantization.target(name.removesuffix(".bias")) is not None and not tensor.view().any()
    # Scales are a setting of quantized pages, not of the model.
    return kv_scales.kv_scale(name) is not None or name.endswith(ROTARY_BUFFER)


def _differing_buffers(stored: Stored, config: ModelConfig) -> list[str]:
    """Returns a line where stored rotary frequencies differ from those computed from config.json.

    Early releases of transformers saved them, before or after scaling, in the dtype of the weights.
    """
    wanted = [config.rotary_frequencies(), config.rotary_frequencies(Rope(config.rope_theta))]
    differing = []
    for name, tensor in stored.tensors.items():
        if not name.endswith(ROTARY_BUFFER) or tensor.dtype not in DTYPES:
            continue
        found = np.asarray(tensor.view(), np.float32)
        near = (np.allclose(found, one, rtol=2**-7, atol=2**-14) for one in wanted if one.shape == found.shape)
        if not any(near):
            differing.append(name)
    if not differing:
        return []
    return [
        f"checkpoint {stored.directory} holds {_some(sorted(differing))} with other rotary frequencies than those that "
        f"config.json asks for (rope_theta {config.rope_theta:g}); those of config.json are used"
    ]


def _check_orders(parameter: Parameter, used: Mapping[str, Found]) -> None:
    """Raises ValueError where matrices that are multiplied as one have different orders of the contracted axis."""
    if parameter.scheme is None or not parameter.scheme.ordered:
        return
    found = [used[source.tensor] for source in parameter.sources]
    orders = [tensor.order() for tensor in found if isinstance(tensor, QuantizedTensor)]
    for tensor, order in zip(found, orders, strict=True):
        if order is None or orders[0] is None or not np.array_equal(order, orders[0]):
            raise ValueError(
                f"checkpoint file {tensor.path}: {tensor.name} and {found[0].name} have different g_idx; matrices of "
                "one input must have the same"
            )


def _quantized(stored: Stored, parameter: Parameter, source: Source, config: ModelConfig) -> QuantizedTensor | None:
    """Returns the quantized tensor of a source; None where it is stored as it is."""
    module = source.tensor.removesuffix(".weight")
    if config.quantization is None or config.quantization.method == "load" or len(source.shape) != 2:
        return None
    target = config.quantization.target(module)
    if target is None or module == source.tensor:
        return None
    # What is no matrix of a layer may be quantized or not, whatever the patterns say.
    names = (f"{module}.{suffix}" for suffix in ("weight", "weight_packed", "qweight"))
    if parameter.scheme is None and not any(
        name in stored.tensors and stored.tensors[name].dtype in NUMBERS for name in names
    ):
        return None
    return quantized_tensors.find(stored.get, source.tensor, source.shape, target)


def _check_tensor(stored: Stored, path: Path, parameter: Parameter, source: Source, config: ModelConfig) -> Found:
    """Returns the tensor of a source. Raises ValueError where it is missing or does not match the source."""
    quantized = _quantized(stored, parameter, source, config)
    if quantized is not None:
        return quantized
    tensor = stored.find(source.tensor)
    if tensor is None and source.tensor == stored.embedding and config.tie_word_embeddings:
        tensor = stored.find(HEAD)  # one array under two names: safetensors keeps the first of them
    if tensor is None:
        told = "config.json does not say tie_word_embeddings, and " if source.tensor == HEAD else ""
        raise ValueError(
            f"{told}checkpoint {stored.directory} has no tensor {source.tensor}, which {path_text(path)} needs"
        )
    if tensor.shape != source.shape:
        raise ValueError(
            f"checkpoint file {tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}; "
            f"config.json asks for {list(source.shape)}"
        )
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"checkpoint file {tensor.path}: tensor {tensor.name} has dtype {tensor.dtype}; "
            f"supported dtypes are {', '.join(DTYPES)}"
        )
    return tensor


def _some(names: list[str]) -> str:
    """Formats a count and the first names: `2 tensors (a, b)`."""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"
