"""Measures how long copies of pages to and from host memory take, without the engine's loop waiting for them."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any, NamedTuple

import jax

from jaxserve.runner.protocol import PageCopies

MOST_WATCHED = 256
"""Maximum number of copies that wait to be measured; further ones count with no time of their own."""


class _Watched(NamedTuple):
    way: str
    pages: int
    begin: float
    before: Any  # a jax.Array, whose stubs lack is_ready; or None
    result: jax.Array


class CopyTimes:
    """Watches copies from a thread of its own, which is started by the first one.

    The time of a copy is from when it was dispatched, or the step before it and the copy before it were done, whichever
    is later, until its result is there.
    """

    def __init__(self) -> None:
        self._counts = {"out": PageCopies(), "in": PageCopies()}
        self._queue: queue.Queue[_Watched] = queue.Queue(MOST_WATCHED)
        self._thread: threading.Thread | None = None
        self.before: jax.Array | None = None
        """What the step dispatched last has sampled, for which the device must be done with it; None before one has."""

    def counts(self) -> dict[str, PageCopies]:
        """Returns the copies so far, by way: "out" to host memory, "in" from there."""
        return dict(self._counts)

    def watch(self, way: str, pages: int, result: jax.Array) -> None:
        """Measures a copy that was just dispatched. result: is ready when the copy is done, and is never donated."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="copy-times", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(_Watched(way, pages, time.perf_counter(), self.before, result))
        except queue.Full:
            self._count(way, pages, 0.0)

    def _run(self) -> None:
        done = 0.0
        while True:
            one = self._queue.get()
            begin = max(one.begin, done)
            try:
                if one.before is not None and not one.before.is_ready():
                    one.before.block_until_ready()
                    begin = max(begin, time.perf_counter())
                one.result.block_until_ready()
            except Exception:  # the step was lost, and whoever collects it says so
                continue
            done = time.perf_counter()
            self._count(one.way, one.pages, max(0.0, done - begin))
            del one

    def _count(self, way: str, pages: int, seconds: float) -> None:
        count = self._counts[way]
        self._counts[way] = PageCopies(count.pages + pages, count.seconds + seconds)
