"""Tuning configurations of the kernels, and the table that chooses them.

`tuning.json` holds a list of entries:

    {"device": "NVIDIA H200", "kernel": "decode", "dtype": "bfloat16", "pool_dtype": "bfloat16", "head_dim": 128,
     "config": {...}}

`device` is a device kind or its first words ("NVIDIA A100" serves "NVIDIA A100-SXM4-80GB" too, but "NVIDIA L4" not
"NVIDIA L40"), or "interpret" for Pallas' interpret mode. Each of `dtype`, `pool_dtype` and `head_dim` may be left out:
such an entry serves every value. Look-up takes, among the entries of the kernel that fit, one for this device before
one for the device "default", and then one that names `dtype` before one that does not, likewise `pool_dtype`, likewise
`head_dim`. One entry of "default" names none of them, so that there always is an answer; the configurations of
"default" fit into 99 KiB of shared memory a block, the least that a supported device has.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

TABLE = pathlib.Path(__file__).with_name("tuning.json")
DEFAULT_DEVICE = "default"
INTERPRET_DEVICE = "interpret"

_KEYS = ("dtype", "pool_dtype", "head_dim")


def _check_power_of_two(owner: object, name: str, least: int, most: int) -> None:
    value = getattr(owner, name)
    if not isinstance(value, int) or not least <= value <= most or value & (value - 1):
        raise ValueError(f"{name} is {value}; it must be a power of two from {least} to {most}")


def _check_range(owner: object, name: str, least: int, most: int) -> None:
    value = getattr(owner, name)
    if not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {value}; it must be an integer from {least} to {most}")


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel cuts its work. The bits of a result depend on `block`, `chunk` and `splits`.

    Attributes:
        block: positions that a step of the inner loop takes.
        chunk: positions of a work item; it is doubled for a row that would need more than `splits` items.
        splits: the most work items of a row.
        programs: programs of the persistent grid; each works off every programs-th item of a head.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline that loads keys and values.
        together: rows that a work item takes where they read the same pages; 1 for none. A tile has 16 rows at least,
            so those of up to 16 queries cost nothing more.

    Raises:
        ValueError: a field is out of range.
    """

    block: int
    chunk: int
    splits: int
    programs: int
    num_warps: int
    num_stages: int
    together: int = 1

    def __post_init__(self) -> None:
        _check_range(self, "together", 1, 64)
        _check_power_of_two(self, "block", 16, 256)
        _check_power_of_two(self, "chunk", self.block, 65536)
        _check_power_of_two(self, "splits", 1, 128)
        _check_range(self, "programs", 1, 65535)
        _check_power_of_two(self, "num_warps", 1, 16)
        _check_range(self, "num_stages", 1, 8)


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """How the prefill kernel cuts its work. The bits of a result depend on `block` alone.

    Attributes:
        tile: rows of a query tile: tokens times query heads of a group.
        block: positions that a step of the inner loop takes.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline that loads keys and values.

    Raises:
        ValueError: a field is out of range.
    """

    tile: int
    block: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        _check_power_of_two(self, "tile", 16, 256)
        _check_power_of_two(self, "block", 16, 256)
        _check_power_of_two(self, "num_warps", 1, 16)
        _check_range(self, "num_stages", 1, 8)


@dataclasses.dataclass(frozen=True)
class WriteConfig:
    """How the KV write cuts its work. No bit depends on it.

    Attributes:
        tokens: tokens of a program.
        num_warps: warps of a program.

    Raises:
        ValueError: a field is out of range.
    """

    tokens: int
    num_warps: int

    def __post_init__(self) -> None:
        _check_power_of_two(self, "tokens", 1, 256)
        _check_power_of_two(self, "num_warps", 1, 16)


Config = DecodeConfig | PrefillConfig | WriteConfig
KERNELS: dict[str, type[Config]] = {"decode": DecodeConfig, "prefill": PrefillConfig, "kv_write": WriteConfig}


def device_kind() -> str:
    """The kind of device that is traced for: of the mesh in context, else of JAX's default GPU, else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.device_kind:
        return device.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else DEFAULT_DEVICE


def lookup(
    device: str,
    kernel: str,
    dtype: jax.typing.DTypeLike,
    pool_dtype: jax.typing.DTypeLike,
    head_dim: int,
    path: pathlib.Path = TABLE,
) -> Any:
    """Chooses a configuration as the head of this file says.

    Args:
        device: device kind.
        kernel: "decode", "prefill" or "kv_write".
        dtype: of the queries.
        pool_dtype: of the pool.
        head_dim: D.
        path: the table.

    Returns:
        A DecodeConfig, a PrefillConfig or a WriteConfig.

    Raises:
        ValueError: the table is malformed or has no entry that fits.
    """
    wanted: dict[str, Any] = {
        "dtype": jnp.dtype(dtype).name,
        "pool_dtype": jnp.dtype(pool_dtype).name,
        "head_dim": head_dim,
    }
    best: tuple[tuple[bool, ...], Config] | None = None
    for entry, config in load(path):
        named = tuple(key in entry for key in _KEYS)
        own = serves(entry["device"], device)
        fits = (own or entry["device"] == DEFAULT_DEVICE) and all(
            entry.get(key, wanted[key]) == wanted[key] for key in _KEYS
        )
        rank = (own, *named)
        if entry["kernel"] == kernel and fits and (best is None or rank > best[0]):
            best = rank, config
    if best is None:
        raise ValueError(f"{path.name} has no {kernel} entry for {device} or {DEFAULT_DEVICE} with {wanted}")
    return best[1]


def serves(name: str, device: str) -> bool:
    """Whether `name` is the device kind `device` or its first words."""
    return device.startswith(name) and not device[len(name) : len(name) + 1].isalnum()


@functools.cache
def load(path: pathlib.Path = TABLE) -> tuple[tuple[dict[str, Any], Config], ...]:
    """Reads and checks a table: each entry with its configuration.

    Raises:
        ValueError: an entry is malformed; the message names it.
    """
    entries = json.loads(path.read_text(encoding="utf-8"))
    loaded = []
    for number, entry in enumerate(entries):
        unknown = set(entry) - {"device", "kernel", "config", *_KEYS}
        if unknown or not {"device", "kernel", "config"} <= set(entry) or entry["kernel"] not in KERNELS:
            raise ValueError(f"entry {number} of {path.name} is malformed: {entry}")
        try:
            loaded.append((entry, KERNELS[entry["kernel"]](**entry["config"])))
        except (TypeError, ValueError) as error:
            raise ValueError(f"entry {number} of {path.name}: {error}") from error
    return tuple(loaded)
