"""Returns the memory that a burst of calls took.

What gRPC frees stays in the C library's arenas, between blocks that live on: after 300 requests of 4 MB that broke off,
550 of 640 MB. glibc returns it when asked.
"""

from __future__ import annotations

import asyncio
import os
import pathlib

from jaxserve.frontend.memory import return_freed_memory

CHECK_SECONDS = 5.0
GROWTH_BYTES = 64 * 1024 * 1024
"""How much more memory than after the last time makes it worth asking, which takes tens of milliseconds."""

_STATM = pathlib.Path("/proc/self/statm")


def resident_bytes() -> int:
    """Returns the memory that this process occupies, 0 where the system has no /proc to tell it."""
    if not _STATM.exists():
        return 0
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def return_memory(check_seconds: float = CHECK_SECONDS, growth_bytes: int = GROWTH_BYTES) -> None:
    """Has free memory returned whenever the process has grown, until canceled.

    Not for a process with an engine on the CPU, which is to keep what it has freed.
    """
    least = resident_bytes()
    while True:
        await asyncio.sleep(check_seconds)
        now = resident_bytes()
        if now - least >= growth_bytes:
            await asyncio.to_thread(return_freed_memory)
            least = resident_bytes()
        least = min(least, now)
