"""Plans the use of a device's memory and the number of pages, from the compiler's own figures.

    device memory = what gpu_memory_utilization keeps out of reach
                  + weights + state + temporaries + code + swapped pages + margin + pages + unused

The device runs one program at a time, so temporaries are those of the largest program; code is that of all of them. The
margin stands for what the compiler does not see (library workspaces, fragmentation); a pool of an explicit size may
take of it. Swapped pages are in host memory, which on a CPU is the device's; a GPU's memory holds those that are on
their way. Start-up, `jaxserve.compile` and `jaxserve.explain` make the same plan from the same functions.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import os
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from jaxserve.config.settings import CacheConfig
from jaxserve.pallas_kernels.paged_attention import IMPLEMENTATIONS
from jaxserve.programs.program_needs import ProgramNeeds
from jaxserve.programs.step_programs import (
    ProgramKey,
    Shapes,
    abstract_arguments,
    abstract_masks,
    abstract_penalties,
    abstract_pools,
)
from jaxserve.programs.swap_programs import SWAP_SIZES
from jaxserve.programs.target_devices import available_memory

MARGIN_BYTES = 256 * 1024 * 1024

TRANSIT_BYTES = 512 * 1024 * 1024
"""Maximum bytes of pages in transit between a GPU and host memory at one time, all layers together."""

# Settings of XLA's limit of pinned host memory: its name, its default, and what it takes besides swapped pages.
_PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_PINNED_GIB = 64
_PINNED_SPARE_GIB = 8


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Describes the memory of one device in bytes: the total, and the usable share.

    Attributes:
        host: it is the host's memory. What is available there varies a little between starts, and swapped pages are in
            it.
    """

    total: int
    limit: int
    host: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.limit <= self.total:
            raise ValueError(f"memory limit is {self.limit} bytes; it must be from 0 to the device's {self.total}")

    @classmethod
    def share(cls, total: int, utilization: float, *, host: bool = False) -> DeviceMemory:
        """Takes `utilization` (0 to 1, CacheConfig.gpu_memory_utilization) of `total` bytes, rounded down."""
        return cls(total, int(total * utilization), host)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Divides the bytes of one device among their uses.

    Attributes:
        weights: as the programs take them.
        state: slots, hidden buffer, masks, penalty rows and the vector that the host sends.
        page: one page, in all layers of a group.
        num_pages: pages of the pool, the null page included.
        swapped: pages of swapped sequences, as far as they are in the device's memory.
    """

    device: DeviceMemory
    weights: int
    state: int
    programs: ProgramNeeds
    page: int
    num_pages: int
    swapped: int = 0

    @property
    def pages(self) -> int:
        """Bytes of the page pool."""
        return self.page * self.num_pages

    @property
    def fixed(self) -> int:
        """Bytes needed for any number of pages."""
        return self.weights + self.state + self.programs.temporaries + self.programs.code + self.swapped

    @property
    def total(self) -> int:
        """Bytes needed, without the margin."""
        return self.fixed + self.pages

    @property
    def margin(self) -> int:
        """Remaining bytes of MARGIN_BYTES; negative when even `total` does not fit."""
        return min(MARGIN_BYTES, self.device.limit - self.total)

    @property
    def room(self) -> int:
        """Number of pages that fit besides everything else and the whole margin."""
        return max(0, (self.device.limit - self.fixed - MARGIN_BYTES) // self.page)

    def parts(self) -> dict[str, int]:
        """Returns the device's memory by use; the sum is `device.total`. Raises ValueError as `check` does.

        "swapped pages" is included only where there are any.
        """
        self.check()
        return {
            "beyond gpu_memory_utilization": self.device.total - self.device.limit,
            "weights": self.weights,
            "state": self.state,
            "temporaries": self.programs.temporaries,
            "code": self.programs.code,
            **({"swapped pages": self.swapped} if self.swapped else {}),
            "margin": self.margin,
            "pages": self.pages,
            "unused": self.device.limit - self.total - self.margin,
        }

    @property
    def fits(self) -> bool:
        """Returns whether the plan is within the limit."""
        return self.total <= self.device.limit

    def check(self) -> None:
        """Raises ValueError when the plan exceeds the limit."""
        if not self.fits:
            raise ValueError(
                f"page pool of {self.num_pages} pages has {self.pages} bytes; with weights of {self.weights} and "
                f"{self.fixed - self.weights} for {_beside(self)} it exceeds the {self.device.limit} bytes that "
                f"gpu_memory_utilization allows: lower {'swap_space, ' * bool(self.swapped)}num_pages or "
                "kv_cache_memory_bytes"
            )


@dataclasses.dataclass(frozen=True)
class MemoryPlanner:
    """Plans the memory of one device of a mesh.

    Args:
        shapes: of the programs; their number of pages is ignored.
        cache: as configured.
        device: its memory.
    """

    shapes: Shapes
    cache: CacheConfig
    mesh: Mesh
    device: DeviceMemory

    def plan(self, num_pages: int, programs: ProgramNeeds) -> MemoryPlan:
        """Returns the plan for a pool of `num_pages` pages with programs that need `programs`, whether it fits or
        not.
        """
        shapes = dataclasses.replace(self.shapes, num_pages=num_pages)
        params, pools, *state = abstract_arguments(ProgramKey("forward", shapes.buckets.tokens[-1]), shapes, self.mesh)
        page = _bytes_per_device(pools) // num_pages
        swapped = shapes.num_host_pages if self.device.host else pages_in_transit(shapes, page)
        return MemoryPlan(
            device=self.device,
            weights=_bytes_per_device(params),
            state=_bytes_per_device((state, abstract_masks(shapes, self.mesh), abstract_penalties(shapes, self.mesh))),
            programs=programs,
            page=page,
            num_pages=num_pages,
            swapped=page * swapped,
        )

    def roomy(self) -> MemoryPlan | None:
        """Returns the plan where the programs' needs hardly matter: all pages that can be in use take at most half of
        what weights and state leave. Returns None where they take more, or the configuration sets their number.

        It is what `pool` decides if the programs fit into the other half, which the caller must check when they are
        compiled; no program need be compiled to determine the number of pages.
        """
        if self.cache.num_pages is not None or self.cache.kv_cache_memory_bytes is not None:
            return None
        plan = self.plan(pages_in_use(self.shapes), ProgramNeeds(0, 0))
        if plan.pages > (self.device.limit - plan.fixed - MARGIN_BYTES) // 2:
            return None
        return dataclasses.replace(plan, num_pages=self._most_addressable(plan.num_pages))

    def pool(self, needs: Callable[[], ProgramNeeds]) -> MemoryPlan:
        """Decides the number of pages and what everything else takes.

        Without an explicit number of pages the pool takes what the rest leaves of the limit (or
        kv_cache_memory_bytes), but no more than max_num_seqs sequences of max_model_len can use and the attention
        implementation can address.

        Args:
            needs: called for what programs need, once and only when the number of pages depends on it; else they count
                as nothing, and the plan that is made with the compiled programs must be checked.

        Raises:
            ValueError: fewer than two pages fit, or an explicit number cannot fit whatever programs need, or be
                addressed.
        """
        cache, probe = self.cache, self.plan(2, ProgramNeeds(0, 0))
        least = 1 + self.shapes.num_groups
        if cache.num_pages is not None:
            if cache.num_pages < least:
                raise ValueError(
                    f"num_pages is {cache.num_pages}; layers are of {self.shapes.num_groups} groups, each of which "
                    f"needs a page beside the null page: set it to at least {least}"
                )
            self._check_addressable(cache.num_pages)
            plan = dataclasses.replace(probe, num_pages=cache.num_pages)
            plan.check()
            return plan
        if cache.kv_cache_memory_bytes is not None:
            room = cache.kv_cache_memory_bytes // probe.page
        else:
            probe = dataclasses.replace(probe, programs=needs())
            room = probe.room
        if room < least:
            raise ValueError(
                f"page pool has room for {room} pages of {probe.page} bytes; at least {least} are needed, beside "
                f"weights of {probe.weights} bytes, {probe.fixed - probe.weights} for {_beside(probe)} and a margin of "
                f"{MARGIN_BYTES}, in the {self.device.limit} bytes that gpu_memory_utilization allows: raise it or "
                f"kv_cache_memory_bytes, or lower {'swap_space or ' * bool(probe.swapped)}max_num_batched_tokens"
            )
        if cache.kv_cache_memory_bytes is None and self.device.host:
            room = _steady(room)
        num_pages = self._most_addressable(min(room, pages_in_use(self.shapes)))
        plan = dataclasses.replace(probe, num_pages=num_pages)
        plan.check()
        return plan

    def check_available(self, plan: MemoryPlan) -> None:
        """Raises ValueError where the host has too little memory for what is allocated after weights and programs.

        On a CPU these are state, temporaries and pages (the plan has only an allowance for the programs themselves),
        with a GPU the swapped pages.
        """
        available = available_memory()
        if self.mesh.devices.flat[0].platform != "cpu":
            swapped = self.shapes.num_host_pages * plan.page * self.mesh.size
            if swapped > available:
                raise ValueError(
                    f"swap_space takes {swapped} bytes for {self.shapes.num_host_pages} pages; {available} bytes of "
                    "host memory are available: lower it"
                )
            return
        needed = plan.state + plan.programs.temporaries + plan.swapped + plan.pages
        if needed > available:
            raise ValueError(
                f"page pool of {plan.num_pages} pages has {plan.pages} bytes; with {needed - plan.pages} for "
                f"{_beside(plan)} it exceeds the {available} bytes that are available beside weights and programs: "
                f"lower {'swap_space, ' * bool(plan.swapped)}num_pages, kv_cache_memory_bytes or gpu_memory_utilization"
            )

    def _check_addressable(self, num_pages: int) -> None:
        """Raises ValueError where the attention implementation cannot take a pool of that many pages."""
        shapes = self.shapes
        pool = abstract_pools(dataclasses.replace(shapes, num_pages=num_pages), self.mesh)[0]
        check = IMPLEMENTATIONS[shapes.attention].check
        if check is not None:
            one = jax.ShapeDtypeStruct(pool.sharding.shard_shape(pool.shape), pool.dtype)  # what a device's kernels see
            check(one, shapes.buckets.tokens[-1], shapes.model.group_size)

    def _most_addressable(self, num_pages: int) -> int:
        """Returns the maximum number of pages, up to num_pages, that the attention implementation can address.

        Raises ValueError where it cannot address even two. Below the first size that it cannot address, it can address
        all.
        """

        def fails(number: int) -> bool:
            try:
                self._check_addressable(number)
            except ValueError:
                return True
            return False

        self._check_addressable(2)
        if not fails(num_pages):
            return num_pages
        return 2 + bisect.bisect_left(range(2, num_pages), True, key=fails) - 1


def _steady(room: int) -> int:
    """Rounds `room` down to five binary digits, at most a sixteenth less.

    The memory available on a CPU varies a little between starts. Programs for another number of pages are other
    programs, so without this none would be found in the compilation cache.
    """
    unit = 1 << max(0, room.bit_length() - 5)
    return room // unit * unit


def pages_in_use(shapes: Shapes) -> int:
    """Returns the most pages that max_num_seqs sequences of max_model_len hold, and the null page."""
    step_tokens = shapes.buckets.tokens[-1]
    return shapes.groups.most_pages(shapes.num_slots, shapes.max_model_len, shapes.page_size, step_tokens) + 1


def pages_in_transit(shapes: Shapes, page: int) -> int:
    """Returns the maximum pages, of `page` bytes on one device, in transit between a GPU and host memory at one
    time.
    """
    return min(shapes.num_host_pages, max(SWAP_SIZES[-1], TRANSIT_BYTES // page))


def claim_memory(cache: CacheConfig) -> None:
    """Lets jax's allocator use gpu_memory_utilization of a GPU's memory; its default is three quarters.

    Pinned host memory is limited to 64 GiB by default; the limit is raised for a larger swap_space.

    Has an effect only before the process first asks jax for its devices; later the allocator keeps its limit.
    """
    jax.config.update("jax_pjrt_client_create_options", {"memory_fraction": cache.gpu_memory_utilization})
    if cache.swap_space > _PINNED_GIB - _PINNED_SPARE_GIB:
        os.environ.setdefault(_PINNED_LIMIT, str(math.ceil(cache.swap_space) + _PINNED_SPARE_GIB))


def local_memory(mesh: Mesh, utilization: float) -> DeviceMemory:
    """Returns the memory of this machine's devices: of a CPU a share of what is available now, of a GPU its
    allocator's.

    `claim_memory` has given the GPU's allocator its share, so its whole limit may be used.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return DeviceMemory.share(available_memory(), utilization, host=True)
    limit = device.memory_stats()["bytes_limit"]
    return DeviceMemory(limit, limit)


def _beside(plan: MemoryPlan) -> str:
    return "steps and swapped pages" if plan.swapped else "steps"


def _bytes_per_device(tree: object) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
