"""Sets up a simulation from a configuration: the model's shape, the device's pages, the costs of its steps."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxserve.config.checks import did_you_mean
from jaxserve.config.settings import EngineConfig
from jaxserve.config.targets import LOCAL, Target, known_targets, load_target
from jaxserve.models.config import ModelConfig
from jaxserve.models.layer_groups import layer_groups
from jaxserve.planning.model_cost import ModelCost
from jaxserve.planning.roofline import Efficiency, RooflineCosts, pool_pages
from jaxserve.planning.step_cost_models import CostModel, HostCosts, read_costs
from jaxserve.simulator.simulated_engine import SimulatedDevice

GIB = 2**30
_POOL_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Holds the inputs of `simulate`: a configuration on a device."""

    config: EngineConfig
    device: SimulatedDevice
    costs: CostModel


def find_target(name: str) -> Target:
    """Finds a target by its name (h200) or the path of either of its files (configs/targets/h200.json)."""
    path = pathlib.Path(name)
    if name not in known_targets() and not path.suffix:
        raise ValueError(
            f"target {name!r} is unknown; known are {', '.join(rated_targets())}, the path of a file like theirs, and "
            f"{LOCAL} with measured costs"
        )
    return load_target(str(path.with_suffix(".txtpb")) if path.suffix == ".json" else name)


def rated_targets() -> list[str]:
    """Returns the targets whose rates are known, so that they have a roofline."""
    return [name for name in known_targets() if name != LOCAL]


def set_up(
    config: EngineConfig,
    *,
    target: Target | None = None,
    model_cost: pathlib.Path | None = None,
    report: pathlib.Path | None = None,
    efficiency: Efficiency = Efficiency(),
    host: HostCosts = HostCosts(),
) -> Setup:
    """Builds a setup: costs measured in the file `model_cost`, or else those of the target's roofline.

    Pages are as configured, or else as many as fit the target besides the weights. A report of `jaxserve.compile`
    refines the roofline.

    Raises ValueError where the model, its costs or its pages cannot be determined.
    """
    model = model_of(config)
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    pool_dtype = config.cache.kv_cache_dtype
    pool_dtype = dtype if pool_dtype == "auto" else _POOL_DTYPES.get(pool_dtype, pool_dtype)
    max_model_len = config.max_model_len or model.context_length
    page_size = config.cache.page_size
    if model_cost is not None:
        costs: CostModel = read_costs(model_cost)
    elif target is None:
        raise ValueError("no target and no measured costs are given; a simulation needs either")
    elif target.is_local:
        raise ValueError(
            f"target {target.name} is this machine, whose rates are not known; measure its steps with python -m "
            f"benchmarks.step_costs and give --model-cost, or choose {', '.join(rated_targets())}"
        )
    else:
        costs = RooflineCosts(
            model,
            target,
            dtype=dtype,
            pool_dtype=pool_dtype,
            page_size=page_size,
            max_model_len=max_model_len,
            efficiency=efficiency,
            host=host,
            report=report,
        )
    groups = layer_groups(model.layer_kinds, page_size, max_model_len)
    token_bytes = ModelCost.of(model, dtype, pool_dtype).token_bytes
    page_bytes = page_size * groups.size * token_bytes // model.num_hidden_layers
    pages = config.cache.num_pages
    if pages is None and config.cache.kv_cache_memory_bytes is not None:
        pages = config.cache.kv_cache_memory_bytes // page_bytes
    if pages is None:
        if target is None:
            raise ValueError("num_pages is not set; without a target nothing tells how many pages there are: set it")
        pages = pool_pages(
            model,
            target,
            dtype=dtype,
            pool_dtype=pool_dtype,
            page_size=page_size,
            gpu_memory_utilization=config.cache.gpu_memory_utilization,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_model_len=max_model_len,
        )
    device = SimulatedDevice(
        num_pages=pages,
        max_model_len=max_model_len,
        platform="gpu" if target is not None and target.platform == "gpu" else "cpu",
        num_host_pages=int(config.cache.swap_space * GIB) // page_bytes,
        group_windows=groups.windows,
    )
    return Setup(config, device, costs)


def model_of(config: EngineConfig) -> ModelConfig:
    """Returns the configured architecture, or the checkpoint's."""
    if config.architecture is not None:
        return config.architecture
    if config.model is None:
        raise ValueError("model is not set; a simulation needs an architecture, or a checkpoint's config.json")
    return ModelConfig.from_directory(config.model)


def with_options(config: EngineConfig, options: Mapping[str, Any]) -> EngineConfig:
    """Returns the configuration with some of its fields, or of its sections' fields, set by their flat names.

    Raises ValueError for an unknown name, or a value that its field refuses.
    """
    changed, used = _replaced(config, options)
    for name in options:
        if name not in used:
            hint = did_you_mean(name, option_names(config))
            raise ValueError(f"option {name!r} is unknown in EngineConfig and its sections; {hint}")
    return changed


def option_names(config: Any) -> set[str]:
    """Returns the flat names of the fields of a configuration and of its sections."""
    names: set[str] = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        names |= option_names(value) if dataclasses.is_dataclass(value) else {field.name}
    return names


def _replaced(config: Any, options: Mapping[str, Any]) -> tuple[Any, set[str]]:
    used: set[str] = set()
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner, names = _replaced(value, options)
            if names:
                values[field.name] = inner
                used |= names
        elif field.name in options:
            _check_kind(field.name, options[field.name], value)
            values[field.name] = options[field.name]
            used.add(field.name)
    return (dataclasses.replace(config, **values) if values else config), used


def _check_kind(name: str, given: Any, current: Any) -> None:
    """Rejects text for a boolean field, because any text would be true."""
    for kind, wanted in ((bool, "True or False"), (Mapping, "a mapping such as {'a': 2}")):
        if isinstance(current, kind) and not isinstance(given, kind):
            raise ValueError(f"{name} is {given!r}; it must be {wanted}")
