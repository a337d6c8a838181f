"""Writes pages of host memory to files, and reads them back, in a thread of its own."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxserve.kv_cache.page_copy import PageCopy
from jaxserve.kv_cache.page_files import PageFiles
from jaxserve.runner.protocol import DiskCounts, DiskEvent

_log = logging.getLogger(__name__)

QUEUE_BYTES = 256 << 20
"""Maximum bytes of pages that wait to be written; what comes beyond them is not written."""

COMPLAIN_SECONDS = 60.0
"""Interval, in seconds, at which failing writes are logged."""

CLOSE_SECONDS = 5.0
"""Seconds that the last writes may take at an orderly stop."""

_WEIGHT = 0.1


class DiskPages:
    """Moves pages between host memory and `PageFiles`, as `DiskTier` describes. Only its own thread touches the files
    after the start.

    make: a host page of a page's bytes, uint8 [page_bytes]. put: makes it the content of a host page of this number.
    """

    def __init__(self, files: PageFiles, make: Callable[[np.ndarray], Any], put: Callable[[int, Any], None]):
        self._files, self._make, self._put = files, make, put
        self.keys = files.keys
        self._changed = threading.Condition()
        self._reads: collections.deque[tuple[int, bytes]] = collections.deque()
        self._writes: collections.deque[tuple[bytes, Any] | None] = collections.deque()  # None deletes all pages
        self._waiting: dict[bytes, Any] = {}  # pages among the writes, by key
        self._busy = self._closed = False
        self._events: collections.deque[DiskEvent] = collections.deque()
        self._arrays: dict[int, Any] = {}  # pages that were read, by the number of the read
        self._complained = -COMPLAIN_SECONDS
        self._seconds = self._measure()
        self._written = self._read = self._failed = self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="disk-pages", daemon=True)
        self._thread.start()

    @property
    def page_seconds(self) -> float:
        """Returns the seconds that reading a page takes, as measured lately."""
        return self._seconds

    def counts(self) -> DiskCounts:
        """Returns what has happened since the start."""
        files = self._files
        return DiskCounts(
            pages=len(files),
            num_bytes=files.num_bytes,
            written=self._written,
            read=self._read,
            refused=files.num_refused,
            dropped=self._dropped,
        )

    def write(self, key: bytes, page: Any) -> None:
        """Begins to write a page, which nobody changes any more, unless too much waits already."""
        with self._changed:
            if key in self._waiting or self._closed:
                return
            if (len(self._waiting) + 1) * self._files.page_bytes > QUEUE_BYTES:
                self._dropped += 1
                self._events.append(DiskEvent(key=key))
                return
            self._waiting[key] = page
            self._writes.append((key, page))
            self._changed.notify_all()

    def read(self, number: int, key: bytes) -> None:
        """Begins to read a page; an event with this number tells when it is there."""
        with self._changed:
            self._reads.append((number, key))
            self._changed.notify_all()

    def forget(self) -> None:
        """Deletes all pages, those that wait to be written too."""
        with self._changed:
            self._writes.clear()
            self._waiting.clear()
            self._writes.append(None)
            self._changed.notify_all()

    def events(self) -> list[DiskEvent]:
        """Returns what has happened since the last call, in order."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def accept(self, number: int, host_page: int | None) -> None:
        """Makes what a read has found a host page; None discards it."""
        page = self._arrays.pop(number)
        if host_page is not None:
            self._put(host_page, page)

    def wait(self, seconds: float) -> bool:
        """Waits until nothing is to be read or written; returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._busy or self._reads or self._writes), seconds)

    def close_with(self, copies: Sequence[PageCopy], make: Callable[[Sequence[PageCopy]], None]) -> None:
        """Makes the last copies, in parts that the queue of writes holds, while CLOSE_SECONDS last, and closes."""
        end = time.perf_counter() + CLOSE_SECONDS
        part = max(1, QUEUE_BYTES // (2 * self._files.page_bytes))
        for begin in range(0, len(copies), part):
            make(copies[begin : begin + part])
            if not self.wait(end - time.perf_counter()):
                _log.warning("%d copies of cached pages to disk were left out at the end", len(copies) - begin - part)
                break
        self.close(max(0.5, end - time.perf_counter()))

    def close(self, seconds: float) -> None:
        """Writes what waits for so many seconds, and ends the thread; does nothing the second time."""
        if self._closed:
            return
        self.wait(seconds)
        with self._changed:
            self._closed = True
            self._writes.clear()
            self._reads.clear()
            self._changed.notify_all()
        self._thread.join(seconds)
        if not self._thread.is_alive():
            self._files.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self._reads or self._writes)
                if self._closed:
                    return
                self._busy = True
                read = self._reads.popleft() if self._reads else None
                write = None if read is not None else self._writes.popleft()
            if read is not None:
                self._do_read(*read)
            elif write is None:
                self._do_clear()
            else:
                self._do_write(*write)

    def _do_clear(self) -> None:
        try:
            self._files.clear()
        except OSError:
            _log.exception("pages of the disk cache could not be deleted")

    def _do_read(self, number: int, key: bytes) -> None:
        begin, page = time.perf_counter(), None
        try:
            waiting = self._waiting.get(key)
            data = self._files.read(key) if waiting is None else np.asarray(waiting).tobytes()
            if data is not None:
                page = self._make(np.frombuffer(data, np.uint8))
        except Exception:
            _log.exception("a page of the disk cache could not be read")
        if page is None:
            self._failed += 1
            self._events.append(DiskEvent(key, number, found=False))
            return
        self._read += 1
        self._seconds += _WEIGHT * (time.perf_counter() - begin - self._seconds)
        self._arrays[number] = page
        self._events.append(DiskEvent(key, number, found=True))

    def _do_write(self, key: bytes, page: Any) -> None:
        try:
            deleted = self._files.write(key, np.asarray(page).tobytes())
            self._events.extend(DiskEvent(key=one) for one in deleted)
            self._written += 1
        except Exception as error:
            self._dropped += 1
            self._events.append(DiskEvent(key=key))
            if time.perf_counter() - self._complained >= COMPLAIN_SECONDS:
                self._complained = time.perf_counter()
                _log.warning("a page of the disk cache could not be written: %s", error)
        with self._changed:
            if self._waiting.get(key) is page:
                del self._waiting[key]

    def _measure(self) -> float:
        """Returns the seconds of reading a page, without those of the disk: where there is none to read yet, of making
        a host page of it."""
        begin = time.perf_counter()
        for key in self.keys[-1:]:
            self._files.read(key)
        self._make(np.zeros(self._files.page_bytes, np.uint8))
        return time.perf_counter() - begin
