"""Configures glibc malloc to retain freed memory.

XLA's CPU backend allocates every program's temporaries anew in each step. glibc hands blocks of that size back to the
kernel when they are freed, so that each step pays for its pages a second time: a fault and a cleared page every 4 KiB,
a quarter of the sampler's time and a tenth of a 512-token step of a 153M model.
"""

from __future__ import annotations

import ctypes
import sys

# Numbers of mallopt's parameters in glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Makes the allocator of this process reuse freed memory instead of returning it; False where there is no mallopt.

    What is free now, after compiling and loading, is returned first: it lies in pieces that steps hardly use. The
    limit of arenas comes too late for XLA's threads, which have theirs by now. Such an arena holds no block of 64 MiB
    or more: the temporaries of a program that needs as much still come from the kernel and go back to it, unless the
    process was started with MALLOC_ARENA_MAX=1. For the whole process, and for good.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    ctypes.CDLL(None).malloc_trim(0)
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1))
    results = [mallopt(parameter, value) for parameter, value in settings]
    return all(results)
