"""Notices changes of files that the server trusts, and has them read again: keys and certificates."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Protocol

_log = logging.getLogger("jaxserve.server")

LOOK_SECONDS = 1.0


class Reloadable(Protocol):
    """Holds what was read from files."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files."""
        ...

    def reload(self) -> None:
        """Reads them again; keeps what it has, and logs why, where they cannot be used. Never raises."""
        ...


class FileRefresher:
    """Has files read again when they have changed, or at once when `refresh` is called.

    A changed file is read once it has not changed between two looks: one that is being written may be whole lines and
    yet not whole.
    """

    def __init__(self, holders: Sequence[Reloadable]):
        self._holders = holders
        self._wake = asyncio.Event()
        self._read = [_versions(holder.files) for holder in holders]
        self._seen = list(self._read)

    def refresh(self) -> None:
        """Has all files read again now, whether or not they seem to have changed."""
        self._wake.set()

    async def watch(self) -> None:
        """Looks at the files until canceled."""
        while True:
            at_once = True
            try:
                await asyncio.wait_for(self._wake.wait(), LOOK_SECONDS)
            except TimeoutError:
                at_once = False
            self._wake.clear()
            await asyncio.to_thread(self.look, at_once)  # a file may lie on a slow disk

    def look(self, at_once: bool = False) -> None:
        """Looks at the files once. at_once: reads them all."""
        for place, holder in enumerate(self._holders):
            versions = _versions(holder.files)
            settled = versions == self._seen[place]
            self._seen[place] = versions
            if not at_once and (versions == self._read[place] or not settled):
                continue
            self._read[place] = versions
            try:
                holder.reload()
            except Exception:  # the server must go on noticing changes
                _log.exception("%s cannot be read again", ", ".join(holder.files))


def _versions(files: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Returns values that differ when a file has changed."""
    found = []
    for path in files:
        try:
            status = os.stat(path)
        except OSError:
            found.append(())
        else:
            found.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(found)
