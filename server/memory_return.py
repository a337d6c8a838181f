"""Returns memory used by a burst of calls to the operating system.

What gRPC frees stays in the C library's arenas, between live blocks: after 300 requests of 4 MB that broke off, 550 of
640 MB. glibc returns it on request.
"""

from __future__ import annotations

import asyncio
import os
import pathlib

from jaxserve.frontend.large_blocks import return_freed_memory

CHECK_SECONDS = 5.0
MOST_CHECK_SECONDS = 20.0
"""Maximum seconds until the next attempt after attempts that returned little."""

GROWTH_BYTES = 16 * 1024 * 1024
"""Growth in bytes over an earlier size from which an attempt is worth its milliseconds."""

_STATM = pathlib.Path("/proc/self/statm")


def resident_bytes() -> int:
    """Returns the resident memory of this process; 0 where the system has no /proc."""
    if not _STATM.exists():
        return 0
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def return_memory() -> None:
    """Returns free memory to the system while the process is larger than it once was, until canceled.

    It must not run in a process with an engine on the CPU, which is to retain freed memory.
    """
    least, wait = resident_bytes(), CHECK_SECONDS
    while True:
        await asyncio.sleep(wait)
        before = resident_bytes()
        if before - least >= GROWTH_BYTES:
            await asyncio.to_thread(return_freed_memory)
            after = resident_bytes()
            # What is in use may be freed at any later time, which shows in no figure.
            wait = CHECK_SECONDS if before - after >= GROWTH_BYTES // 2 else min(2 * wait, MOST_CHECK_SECONDS)
            before = after
        else:
            wait = CHECK_SECONDS
        least = min(least, before)
