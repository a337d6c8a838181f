"""How many pages fit: from the compiler's own figures, not from a guess.

    device memory x gpu_memory_utilization
      = weights + slots and hidden buffer + largest temporaries of any program + code + margin + pages

The margin stands for what the compiler does not see (library workspaces, fragmentation).
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Collection

import jax
from jax.sharding import Mesh

from jaxserve.config import CacheConfig
from jaxserve.runner.compiler import ProgramMemory, compile_program, program_memory
from jaxserve.runner.programs import ProgramKey, Shapes, abstract_arguments

MARGIN_BYTES = 256 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device: the limit, and what it is spent on. page: bytes of one page in all layers."""

    limit: int
    weights: int
    state: int
    programs: int
    page: int
    num_pages: int

    @property
    def total(self) -> int:
        return self.weights + self.state + self.programs + self.page * self.num_pages

    @property
    def room(self) -> int:
        """Pages that fit beside everything else and the margin."""
        return max(0, (self.limit - self.weights - self.state - self.programs - MARGIN_BYTES) // self.page)

    def check(self) -> None:
        """Raises ValueError when it is more than the limit."""
        if self.total > self.limit:
            raise ValueError(
                f"page pool of {self.num_pages} pages has {self.page * self.num_pages} bytes; with weights of "
                f"{self.weights} and {self.state + self.programs} for steps it exceeds the {self.limit} bytes that "
                "gpu_memory_utilization allows: lower num_pages or kv_cache_memory_bytes"
            )


def size_pool(shapes: Shapes, cache: CacheConfig, mesh: Mesh, limit: int) -> int:
    """Pages of the pool, the null page included; `shapes.num_pages` is ignored.

    Without explicit numbers, the largest programs are compiled once over a pool of two pages to learn what they need,
    and the pool takes the rest of `limit` bytes, but no more than max_num_seqs sequences of max_model_len can use.
    Raises ValueError when fewer than two pages fit, or when an explicit number cannot fit whatever programs need.
    """
    probe = dataclasses.replace(shapes, num_pages=2)
    page = plan_memory(probe, mesh, limit, []).page
    if cache.num_pages is not None:
        num_pages = most = cache.num_pages
    else:
        most = shapes.num_slots * shapes.max_pages + 1
        if cache.kv_cache_memory_bytes is not None:
            num_pages = cache.kv_cache_memory_bytes // page
        else:
            largest = [ProgramKey("forward", shapes.buckets.tokens[-1]), ProgramKey("sample", shapes.buckets.rows[-1])]
            needs = [program_memory(compile_program(key, probe, mesh)) for key in largest]
            num_pages = plan_memory(probe, mesh, limit, needs).room
    if num_pages < 2:
        raise ValueError(
            f"page pool has room for {num_pages} pages of {page} bytes; at least 2 are needed: raise "
            f"kv_cache_memory_bytes or gpu_memory_utilization, or lower max_num_batched_tokens"
        )
    num_pages = min(num_pages, most)
    plan_memory(dataclasses.replace(shapes, num_pages=num_pages), mesh, limit, []).check()
    return num_pages


def plan_memory(shapes: Shapes, mesh: Mesh, limit: int, needs: Collection[ProgramMemory]) -> MemoryPlan:
    """What `shapes` takes of `limit` bytes on each device, with programs that need `needs`."""
    params, pools, *state = abstract_arguments(ProgramKey("forward", shapes.buckets.tokens[-1]), shapes, mesh)
    return MemoryPlan(
        limit=limit,
        weights=_bytes_per_device(params),
        state=_bytes_per_device(state),
        programs=max((need.extra for need in needs), default=0) + sum(need.code for need in needs),
        page=_bytes_per_device(pools) // shapes.num_pages,
        num_pages=shapes.num_pages,
    )


def memory_limit(mesh: Mesh, utilization: float) -> int:
    """Bytes that may be used on each device: a share of its memory; of a CPU's, a share of what is available now."""
    device = mesh.devices.flat[0]
    if device.platform != "cpu":
        return int(device.memory_stats()["bytes_limit"] * utilization)
    return int(_available_memory() * utilization)


def _available_memory() -> int:
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _bytes_per_device(tree: object) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
