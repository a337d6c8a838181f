"""Configures glibc malloc to return freed memory, for processes that hold large messages briefly."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_MMAP_THRESHOLD = -3  # of mallopt, in glibc's malloc.h
_LARGE_BLOCK = 1024 * 1024


def return_large_blocks() -> None:
    """Makes the allocator return large blocks as soon as they are freed, for the whole process and permanently.

    glibc does so at first, but with each freed block it takes blocks of that size for common, up to 32 MB, and keeps
    them from then on.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)


def return_freed_memory() -> None:
    """Returns free memory now: a thread's part of glibc's heap keeps small blocks that a long text used."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    """Returns a function of glibc, or None where there is none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
