"""Reads descriptions of devices under configs/targets/, without needing the devices. Standard library only.

NAME.txtpb is XLA's GpuTargetConfigProto in text form; NAME.json beside it holds what a roofline needs in addition:

    {"dense_tflops": {"bfloat16": 989.5, ...}, "source": "where the figures are from"}

The target `cpu` is this machine and has no file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import types
from collections.abc import Mapping
from typing import Any

TARGET_DIRECTORY = pathlib.Path(__file__).resolve().parents[1] / "configs" / "targets"
"""Directory of the shipped targets: inside the package, in a checkout by way of a symbolic link."""

LOCAL = "cpu"
"""Name of the target that is this machine's CPU."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Describes a device to compile for.

    name: as on the command line. platform: what `jax.Device.platform` says: "gpu" or "cpu". device_kind: the device's
    own name. text: XLA's description, empty for the CPU. device_memory_bytes: of one device. memory_bandwidth: bytes/s;
    peak_flops: operations/s (an FMA counts as two) of dense matrix products by dtype; sm_count, shared_memory_per_block
    (bytes, with opt-in), l2_cache_bytes, clock_ghz: zero or empty where not known, as for the CPU.
    compute_capability: such as "9.0a". source: where peak_flops are from.
    """

    name: str
    platform: str
    device_kind: str
    text: str
    device_memory_bytes: int
    memory_bandwidth: float = 0.0
    peak_flops: Mapping[str, float] = dataclasses.field(default_factory=lambda: types.MappingProxyType({}))
    sm_count: int = 0
    shared_memory_per_block: int = 0
    l2_cache_bytes: int = 0
    clock_ghz: float = 0.0
    compute_capability: str = ""
    source: str = ""

    @property
    def is_local(self) -> bool:
        """Tells whether programs are compiled for this machine's CPU."""
        return self.platform == "cpu"


def known_targets() -> list[str]:
    """Returns the names that `load_target` knows without a path."""
    return [LOCAL] + sorted(path.stem for path in TARGET_DIRECTORY.glob("*.txtpb"))


def load_target(name: str) -> Target:
    """Loads the target of that name (see `known_targets`), or the one that the .txtpb file at that path describes.

    Raises ValueError when there is none, or when a file lacks a field.
    """
    if name == LOCAL:
        return Target(LOCAL, "cpu", "cpu", "", available_memory())
    path = TARGET_DIRECTORY / f"{name}.txtpb"
    if not path.is_file():
        path = pathlib.Path(name)
        if path.suffix != ".txtpb" or not path.is_file():
            raise ValueError(
                f"target {name!r} is unknown; known are {', '.join(known_targets())}, or the path of a .txtpb file"
            )
    text = path.read_text(encoding="utf-8")
    device = _message(text, path)
    sidecar = path.with_suffix(".json")
    try:
        rates = json.loads(sidecar.read_text(encoding="utf-8"))
        peak_flops = {dtype: float(rate) * 1e12 for dtype, rate in rates["dense_tflops"].items()}
        source = str(rates["source"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"target {name!r} needs {sidecar} with dense_tflops (a number for each dtype) and source: {error!r}"
        ) from error
    try:
        info = device["gpu_device_info"]
        capability = info["cuda_compute_capability"]
        accelerated = capability.get("feature_extension") == "ACCELERATED_FEATURES"
        return Target(
            name=path.stem,
            platform="gpu",
            device_kind=device["device_description_str"],
            text=text,
            device_memory_bytes=info["device_memory_size"],
            memory_bandwidth=float(info["memory_bandwidth"]),
            peak_flops=types.MappingProxyType(peak_flops),
            sm_count=info["core_count"],
            shared_memory_per_block=info["shared_memory_per_block_optin"],
            l2_cache_bytes=info["l2_cache_size"],
            clock_ghz=info["clock_rate_ghz"],
            compute_capability=f"{capability['major']}.{capability.get('minor', 0)}{'a' if accelerated else ''}",
            source=source,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"target file {path} has no field {error}; compare it with those of {TARGET_DIRECTORY}"
        ) from error


def available_memory() -> int:
    """Returns the bytes of this machine's memory that are available now."""
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


_TOKEN = re.compile(r'\s+|#[^\n]*|(?P<token>"(?:[^"\\]|\\.)*"|[{}:]|[^\s{}:#"]+)')


def _message(text: str, path: pathlib.Path) -> dict[str, Any]:
    """Parses a protocol buffer message in text form into nested dicts; the last value of a repeated field wins."""
    tokens = [match["token"] for match in _TOKEN.finditer(text) if match["token"]]
    place = 0

    def fields() -> dict[str, Any]:
        nonlocal place
        found: dict[str, Any] = {}
        while place < len(tokens) and tokens[place] != "}":
            name, place = tokens[place], place + 1
            if place < len(tokens) and tokens[place] == ":":
                place += 1
            if place >= len(tokens):
                raise ValueError(f"target file {path} ends after {name!r}")
            value, place = tokens[place], place + 1
            found[name] = fields() if value == "{" else _scalar(value)
            place += value == "{"
        return found

    message = fields()
    if place != len(tokens):
        raise ValueError(f"target file {path} cannot be read: one brace too many, or too few")
    return message


def _scalar(token: str) -> Any:
    if token.startswith('"'):
        return token[1:-1]
    try:
        return int(token)
    except ValueError:
        pass
    try:
        return float(token)
    except ValueError:
        return {"true": True, "false": False}.get(token, token)
