"""The thread that moves pages between host memory and files, and the one that times copies."""

from __future__ import annotations

import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kv_cache.page_copy import PageCopy, PageState
from jaxserve.kv_cache.page_files import PageFiles
from jaxserve.runner import disk_pages
from jaxserve.runner.copy_times import CopyTimes
from jaxserve.runner.disk_pages import DiskPages

PAGE = 64


class Disk:
    """`DiskPages` over a directory, whose pages are numpy arrays. put: the host pages that were accepted."""

    def __init__(self, directory, most: int = 1 << 20):
        self.put: dict[int, Any] = {}
        self.files = PageFiles(str(directory), b"m" * 16, b"s" * 16, PAGE, most)
        self.pages = DiskPages(self.files, lambda data: data.copy(), self.put.__setitem__)

    def read(self, number: int, key: bytes) -> bytes | None:
        """What a read finds, as a host page of the same number."""
        self.pages.read(number, key)
        assert self.pages.wait(10)
        (event,) = [one for one in self.pages.events() if one.number == number]
        if not event.found:
            return None
        self.pages.accept(number, number)
        return self.put[number].tobytes()


def page(number: int) -> np.ndarray:
    return np.full(PAGE, number, np.uint8)


def test_pages_are_written_and_read_by_the_thread(tmp_path):
    disk = Disk(tmp_path)
    for number in range(1, 4):
        disk.pages.write(b"%d" % number, page(number))
    assert disk.pages.wait(10)
    assert [disk.read(number, b"%d" % number) for number in (3, 1)] == [page(3).tobytes(), page(1).tobytes()]
    assert disk.read(9, b"9") is None
    counts = disk.pages.counts()
    assert (counts.pages, counts.written, counts.read, counts.dropped) == (3, 3, 2, 0)
    assert counts.num_bytes == disk.files.num_bytes
    assert 0 < disk.pages.page_seconds < 10
    disk.pages.close(10)
    disk.pages.close(10)
    assert set(Disk(tmp_path).pages.keys) == {b"1", b"2", b"3"}


def test_a_read_that_is_not_accepted_leaves_nothing(tmp_path):
    disk = Disk(tmp_path)
    disk.pages.write(b"a", page(1))
    disk.pages.read(1, b"a")
    assert disk.pages.wait(10)
    disk.pages.accept(1, None)
    assert disk.put == disk.pages._arrays == {}


def test_pages_forgotten_are_gone_whether_they_were_written_or_not(tmp_path):
    disk = Disk(tmp_path)
    for number in range(50):
        disk.pages.write(b"%d" % number, page(number))
    disk.pages.forget()
    disk.pages.write(b"after", page(7))
    assert disk.pages.wait(10)
    assert disk.files.keys == (b"after",)


def test_what_waits_to_be_written_is_bounded_and_what_is_dropped_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_pages, "QUEUE_BYTES", 2 * PAGE)
    disk = Disk(tmp_path)
    with disk.pages._changed:  # the thread cannot take any
        for number in range(5):
            disk.pages.write(b"%d" % number, page(number))
    assert disk.pages.wait(10)
    lost = {event.key for event in disk.pages.events() if event.number is None}
    assert len(lost) == disk.pages.counts().dropped == 3
    assert {b"%d" % number for number in range(5)} - lost == set(disk.files.keys)


def test_pages_deleted_for_others_are_told(tmp_path):
    disk = Disk(tmp_path, most=2 * (PAGE + 90))
    for number in range(4):
        disk.pages.write(b"%d" % number, page(number))
    assert disk.pages.wait(10)
    assert [event.key for event in disk.pages.events()] == [b"0", b"1"]


def test_a_disk_that_cannot_be_written_costs_a_line_and_no_page(tmp_path, monkeypatch, caplog):
    disk = Disk(tmp_path)

    def full(key: bytes, data: bytes) -> list[bytes]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.files, "write", full)
    for number in range(3):
        disk.pages.write(b"%d" % number, page(number))
    assert disk.pages.wait(10)
    assert disk.pages.counts().dropped == 3
    assert [message for message in caplog.messages if "No space left" in message] == caplog.messages
    assert len(caplog.messages) == 1
    assert {event.key for event in disk.pages.events()} == {b"0", b"1", b"2"}


def test_the_last_copies_are_made_in_parts_that_the_queue_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_pages, "QUEUE_BYTES", 4 * PAGE)
    disk = Disk(tmp_path)
    copies = [PageCopy(n, PageState.HOST, 0, PageState.DISK, key=b"%d" % n) for n in range(7)]
    sizes = []

    def make(part) -> None:
        sizes.append(len(part))
        for copy in part:
            disk.pages.write(copy.key, page(copy.source))

    disk.pages.close_with(copies, make)
    assert sizes == [2, 2, 2, 1]
    assert len(Disk(tmp_path).pages.keys) == 7


@pytest.mark.parametrize("way", ["out", "in"])
def test_copies_are_timed_behind_the_step_before(way):
    times = CopyTimes()
    times.before = jnp.zeros(3)
    for count in (4, 1):
        times.watch(way, count, jnp.ones(5) + count)
    end = time.monotonic() + 10
    while times.counts()[way].pages < 5 and time.monotonic() < end:
        time.sleep(0.001)
    assert times.counts()[way].pages == 5
    assert 0.0 <= times.counts()[way].seconds < 10
    other = "in" if way == "out" else "out"
    assert times.counts()[other].pages == 0
