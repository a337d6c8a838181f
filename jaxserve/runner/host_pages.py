"""Stores pages of swapped sequences, and cached pages, in host memory."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.planning.memory_plan import pages_in_transit
from jaxserve.programs.step_programs import Shapes, abstract_pages


class HostPages:
    """Holds host pages by number, each an array [m, 2, K, page_size, D] that `swap_out` made.

    On a CPU that array is the host page. Beside other devices it is copied to pinned host memory and back, on the
    device's copy streams: only the program that reads a copy waits for it. Pages in transit take memory of the device,
    so the host waits for the oldest copy when `pages_in_transit` would be exceeded.
    """

    def __init__(self, shapes: Shapes, mesh: Mesh, page_bytes: int, *, pinned: bool | None = None):
        """page_bytes: of a page on one device. pinned: None for what the devices of `mesh` call for."""
        self._pages: dict[int, jax.Array] = {}
        self._num_pages = shapes.num_host_pages
        self._pinned = mesh.devices.flat[0].platform != "cpu" if pinned is None else pinned
        (page,) = abstract_pages(1, shapes, mesh)
        assert page.sharding is not None
        self._on_device, self._on_host = page.sharding, page.sharding.with_memory_kind("pinned_host")
        self._shape, self._dtype = page.shape, page.dtype
        self._room = pages_in_transit(shapes, page_bytes)
        self._transit: collections.deque[tuple[int, jax.Array]] = collections.deque()

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of a page's array."""
        return self._shape

    def __len__(self) -> int:
        return len(self._pages)

    def wait_for_room(self, count: int) -> None:
        """Waits until `count` more pages may be in transit."""
        while self._transit and sum(pages for pages, _ in self._transit) + count > self._room:
            self._transit.popleft()[1].block_until_ready()

    def wait(self) -> None:
        """Waits until no page is in transit."""
        while self._transit:
            self._transit.popleft()[1].block_until_ready()
        jax.block_until_ready(list(self._pages.values()))

    def forget_transit(self) -> None:
        """Drops the pages in transit without waiting: the device has lost them, or need not report their arrival."""
        self._transit.clear()

    def store(self, numbers: Sequence[int], pages: Sequence[jax.Array]) -> jax.Array:
        """Stores device pages as host pages `numbers`, replacing their content; does not wait. Returns the last one,
        which is ready when all of them are there.

        Raises ValueError where a number is not that of a host page.
        """
        for number in numbers:
            if not 0 <= number < self._num_pages:
                raise ValueError(f"host page {number} does not exist; there are {self._num_pages}")
        if self._pinned:
            pages = jax.device_put(list(pages), self._on_host)
            self._transit.append((len(pages), pages[-1]))
        self._pages.update(zip(numbers, pages, strict=True))
        return pages[-1]

    def page(self, number: int) -> jax.Array:
        """Returns a host page, which stays what it is. Raises KeyError where it was not stored."""
        return self._pages[number]

    def put(self, number: int, page: jax.Array) -> None:
        """Makes an array, as `make` returns it, a host page."""
        self._pages[number] = page

    def make(self, data: np.ndarray) -> jax.Array:
        """Makes what can be a host page of a page's bytes, uint8 [page bytes]; may be called from any thread."""
        array = data.view(self._dtype).reshape(self._shape)
        return jax.device_put(array, self._on_host if self._pinned else self._on_device)

    def take(self, numbers: Sequence[int]) -> tuple[jax.Array, ...]:
        """Returns host pages `numbers` as device arrays for one `swap_in`; their memory is free when that has run.

        Raises KeyError where a page was not stored.
        """
        pages = tuple(self._pages.pop(number) for number in numbers)
        return tuple(jax.device_put(list(pages), self._on_device)) if self._pinned else pages

    def taken(self, count: int, placed: jax.Array) -> None:
        """Records that the program which reads the `count` pages taken last was started; `placed` is ready after it."""
        if self._pinned:
            self._transit.append((count, placed))
