"""The C library's memory allocator in a process that holds large messages for moments: what is freed is given back."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_MMAP_THRESHOLD = -3  # of mallopt, in glibc's malloc.h
_LARGE_BLOCK = 1024 * 1024


def return_large_blocks() -> None:
    """Makes the allocator give large blocks back as soon as they are freed, for the whole process and for good.

    glibc does so at first, but with each freed block it takes blocks of that size for common, up to 32 MB, and keeps
    them from then on.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)


def return_freed_memory() -> None:
    """Gives back what is free now: a thread's part of glibc's heap keeps what a long text took in small blocks."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    """A function of glibc, or None where there is none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
