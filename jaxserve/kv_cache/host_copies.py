"""Decides which cached pages are copied to host memory, to disk and back, and records the copies for the runner."""

from __future__ import annotations

from collections.abc import Iterable

from jaxserve.kv_cache.host_pool import HeldPage, HostPool, Reclaimed
from jaxserve.kv_cache.page_contents import PageContents
from jaxserve.kv_cache.page_copy import PageCopy, PageState


class HostCopies:
    """Collects the copies of pages that are reclaimed, until they are taken.

    caches: reclaimed pages of the device are to be stored. limit: most copies of them in one step; None for any number.
    """

    def __init__(self, host: HostPool, contents: PageContents) -> None:
        self._host = host
        self._contents = contents
        self._copies: list[PageCopy] = []
        self._num_stored = 0  # in this step
        self.caches = host.caches
        self.limit: int | None = None

    def start_step(self) -> None:
        """Begins to count the copies of device pages anew."""
        self._num_stored = 0

    def take(self) -> list[PageCopy]:
        """Returns the copies decided since the last call."""
        copies, self._copies = self._copies, []
        return copies

    def store(self, page: int, content: HeldPage) -> None:
        """Copies a device page that is reclaimed to host memory, where it is not there yet."""
        assert content.key is not None
        if self.limit is not None and self._num_stored >= self.limit and content.key not in self._host:
            return
        target, reclaimed = self._host.store(content)
        if reclaimed is not None:
            self.leaves_host(reclaimed)
        if target is not None:
            self._copies.append(PageCopy(page, PageState.ACTIVE, target, PageState.HOST, content.group))
            self._num_stored += 1

    def leaves_host(self, reclaimed: Reclaimed) -> None:
        """Writes a cached page of host memory to disk, where there is one that does not have it, before its place is
        taken."""
        page, content = reclaimed
        assert content.key is not None
        self._contents.unfindable(content.key)
        on_disk = self._host.on_disk
        if on_disk is not None and content.key not in on_disk:
            on_disk.add(content.key)
            self._copies.append(PageCopy(page, PageState.HOST, 0, PageState.DISK, content.group, content.key))

    def load(self, contents: Iterable[HeldPage]) -> list[int]:
        """Begins to read pages from disk to host memory, as far as it has room; returns the numbers of the reads."""
        numbers = []
        for content in contents:
            number, page, reclaimed = self._host.load(content)
            if reclaimed is not None:
                self.leaves_host(reclaimed)
            if number < 0:
                break
            numbers.append(number)
            if page is not None:
                key = content.key or b""
                self._copies.append(PageCopy(number, PageState.DISK, page, PageState.HOST, content.group, key))
        return numbers

    def lost(self, host_pages: Iterable[int]) -> None:
        """Forgets what was cached in host pages whose copies did not take place."""
        for key in self._host.lost(host_pages):
            self._contents.unfindable(key)

    def forget(self, cause: str) -> None:
        """Forgets the copies that are not taken yet. Where the device is lost, so is what they were to store; otherwise
        host memory forgets what it caches, and what it does not read from disk or write to it is copied all the
        same."""
        copies = self.take()
        if cause == "lost":
            self.lost([copy.destination for copy in copies if copy.destination_tier is PageState.HOST])
        else:
            self._host.forget()
            self._copies = [copy for copy in copies if PageState.DISK not in (copy.source_tier, copy.destination_tier)]
