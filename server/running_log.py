"""Formats the server's log: a few lines at the start, one every few seconds while busy, none when idle."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from jaxserve.engine.messages import EngineReady, EngineStats
from jaxserve.kv_cache.page_groups import PageGroups
from jaxserve.kv_cache.page_pool import greatest_concurrency
from jaxserve.telemetry.startup_spans import StartupSpan, phase_lines, phases_json

INTERVAL_SECONDS = 5.0

_log = logging.getLogger("jaxserve.server")


def start_lines(ready: EngineReady, name: str) -> list[str]:
    """Returns the metrics of an engine that has become ready, one line each."""
    info, costs = ready.info, ready.info.preemption_costs
    pool_tokens = ready.limits.pool_tokens
    missing = info.num_missing_executables
    there = info.num_executables - missing
    programs = f"{there} of {info.num_executables} executables" if missing else f"{there} executables"
    if info.bundle is not None:
        origin = f"loaded {programs} from bundle {info.bundle}"
    elif info.num_cached_executables == there:
        origin = f"loaded {programs} from the compilation cache"
    elif info.num_cached_executables:
        cached, compiled = info.num_cached_executables, there - info.num_cached_executables
        of_all = f" of {info.num_executables}" if missing else ""
        origin = f"compiled {compiled}{of_all} executables and loaded {cached} from the compilation cache"
    else:
        origin = f"compiled {programs}"
    follow = "; the others follow while it serves" if missing else ""
    groups = PageGroups(info.page_size, info.group_windows)
    pages = groups.held(info.max_model_len)
    concurrency = greatest_concurrency(info.usable_pages, pages, ready.max_num_seqs)
    holds = f"{pool_tokens:,} tokens" if groups.alike else f"requests of up to {pool_tokens:,} tokens"
    lines = [
        f"model {name}: {info.architecture}, {info.num_parameters / 1e6:.2f}M parameters, {info.dtype} on "
        f"{info.platform}, attention {info.attention}",
        f"page pool: {holds} ({info.usable_pages:,} pages of {info.page_size}), {info.kv_cache}",
        f"greatest concurrency at max_model_len {info.max_model_len:,}: {concurrency:.1f} requests "
        f"(max_num_seqs {ready.max_num_seqs})",
        f"{origin} in {info.compile_seconds:.1f} s{follow}; engine start {ready.start_seconds:.1f} s",
    ]
    if info.num_host_pages and costs is not None:
        token, page = 1e6 * costs.recompute_seconds_per_token, 1e6 * costs.swap_seconds_per_page
        tokens = info.num_host_pages * info.page_size
        lines.insert(
            2,
            f"swap space: {tokens:,} tokens ({info.num_host_pages:,} pages of host memory); to bring back a sequence "
            f"takes {token:,.0f} us a token computed again, {page:,.0f} us a page swapped out and in",
        )
    if info.memory:
        parts = ", ".join(f"{part} {size / 1e6:,.1f}" for part, size in info.memory)
        lines.insert(-1, f"memory, MB: {parts}")
    return lines


def phases_log(server: Sequence[StartupSpan], engine: Sequence[StartupSpan]) -> list[str]:
    """Formats the startup spans for people and, in the last line, as JSON."""
    lines = phase_lines("start of the server", server)
    if engine:
        lines += phase_lines("start of the engine's process", engine)
    return [*lines, f"start phases: {phases_json(server=server, engine=engine)}"]


def busy_line(before: EngineStats, now: EngineStats, seconds: float) -> str | None:
    """Returns one line on the activity between two counts `seconds` apart, or None when there was none."""
    computed = now.computed_tokens - before.computed_tokens
    if now.num_steps == before.num_steps and not (now.num_running or now.num_waiting or now.num_swapped):
        return None
    padding = now.padding_tokens - before.padding_tokens
    looked_up = now.prefix_cache_queries - before.prefix_cache_queries
    found = now.prefix_cache_hits - before.prefix_cache_hits
    hits = f"prefix hits {_percent(found, looked_up)}, " if now.prefix_cache_queries else ""
    pages = now.pages_free + now.pages_used + now.pages_cached
    line = (
        f"prompt {(now.prompt_tokens - before.prompt_tokens) / seconds:.1f} tok/s, "
        f"generation {(now.generation_tokens - before.generation_tokens) / seconds:.1f} tok/s, "
        f"running {now.num_running}, waiting {now.num_waiting}, swapped {now.num_swapped}, "
        f"pool {_percent(now.pages_used, pages)}, {hits}padding {_percent(padding, computed + padding)}"
    )
    for kind in ("recompute", "swap"):
        name = f"num_preemptions_{kind}"
        if count := getattr(now, name) - getattr(before, name):
            line += f", preempted by {kind} {count}"
    if count := now.num_dropped - before.num_dropped:
        line += f", dropped as late {count}"
    return line if now.kendall_tau is None else f"{line}, length prediction tau {now.kendall_tau:.2f}"


async def log_while_busy(stats: Callable[[], EngineStats], interval: float = INTERVAL_SECONDS) -> None:
    """Logs a line for every `interval` seconds in which the engine was active, until canceled."""
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
