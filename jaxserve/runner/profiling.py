"""Records a profile of this process with jax's profiler."""

from __future__ import annotations

import threading
import time

import jax

_one_at_a_time = threading.Lock()  # jax has one profiler a process


def record_profile(directory: str, seconds: float) -> None:
    """Profiles the process for `seconds` and writes what was seen into the directory; call it in a thread of its own.

    Raises RuntimeError while another profile is recorded.
    """
    if not _one_at_a_time.acquire(blocking=False):
        raise RuntimeError("another profile is being recorded")
    try:
        jax.profiler.start_trace(directory)
        try:
            time.sleep(seconds)
        finally:
            jax.profiler.stop_trace()
    finally:
        _one_at_a_time.release()
