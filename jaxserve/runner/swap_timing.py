"""Measures at warm-up what it costs to bring a preempted sequence back, by recomputation or by swapping."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from jaxserve.kv_cache.page_pool import PageCopy, PageState
from jaxserve.programs.step_programs import Shapes
from jaxserve.scheduler.plan import NO_DECODES, NO_SAMPLES, RowPlan, StepPlan
from jaxserve.scheduler.preemption_costs import PreemptionCosts

REPEATS = 3


def prompt_row(shapes: Shapes, slot: int, first_page: int, start: int, end: int) -> RowPlan:
    """Makes a row of tokens `start` to `end` - 1 of a prompt whose pages are consecutive from `first_page` on."""
    held, needed = -(-start // shapes.page_size), -(-end // shapes.page_size)
    pages = tuple(range(first_page + held, first_page + needed))
    return RowPlan(
        request_id="",
        order=-1,
        slot=slot,
        start=start,
        token_ids=(0,) * (end - start),
        first_new_page=held,
        new_pages=pages,
        admit=None,
        more_pages=(pages,) * (shapes.num_groups - 1),  # what the groups overwrite of each other costs no more time
    )


def prefill_plan(shapes: Shapes, rows: tuple[RowPlan, ...]) -> StepPlan:
    """Makes a step of prompt chunks alone, none of which samples."""
    tokens = sum(row.num_tokens for row in rows)
    return StepPlan(-1, NO_DECODES, rows, NO_SAMPLES, shapes.buckets.token_bucket(tokens), 0, tokens)


def _prompts(shapes: Shapes, tokens: int) -> tuple[RowPlan, ...]:
    """Makes rows of `tokens` prompt tokens, in prompts as long as possible, from the first page and slot on."""
    rows: list[RowPlan] = []
    first_page = 1
    while tokens:
        count = min(tokens, shapes.max_model_len)
        rows.append(prompt_row(shapes, len(rows), first_page, 0, count))
        first_page, tokens = first_page + len(rows[-1].new_pages), tokens - count
    return tuple(rows)


def swap_copies(pages: int, *, null: bool = False) -> tuple[tuple[PageCopy, ...], tuple[PageCopy, ...]]:
    """Returns the copies of the first `pages` device pages to the first host pages, and those back.

    null: copies the null page each time.
    """
    device, host = [0] * pages if null else range(1, pages + 1), range(pages)
    out = [PageCopy(page, PageState.ACTIVE, to, PageState.HOST) for page, to in zip(device, host, strict=True)]
    back = [PageCopy(page, PageState.HOST, to, PageState.ACTIVE) for page, to in zip(host, device, strict=True)]
    return tuple(out), tuple(back)


def measure(
    shapes: Shapes, compute: Callable[[StepPlan], None], swap: Callable[[Sequence[PageCopy]], None]
) -> PreemptionCosts:
    """Measures the costs, taking the best of `REPEATS`.

    A token's cost is that of a step of prompts that fills the largest token bucket, or the pool; a page's is that of
    the largest number of pages that one program swaps.

    Args:
        shapes: of the programs.
        compute: runs a step and waits for it.
        swap: copies pages and waits for it. The content of pages and slots is lost.
    """
    usable = shapes.num_pages - 1
    tokens = min(shapes.buckets.tokens[-1], shapes.num_slots * shapes.max_model_len)
    while (rows := _prompts(shapes, tokens))[-1].new_pages[-1] > usable:
        tokens -= min(shapes.page_size, tokens - 1)
    plan = prefill_plan(shapes, rows)
    pages = max(size for size in shapes.swap_sizes if size <= usable)
    out, back = swap_copies(pages)

    token = min(_seconds(lambda: compute(plan)) for _ in range(REPEATS)) / plan.num_tokens
    ways = [(_seconds(lambda: swap(out)), _seconds(lambda: swap(back))) for _ in range(REPEATS)]
    seconds_out, seconds_in = (min(seconds) for seconds in zip(*ways, strict=True))
    return PreemptionCosts(token, (seconds_out + seconds_in) / pages, seconds_in / pages)


def _seconds(call: Callable[[], None]) -> float:
    """Returns the seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
