"""How many pages fit: from the compiler's own figures, not from a guess.

    device memory x gpu_memory_utilization
      = weights + slots and hidden buffer + largest temporaries of any program + code + margin + pages

The margin stands for what the compiler does not see (library workspaces, fragmentation).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxserve.config import CacheConfig
from jaxserve.runner.compiler import ProgramMemory, program_memory
from jaxserve.runner.programs import ProgramKey, Shapes, abstract_arguments, abstract_pools, lower

MARGIN_BYTES = 256 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device: limit, and what it is spent on."""

    limit: int
    weights: int
    state: int
    programs: int
    margin: int
    page: int
    num_pages: int

    @property
    def pool(self) -> int:
        return self.page * self.num_pages

    @property
    def total(self) -> int:
        return self.weights + self.state + self.programs + self.margin + self.pool


def size_pool(shapes: Shapes, cache: CacheConfig, mesh: Mesh) -> int:
    """Pages of the pool, the null page included; `shapes.num_pages` is ignored.

    Without explicit numbers, the largest programs are compiled once over a pool of two pages to learn what they need,
    and the pool takes the rest, but no more than max_num_seqs sequences of max_model_len can use.
    Raises ValueError when fewer than two pages fit.
    """
    if cache.num_pages is not None:
        return cache.num_pages
    most = shapes.num_slots * shapes.max_pages + 1
    probe = dataclasses.replace(shapes, num_pages=2)
    page = _bytes_per_device(abstract_pools(probe, mesh)) // 2
    if cache.kv_cache_memory_bytes is not None:
        num_pages = cache.kv_cache_memory_bytes // page
    else:
        largest = [ProgramKey("forward", shapes.buckets.tokens[-1]), ProgramKey("sample", shapes.buckets.rows[-1])]
        needs = [program_memory(lower(key, probe, mesh).compile()) for key in largest]
        num_pages = plan_memory(probe, cache, mesh, needs).num_pages
    if num_pages < 2:
        raise ValueError(
            f"page pool has room for {num_pages} pages of {page} bytes; at least 2 are needed: raise "
            f"kv_cache_memory_bytes or gpu_memory_utilization, or lower max_num_batched_tokens"
        )
    return min(num_pages, most)


def plan_memory(shapes: Shapes, cache: CacheConfig, mesh: Mesh, needs: Iterable[ProgramMemory]) -> MemoryPlan:
    """The plan that gives all that `needs` leave to pages."""
    needs = list(needs)
    params, _, *state = abstract_arguments(ProgramKey("forward", shapes.buckets.tokens[-1]), shapes, mesh)
    limit = int(device_memory(mesh.devices.flat[0]) * cache.gpu_memory_utilization)
    weights, held = _bytes_per_device(params), _bytes_per_device(state)
    programs = max(need.extra for need in needs) + sum(need.code for need in needs)
    page = _bytes_per_device(abstract_pools(dataclasses.replace(shapes, num_pages=2), mesh)) // 2
    left = limit - weights - held - programs - MARGIN_BYTES
    return MemoryPlan(limit, weights, held, programs, MARGIN_BYTES, page, max(0, left // page))


def device_memory(device: Any) -> int:
    """Bytes of memory of a device; of a CPU, what the machine has free for use now."""
    if device.platform != "cpu":
        return device.memory_stats()["bytes_limit"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _bytes_per_device(tree: object) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
