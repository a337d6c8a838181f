"""Loading weights: Hugging Face directories of safetensors, and the same weights saved with orbax.

A Hugging Face directory is read tensor by tensor. Each parameter is put together in one host buffer of the target
dtype, straight from the mapped file, sent to its devices, and the buffer is dropped before the next is made: beside the
parameters themselves, host memory holds one of them at a time.
"""

from __future__ import annotations

import importlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from models import kv_scales
from models.config import ModelConfig
from models.kv_scales import KVScales
from models.params import abstract_params, leaves
from models.registry import lookup
from models.safetensors_file import DTYPES, StoredTensor, read_header
from models.weights import Params, Path, Slice, get, path_text, put

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ORBAX_FOLDER = "orbax"
KV_SCALES_FILE = "kv_scales.json"


READ_BYTES = 16 * 1024 * 1024
"""Read at a time by `read_ahead`."""


def load(directory: str | pathlib.Path, config: ModelConfig, dtype: Any, mesh: Mesh) -> Params:
    """The parameters of a checkpoint directory on the mesh's devices.

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
        files = sorted({tensor.path for tensor in _used_tensors(directory, config).values()})
    block = bytearray(READ_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def load_kv_scales(directory: str | pathlib.Path, config: ModelConfig) -> KVScales | None:
    """The scales of quantised keys and values in a checkpoint directory; None where it has none.

    Arguments are those of `load`. Raises ValueError where they are malformed or incomplete.
    """
    directory = pathlib.Path(directory)
    if (directory / ORBAX_FOLDER).is_dir():
        path = directory / KV_SCALES_FILE
        return kv_scales.read(path, config) if path.is_file() else None
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return kv_scales.from_tensors(config, _stored_tensors(directory), raw.get("quantization_config"))


def save_orbax(
    params: Params, config: ModelConfig, directory: str | pathlib.Path, scales: KVScales | None = None
) -> None:
    """Saves parameters with orbax, and the architecture beside them as `config.json`.

    Args:
        params: as `load` or `params_of` return them.
        config: their architecture.
        directory: made if missing; one that holds a checkpoint already is a ValueError.
        scales: of quantised keys and values, as `load_kv_scales` returns them; saved as `kv_scales.json`.
    """
    directory = pathlib.Path(directory).absolute()
    if (directory / ORBAX_FOLDER).exists() or _has_safetensors(directory):
        raise ValueError(f"checkpoint {directory} holds weights already; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    with _orbax().StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / ORBAX_FOLDER, {path_text(path): leaf for path, leaf in leaves(params)})
    (directory / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n", encoding="utf-8")
    if scales is not None:
        kv_scales.save(scales, directory / KV_SCALES_FILE)


def _orbax() -> Any:
    """orbax, imported late: it takes half a second, which a start from safetensors need not pay."""
    return importlib.import_module("orbax.checkpoint")


def restore_orbax(directory: str | pathlib.Path, config: ModelConfig, dtype: Any, mesh: Mesh) -> Params:
    """The parameters that `save_orbax` saved, restored straight into `dtype` and their places on the mesh.

    Arguments and result are those of `load`. Raises ValueError where nothing is saved there, where it cannot be read,
    and where its parameters are not those of the architecture.
    """
    folder = (pathlib.Path(directory) / ORBAX_FOLDER).absolute()
    if not folder.is_dir():
        raise ValueError(f"checkpoint folder {folder} is missing")
    abstract = abstract_params(config, dtype, mesh)
    flat = {path_text(path): leaf for path, leaf in leaves(abstract)}
    with _orbax().StandardCheckpointer() as checkpointer:
        try:
            saved = checkpointer.metadata(folder).item_metadata
            if saved is None:
                raise ValueError("it is no orbax checkpoint")
            _check_saved(saved.tree, flat)
            restored = checkpointer.restore(folder, flat)
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())  # orbax writes several lines
            raise ValueError(f"checkpoint folder {folder} cannot be read: {reason}") from error
    tree: Params = {}
    for path, _ in leaves(abstract):
        put(tree, path, restored[path_text(path)])
    return tree


def _check_saved(saved: Mapping[str, Any], expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    for name, leaf in expected.items():
        if name not in saved:
            raise ValueError(f"parameter {name} is not in it")
        if tuple(saved[name].shape) != leaf.shape:
            raise ValueError(f"parameter {name} has shape {list(saved[name].shape)}; expected {list(leaf.shape)}")
    if extra := sorted(saved.keys() - expected.keys()):
        raise ValueError(f"it holds {_some(extra)} that the model does not use")


def _holds_orbax(directory: pathlib.Path) -> bool:
    """Whether a checkpoint was saved with orbax. ValueError where there is no directory, or one with both kinds."""
    if not directory.is_dir():
        raise ValueError(f"model is {str(directory)!r}; there is no such directory")
    orbax = (directory / ORBAX_FOLDER).is_dir()
    if orbax and _has_safetensors(directory):
        raise ValueError(f"checkpoint {directory} holds safetensors and {ORBAX_FOLDER}/; only one may stay")
    return orbax


def _has_safetensors(directory: pathlib.Path) -> bool:
    return (directory / SINGLE_FILE).exists() or (directory / INDEX_FILE).exists()


def _load_safetensors(directory: pathlib.Path, config: ModelConfig, dtype: Any, mesh: Mesh) -> Params:
    abstract = abstract_params(config, dtype, mesh)
    used = _used_tensors(directory, config)
    tree: Params = {}
    for path, parts in lookup(config.architecture).weights(config).items():
        put(tree, path, _assemble(get(abstract, path), parts, used))
    return tree


def _used_tensors(directory: pathlib.Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors of a directory that the model uses, by name. ValueError where they are not what it asks for."""
    architecture = lookup(config.architecture)
    stored = _stored_tensors(directory)
    used: dict[str, StoredTensor] = {}
    for path, parts in architecture.weights(config).items():
        for part in parts:
            used[part.tensor] = _check_tensor(directory, stored, path, part)
    unused = sorted(name for name in stored.keys() - used.keys() if not architecture.unneeded(config, name))
    if unused:
        raise ValueError(
            f"checkpoint {directory} holds {_some(unused)} that {config.architecture} does not use as configured"
        )
    return used


def _assemble(leaf: jax.ShapeDtypeStruct, parts: tuple[Slice, ...], stored: Mapping[str, StoredTensor]) -> jax.Array:
    """One parameter on its devices. The host's buffer is gone on return, before the next one is made."""
    buffer = np.empty(leaf.shape, leaf.dtype)
    for part in parts:
        target = buffer[part.index]
        # Converts in small blocks from the mapped file to its place, with no array in between.
        np.copyto(target, stored[part.tensor].view().reshape(target.shape), casting="unsafe")
    # Without the wait, buffers would queue up faster than a device takes them.
    return jax.block_until_ready(jax.device_put(buffer, leaf.sharding))


def _stored_tensors(directory: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a directory by name; like transformers, it prefers the single file to an index."""
    if (directory / SINGLE_FILE).exists():
        return read_header(directory / SINGLE_FILE)
    index = directory / INDEX_FILE
    if not index.exists():
        raise ValueError(f"checkpoint {directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(shard_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint file {index} is invalid: it needs a weight_map of tensor to file") from error
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard:
            raise ValueError(f"checkpoint file {index} is invalid: {shard!r} is no name of a file beside it")
        if not (directory / shard).is_file():
            raise ValueError(f"checkpoint file {directory / shard} is missing; {INDEX_FILE} lists it")
        held = read_header(directory / shard)
        for name in held.keys() & stored.keys():
            raise ValueError(f"checkpoint files {stored[name].path} and {directory / shard} both hold tensor {name}")
        stored |= held
    for name, shard in shard_of.items():
        if name not in stored or stored[name].path.name != shard:
            raise ValueError(f"checkpoint file {directory / shard} has no tensor {name}; {INDEX_FILE} says it does")
    return stored


def _check_tensor(directory: pathlib.Path, stored: Mapping[str, StoredTensor], path: Path, part: Slice) -> StoredTensor:
    if part.tensor not in stored:
        raise ValueError(f"checkpoint {directory} has no tensor {part.tensor}, which {path_text(path)} needs")
    tensor = stored[part.tensor]
    if tensor.shape != part.shape:
        raise ValueError(
            f"checkpoint file {tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}; "
            f"config.json asks for {list(part.shape)}"
        )
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"checkpoint file {tensor.path}: tensor {tensor.name} has dtype {tensor.dtype}; "
            f"supported dtypes are {', '.join(DTYPES)}"
        )
    return tensor


def _some(names: list[str]) -> str:
    """A count and the first names: `2 tensors (a, b)`."""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"
