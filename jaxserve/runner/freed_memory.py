"""Configures glibc malloc to retain freed memory.

XLA's CPU backend allocates every program's temporaries anew in each step. glibc hands blocks of that size back to the
kernel when they are freed, so that each step pays for its pages a second time: a fault and a cleared page every 4 KiB.
That was a third of a greedy decode step of 64 rows and 128,256 tokens, and a tenth of a 512-token step of a 153M model.
"""

from __future__ import annotations

import ctypes
import sys

# Numbers of mallopt's parameters in glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
_ARENA_MAX = -8


def use_one_arena() -> bool:
    """Makes all threads of this process allocate from malloc's main arena; False where there is no mallopt.

    Those of XLA run the programs. The arena of a thread holds blocks of less than 64 MiB: larger ones come from the
    kernel and go back to it, whatever `keep_freed_memory` says. Call it before XLA has made its threads, which is when
    jax is first asked for its devices; a thread that has an arena keeps it, and once a process has several of them,
    glibc no longer reads the setting (MALLOC_ARENA_MAX=1 in the environment works at any rate). For the whole process,
    and for good.
    """
    return _set_options((_ARENA_MAX, 1))


def keep_freed_memory() -> bool:
    """Makes the allocator of this process reuse freed memory instead of returning it; False where there is no mallopt.

    What is free now, after compiling and loading, is returned first: it lies in pieces that steps hardly use. For the
    whole process, and for good.
    """
    if not sys.platform.startswith("linux"):
        return False
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)
    return _set_options((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1))


def _set_options(*settings: tuple[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    results = [0 if mallopt is None else mallopt(parameter, value) for parameter, value in settings]
    return all(results)
