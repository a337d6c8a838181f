"""Checks what a start of the engine checks, without loading weights, compiling the programs or making a pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jaxserve.config.settings import EngineConfig
from jaxserve.models.params import make_mesh
from jaxserve.planning.explanation import Explanation, explain, local_target
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs.aot.bundle import Bundle, bundled_cache
from jaxserve.programs.aot.program_cache import CacheRefusedError, ProgramCache, default_directory
from jaxserve.programs.target_devices import Target
from jaxserve.runner.engine_startup import ready_when_servable


def check_engine(config: EngineConfig) -> Iterator[str]:
    """Yields a line for each thing found to be right.

    Raises:
        ValueError: the start would fail; a CacheRefusedError or an error of a bundle among them.
        OSError: a file cannot be read.
    """
    target = local_target()
    yield f"device: {target.device_kind or target.platform}"
    shapes = resolve_shapes(config, target.platform)
    ready_when_servable(config, target.platform, server=True)
    checkpoint = "random weights" if config.load_format == "dummy" else f"every tensor of {config.model} as it must be"
    yield f"model: {shapes.model.architecture}, {checkpoint}; attention {shapes.attention}"
    bundle = None if config.bundle is None else Bundle.open(config.bundle)
    if bundle is not None:
        config = dataclasses.replace(config, cache=bundled_cache(config.cache, bundle))
    explanation = _planned(config, target)
    plan = explanation.plan
    estimated = "; temporaries estimated" if explanation.estimated else ""
    yield (
        f"memory: {plan.num_pages - 1:,} pages, {explanation.pool_tokens:,} tokens, in {plan.total / 1e9:.2f} of "
        f"{plan.device.total / 1e9:.2f} GB{estimated}"
    )
    if bundle is not None:
        bundle.check(explanation.shapes, make_mesh())
        yield f"bundle: {config.bundle} has the programs of this configuration and device"
    else:
        yield f"compilation cache: {_cache(config)}"


def _planned(config: EngineConfig, target: Target) -> Explanation:
    """Plans the memory with an upper bound of what programs need, and only where that does not fit with what the
    compiler says, which takes longer.
    """
    try:
        return explain(config, target, compiles=False)
    except ValueError:
        return explain(config, target)


def _cache(config: EngineConfig) -> str:
    """Describes the compilation cache. Raises CacheRefusedError where a configured directory is refused."""
    directory = config.compilation_cache_dir
    if directory is None:
        return "none"
    if directory != "auto":
        return str(ProgramCache.open(directory, config.compilation_cache_max_bytes, make_mesh()).directory)
    try:
        cache = ProgramCache.open(default_directory(), config.compilation_cache_max_bytes, make_mesh())
    except CacheRefusedError as error:
        return f"not used, since {error}"
    return str(cache.directory)
