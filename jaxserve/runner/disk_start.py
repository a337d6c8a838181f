"""Opens the directory in which pages of the KV cache outlast a process."""

from __future__ import annotations

import logging
import pathlib

import jax
import numpy as np

from jaxserve.config.settings import EngineConfig
from jaxserve.kv_cache.content_keys import cache_secret
from jaxserve.kv_cache.page_files import PageFiles, fingerprint
from jaxserve.runner.disk_pages import DiskPages
from jaxserve.runner.engine_startup import Started

_log = logging.getLogger(__name__)


def open_disk(config: EngineConfig, started: Started) -> DiskPages | None:
    """Opens the directory of a configuration; returns None where there is none.

    Raises:
        ValueError: it cannot be used, or another process uses it.
    """
    cache = config.cache
    if cache.disk_cache_dir is None:
        return None
    pages, shapes = started.host_pages, started.shapes
    page_bytes = started.plan.page * started.mesh.size
    secret = cache_secret(cache)
    assert secret is not None
    files = PageFiles(
        cache.disk_cache_dir,
        fingerprint(
            jax.__version__,
            started.mesh.devices.flat[0].platform,
            started.mesh.devices.flat[0].device_kind,
            started.mesh.size,
            shapes.model,
            shapes.dtype,
            shapes.pool_dtype,
            shapes.attention,
            shapes.packed,
            shapes.quantized,
            shapes.page_size,
            shapes.groups,
            pages.shape,
            _scales(started),
            _weights(config),
            secret.hex(),
        ),
        secret,
        page_bytes,
        cache.disk_cache_max_bytes,
    )
    if len(files):
        _log.info("disk cache: %d pages in %s, %.1f MB", len(files), cache.disk_cache_dir, files.num_bytes / 1e6)
    return DiskPages(files, pages.make, pages.put)


def _scales(started: Started) -> tuple[bytes, ...]:
    """Returns what decides the numbers of quantized pages: scales may be measured anew at every start."""
    return tuple(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(started.weights.kv_scales))


def _weights(config: EngineConfig) -> object:
    """Returns what tells one set of weights from another: names, sizes and times of the checkpoint's files, or how
    random ones were drawn."""
    if config.load_format == "dummy" or config.model is None:
        return config.load_format, config.seed
    files = sorted(path for path in pathlib.Path(config.model).rglob("*") if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
