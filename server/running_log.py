"""What the server says of itself: a few lines at the start, one every few seconds while busy, nothing when idle."""

from __future__ import annotations

import asyncio
import logging
import os
import pathlib
import time
from collections.abc import Callable

from jaxserve.engine.messages import EngineReady, EngineStats
from jaxserve.scheduler.page_pool import greatest_concurrency

INTERVAL_SECONDS = 5.0

_log = logging.getLogger("jaxserve.server")

# A fallback where the system does not say when the process started.
_imported = time.monotonic()


def seconds_since_start() -> float:
    """Seconds since this process started, the interpreter's own start included where /proc tells."""
    try:
        after_name = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _imported


def start_lines(ready: EngineReady, name: str) -> list[str]:
    """The figures of an engine that has become ready, one line each."""
    pool_tokens = ready.limits.pool_tokens
    programs = f"{ready.num_executables} executables"
    origin = f"compiled {programs}" if ready.bundle is None else f"loaded {programs} from bundle {ready.bundle}"
    concurrency = greatest_concurrency(ready.num_pages, ready.page_size, ready.max_model_len, ready.max_num_seqs)
    return [
        f"model {name}: {ready.architecture}, {ready.num_parameters / 1e6:.2f}M parameters, {ready.dtype} on "
        f"{ready.platform}, attention {ready.attention}",
        f"page pool: {pool_tokens:,} tokens ({ready.num_pages:,} pages of {ready.page_size}), {ready.kv_cache}",
        f"greatest concurrency at max_model_len {ready.max_model_len:,}: {concurrency:.1f} requests "
        f"(max_num_seqs {ready.max_num_seqs})",
        f"{origin} in {ready.compile_seconds:.1f} s; engine start {ready.start_seconds:.1f} s",
    ]


def busy_line(before: EngineStats, now: EngineStats, seconds: float) -> str | None:
    """One line for what happened between two counts that lie `seconds` apart, or None when nothing did."""
    computed = now.computed_tokens - before.computed_tokens
    if now.num_steps == before.num_steps and not (now.num_running or now.num_waiting):
        return None
    padding = now.padding_tokens - before.padding_tokens
    pages = now.pages_free + now.pages_used + now.pages_cached
    return (
        f"prompt {(now.prompt_tokens - before.prompt_tokens) / seconds:.1f} tok/s, "
        f"generation {(now.generation_tokens - before.generation_tokens) / seconds:.1f} tok/s, "
        f"running {now.num_running}, waiting {now.num_waiting}, "
        f"pool {_percent(now.pages_used, pages)}, padding {_percent(padding, computed + padding)}"
    )


async def log_while_busy(stats: Callable[[], EngineStats], interval: float = INTERVAL_SECONDS) -> None:
    """Logs a line every `interval` seconds in which the engine did something, until cancelled."""
    before, since = stats(), time.monotonic()
    while True:
        await asyncio.sleep(interval)
        now, time_now = stats(), time.monotonic()
        line = busy_line(before, now, time_now - since)
        if line is not None:
            _log.info("%s", line)
        before, since = now, time_now


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "0.0%"
