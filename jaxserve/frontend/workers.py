"""Runs long encoding and decoding of clients' texts in threads of the front end.

Work is divided into steps (see `preparation_steps`), and other work runs between two steps. Native calls release the
interpreter lock, so the event loop continues meanwhile. Long texts have threads and a budget of their own: a short text
never waits behind them, and the memory they hold is bounded, however many there are, those that wait included.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from jaxserve.frontend.delta import QueueFullError
from jaxserve.frontend.encoding import PIECE_CHARACTERS
from jaxserve.frontend.large_blocks import return_freed_memory
from jaxserve.frontend.preparation_steps import Steps

T = TypeVar("T")

MAX_BYTES = 16 * 1024 * 1024
"""Maximum bytes of text processed at one time; a larger text is processed alone."""

MAX_WAITING_BYTES = 64 * 1024 * 1024
MAX_WAITING = 1024
"""Maximum bytes and number of the texts waiting behind those, of short and of long ones each."""

_SHORT_BYTES = 256 * 1024
"""Maximum bytes of a short text."""
_SHORT_SHARE = MAX_BYTES // 4


class WorkersClosedError(RuntimeError):
    """The workers were closed before the work was done."""


class ByteBudget:
    """Bounds the bytes that are processed at one time, in first-come, first-served order. For one event loop.

    Args:
        max_waiting_bytes: total bytes that may wait; one text may always.
        max_waiting: number of texts that may wait.
    """

    def __init__(self, limit: int, max_waiting_bytes: int = MAX_WAITING_BYTES, max_waiting: int = MAX_WAITING):
        self._limit = limit
        self._max_waiting_bytes = max_waiting_bytes
        self._max_waiting = max_waiting
        self._held = 0
        self._waiting: dict[asyncio.Future[None], int] = {}
        self._waiting_bytes = 0

    @property
    def held(self) -> int:
        """Number of bytes being processed."""
        return self._held

    @property
    def waiting(self) -> int:
        """Number of bytes that wait."""
        return self._waiting_bytes

    async def acquire(self, num_bytes: int) -> None:
        """Waits until `num_bytes` more may be processed; if that exceeds the whole budget, until nothing else is.

        Raises QueueFullError, at once, where too much waits already.
        """
        self._check_waiting(num_bytes)
        granted = asyncio.get_running_loop().create_future()
        self._waiting[granted] = num_bytes
        self._waiting_bytes += num_bytes
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():  # granted and canceled at the same time
                self.release(num_bytes)
            elif granted in self._waiting:
                self._leave(granted)
                self._grant()  # texts that waited behind it
            raise

    def release(self, num_bytes: int) -> None:
        """Releases bytes that were acquired."""
        self._held -= num_bytes
        self._grant()

    def close(self) -> None:
        """Ends every wait with WorkersClosedError."""
        for granted in list(self._waiting):
            self._leave(granted)
            if not granted.done():
                granted.set_exception(WorkersClosedError())

    def _check_waiting(self, num_bytes: int) -> None:
        if self._waiting and self._waiting_bytes + num_bytes > self._max_waiting_bytes:
            raise QueueFullError(
                f"{self._waiting_bytes} bytes of text wait to be tokenized; at most {self._max_waiting_bytes} bytes may"
                f" wait, and this text has {num_bytes}: try again later"
            )
        if len(self._waiting) >= self._max_waiting:
            raise QueueFullError(
                f"{len(self._waiting)} texts wait to be tokenized; at most {self._max_waiting} may wait: try again"
                " later"
            )

    def _grant(self) -> None:
        while self._waiting:
            granted, num_bytes = next(iter(self._waiting.items()))
            if not granted.done():
                if self._held and self._held + num_bytes > self._limit:
                    return
                self._held += num_bytes
                granted.set_result(None)
            self._leave(granted)

    def _leave(self, granted: asyncio.Future[None]) -> None:
        self._waiting_bytes -= self._waiting.pop(granted)


class Workers:
    """Runs steps in threads, for one event loop. Must be closed with `close`."""

    def __init__(self) -> None:
        self._short = _Lane(2, _SHORT_SHARE, "short text")
        self._long = _Lane(min(4, max(1, (os.cpu_count() or 1) // 4)), MAX_BYTES - _SHORT_SHARE, "long text")
        # One conversation is rendered at a time: those that wait for it do not take the threads of texts.
        self._templates = _Lane(1, MAX_BYTES, "chat template")
        # Requests with a new grammar wait for the processes that check them, and not for one another's texts.
        self._grammars = _Lane(2, MAX_BYTES, "grammar check")
        # A text that cannot be cut is one call, of seconds and 500 MB for 4 MB: one at a time, without blocking others.
        self._uncut = ThreadPoolExecutor(1, thread_name_prefix="uncut text")
        self._closed = False

    async def run(self, steps: Steps[T], num_bytes: int, *, renders: bool = False, checks_grammar: bool = False) -> T:
        """Runs `steps`, which process `num_bytes` bytes, and returns their result. renders: they wait for the process
        of chat templates. checks_grammar: they wait for one that checks grammars.

        The first step runs at once, on the loop.

        When canceled, it runs no further step.

        Raises:
            WorkersClosedError: the workers were closed before the end.
            QueueFullError: too much text waits already.
            Exception: whatever a step raises.
        """
        first = _advance(steps)
        if first.done:
            return first.result
        lane = self._lane(num_bytes, renders, checks_grammar)
        if self._closed:
            raise WorkersClosedError
        await lane.budget.acquire(num_bytes)
        running: Future[_Advanced] | None = None
        try:
            size = first.size
            while not self._closed:
                threads = self._uncut if size > PIECE_CHARACTERS else lane.threads
                running = threads.submit(_advance, steps)
                advanced = await asyncio.wrap_future(running)
                if advanced.done:
                    return advanced.result
                size = advanced.size
            raise WorkersClosedError
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):
                raise WorkersClosedError from None
            raise
        finally:
            self._release(lane, num_bytes, running)

    def close(self) -> None:
        """Lets running steps end by themselves, and ends everything else with WorkersClosedError."""
        self._closed = True
        for lane in (self._short, self._long, self._templates, self._grammars):
            lane.budget.close()
            lane.threads.shutdown(wait=False, cancel_futures=True)
        self._uncut.shutdown(wait=False, cancel_futures=True)

    def _lane(self, num_bytes: int, renders: bool, checks_grammar: bool) -> _Lane:
        if renders:
            return self._templates
        if checks_grammar:
            return self._grammars
        return self._short if num_bytes <= _SHORT_BYTES else self._long

    def _release(self, lane: _Lane, num_bytes: int, running: Future[_Advanced] | None) -> None:
        if running is None or running.done():
            lane.budget.release(num_bytes)
            if lane is self._long and not lane.budget.held and not self._closed:
                lane.threads.submit(return_freed_memory)
            return
        # A step that runs while its call is canceled goes on to its end, and its memory counts until then.
        loop = asyncio.get_running_loop()

        def release(_: Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nothing waits any more
                loop.call_soon_threadsafe(self._release, lane, num_bytes, None)

        running.add_done_callback(release)


class _Lane:
    """Holds threads and the budget of bytes they process."""

    def __init__(self, num_threads: int, max_bytes: int, name: str):
        self.threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self.budget = ByteBudget(max_bytes)


class _Advanced:
    """Result of a step: the size of the next one, or the final result."""

    def __init__(self, *, done: bool, size: int = 0, result: Any = None):
        self.done = done
        self.size = size
        self.result = result


def _advance(steps: Steps[Any]) -> _Advanced:
    try:
        return _Advanced(done=False, size=next(steps))
    except StopIteration as stop:
        return _Advanced(done=True, result=stop.value)
