"""What a device's memory is spent on, and how many pages fit: from the compiler's own figures, not from a guess.

    device memory = what gpu_memory_utilization keeps out of reach
                  + weights + state + temporaries + code + swapped pages + margin + pages + unused

The device runs one program at a time, so temporaries are those of the largest program; code is that of all of them.
The margin stands for what the compiler does not see (library workspaces, fragmentation); a pool of an explicit size
may take of it. Swapped pages are in host memory, which on a CPU is the device's; a GPU's memory holds those that are on
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
from jaxserve.programs.step_programs import ProgramKey, Shapes, abstract_arguments, abstract_masks, abstract_pools
from jaxserve.programs.swap_programs import SWAP_SIZES
from jaxserve.programs.target_devices import available_memory

MARGIN_BYTES = 256 * 1024 * 1024

TRANSIT_BYTES = 512 * 1024 * 1024
"""Pages that are on their way between a GPU and host memory at one time, all layers together, at most."""

# How XLA is told the limit of pinned host memory, what it is without, and what it takes beside swapped pages.
_PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_PINNED_GIB = 64
_PINNED_SPARE_GIB = 8


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device: all of it, and the share that may be used.

    host: it is the host's memory. What is available there differs a little at every start, and swapped pages are in it.
    """

    total: int
    limit: int
    host: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.limit <= self.total:
            raise ValueError(f"memory limit is {self.limit} bytes; it must be from 0 to the device's {self.total}")

    @classmethod
    def share(cls, total: int, utilization: float, *, host: bool = False) -> DeviceMemory:
        """`utilization` (0 to 1, CacheConfig.gpu_memory_utilization) of `total` bytes, rounded down."""
        return cls(total, int(total * utilization), host)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device and what they are spent on.

    weights: as the programs take them. state: slots, hidden buffer, masks and the vector that the host sends.
    page: one page in all layers. num_pages: pages of the pool, the null page included. swapped: pages of swapped
    sequences, as far as they are in the device's memory.
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
        """Bytes that are needed whatever the number of pages."""
        return self.weights + self.state + self.programs.temporaries + self.programs.code + self.swapped

    @property
    def total(self) -> int:
        """Bytes that are needed, without the margin."""
        return self.fixed + self.pages

    @property
    def margin(self) -> int:
        """Bytes of MARGIN_BYTES that are left; negative when even `total` does not fit."""
        return min(MARGIN_BYTES, self.device.limit - self.total)

    @property
    def room(self) -> int:
        """Pages that fit beside everything else and the whole margin."""
        return max(0, (self.device.limit - self.fixed - MARGIN_BYTES) // self.page)

    def parts(self) -> dict[str, int]:
        """The device's memory, part by part; the sum is `device.total`. Raises ValueError as `check` does.

        "swapped pages" are there only where there are any.
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
        """Whether it is within the limit."""
        return self.total <= self.device.limit

    def check(self) -> None:
        """Raises ValueError when it is more than the limit."""
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

    shapes: of the programs; their number of pages is ignored. cache: what is configured. device: its memory.
    """

    shapes: Shapes
    cache: CacheConfig
    mesh: Mesh
    device: DeviceMemory

    def plan(self, num_pages: int, programs: ProgramNeeds) -> MemoryPlan:
        """What a pool of so many pages takes, with programs that need `programs`, whether it fits or not."""
        shapes = dataclasses.replace(self.shapes, num_pages=num_pages)
        params, pools, *state = abstract_arguments(ProgramKey("forward", shapes.buckets.tokens[-1]), shapes, self.mesh)
        page = _bytes_per_device(pools) // num_pages
        swapped = shapes.num_host_pages if self.device.host else pages_in_transit(shapes, page)
        return MemoryPlan(
            device=self.device,
            weights=_bytes_per_device(params),
            state=_bytes_per_device((state, abstract_masks(shapes, self.mesh))),
            programs=programs,
            page=page,
            num_pages=num_pages,
            swapped=page * swapped,
        )

    def roomy(self) -> MemoryPlan | None:
        """The plan where what the programs need hardly matters: all pages that can be in use take at most half of what
        weights and state leave. None where they take more, or the configuration says how many there are.

        It is what `pool` decides if the programs find room in the other half, which the caller must check when they
        are there; no program need be compiled to find out how many pages fit.
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
        if cache.num_pages is not None:
            self._check_addressable(cache.num_pages)
            plan = dataclasses.replace(probe, num_pages=cache.num_pages)
            plan.check()
            return plan
        if cache.kv_cache_memory_bytes is not None:
            room = cache.kv_cache_memory_bytes // probe.page
        else:
            probe = dataclasses.replace(probe, programs=needs())
            room = probe.room
        if room < 2:
            raise ValueError(
                f"page pool has room for {room} pages of {probe.page} bytes; at least 2 are needed, beside weights of "
                f"{probe.weights} bytes, {probe.fixed - probe.weights} for {_beside(probe)} and a margin of "
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
        """Raises ValueError where the host has not enough memory for what is still to be made when weights and programs
        are there: on a CPU state, temporaries and pages (the plan has only an allowance for the programs themselves),
        beside a GPU the swapped pages.
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
        """The most pages, up to num_pages, that the attention implementation can take.

        Raises ValueError where it cannot take even two. Below the first size that it cannot take, it takes all.
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
    """`room` rounded down to five binary digits, at most a sixteenth less.

    What is available on a CPU differs a little at every start. Programs for another number of pages are other programs,
    so without this none would be found in the compilation cache.
    """
    unit = 1 << max(0, room.bit_length() - 5)
    return room // unit * unit


def pages_in_use(shapes: Shapes) -> int:
    """Pages that max_num_seqs sequences of max_model_len hold, and the null page."""
    return shapes.num_slots * shapes.max_pages + 1


def pages_in_transit(shapes: Shapes, page: int) -> int:
    """Pages, of `page` bytes on one device, that may be on their way between a GPU and host memory at one time."""
    return min(shapes.num_host_pages, max(SWAP_SIZES[-1], TRANSIT_BYTES // page))


def claim_memory(cache: CacheConfig) -> None:
    """Lets jax's allocator hand out gpu_memory_utilization of a GPU's memory; by itself it takes three quarters.

    Pinned host memory is limited to 64 GiB by itself; a larger swap_space is let through.

    Has an effect only before the process first asks jax for its devices; later the allocator keeps what it has.
    """
    jax.config.update("jax_pjrt_client_create_options", {"memory_fraction": cache.gpu_memory_utilization})
    if cache.swap_space > _PINNED_GIB - _PINNED_SPARE_GIB:
        os.environ.setdefault(_PINNED_LIMIT, str(math.ceil(cache.swap_space) + _PINNED_SPARE_GIB))


def local_memory(mesh: Mesh, utilization: float) -> DeviceMemory:
    """The memory of this machine's devices: of a CPU a share of what is available now, of a GPU what its allocator has.

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
