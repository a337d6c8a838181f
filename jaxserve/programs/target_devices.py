"""Provides devices to compile for, which need not be present; `jaxserve/config/targets.py` describes them."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxserve.config.targets import LOCAL, TARGET_DIRECTORY, Target, available_memory, known_targets, load_target
from jaxserve.models.params import make_mesh
from jaxserve.programs.aot.plugin import find_plugin, plugin_module, quiet_loading, start_plugin, use_cpu_only


def target_mesh(target: Target, devices: int = 1) -> Mesh:
    """Returns a mesh of that many devices of the target, on the axis `tensor`.

    For the CPU they are this machine's, else devices that can only be compiled for.

    Raises:
        PluginMissingError: compiling for the target needs a plugin that is not installed.
        ValueError: this machine has fewer devices.
    """
    if target.is_local:
        local = jax.devices("cpu")
        if len(local) < devices:
            raise ValueError(f"devices is {devices}; this machine has {len(local)}")
        return make_mesh(local[:devices])
    return make_mesh(_topology(target.text, devices).devices[:devices])


def _topology(text: str, devices: int) -> topologies.TopologyDescription:
    """Returns devices of the text's kind, all in one host."""
    name, _ = find_plugin()
    arguments: dict[str, Any] = {"topology": f"1x1x{devices}", "target_config": text}
    with quiet_loading():
        try:
            return topologies.get_topology_desc("", "cuda", **arguments)
        except NotImplementedError:  # jax looked for plugins before this one could be found
            pass
    start_plugin(plugin_module(name))
    with quiet_loading():
        return topologies.get_topology_desc("", "cuda", **arguments)


__all__ = [
    "LOCAL",
    "TARGET_DIRECTORY",
    "Target",
    "available_memory",
    "known_targets",
    "load_target",
    "target_mesh",
    "use_cpu_only",
]
