"""Lowers the priority of a process whose work may wait for that of others."""

from __future__ import annotations

import contextlib
import os
import pathlib

_NICENESS = 19


def yield_to_others() -> None:
    """Lowers the priority of this process, and on Linux that of its session: where sessions share the processors, the
    niceness of a process counts within its own alone.
    """
    os.nice(_NICENESS)
    with contextlib.suppress(OSError):  # a kernel without it, or one that lets nobody
        pathlib.Path("/proc/self/autogroup").write_text(str(_NICENESS), encoding="ascii")
