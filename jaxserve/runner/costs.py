"""Measuring at warm-up what it costs to bring a preempted sequence back, by computing it again or by swapping."""

from __future__ import annotations

import time
from collections.abc import Callable

from jaxserve.runner.programs import Shapes
from jaxserve.scheduler.costs import PreemptionCosts
from jaxserve.scheduler.page_pool import PageCopy, PageState
from jaxserve.scheduler.plan import NO_DECODES, RowPlan, StepPlan, Swap

REPEATS = 3


def prefill_plan(shapes: Shapes, tokens: int) -> StepPlan:
    """A step that computes `tokens` tokens of prompts as long as may be, from the first page and slot on."""
    chunks = []
    first_page, left = 1, tokens
    while left:
        count = min(left, shapes.max_model_len)
        pages = -(-count // shapes.page_size)
        chunks.append(
            RowPlan(
                request_id="",
                order=-1,
                slot=len(chunks),
                start=0,
                token_ids=(0,) * count,
                sample=False,
                suppress_stop=False,
                first_new_page=0,
                new_pages=tuple(range(first_page, first_page + pages)),
                admit=None,
            )
        )
        first_page, left = first_page + pages, left - count
    return StepPlan(-1, NO_DECODES, tuple(chunks), shapes.buckets.token_bucket(tokens), 0, tokens, 0)


def swap_plans(pages: int, *, null: bool = False) -> tuple[Swap, Swap]:
    """The first `pages` device pages to the first host pages, and back to where they were. null: the null page each."""
    device, host = [0] * pages if null else range(1, pages + 1), range(pages)
    out = [PageCopy(page, PageState.ACTIVE, to, PageState.HOST) for page, to in zip(device, host, strict=True)]
    back = [PageCopy(page, PageState.HOST, to, PageState.ACTIVE) for page, to in zip(host, device, strict=True)]
    return Swap("", tuple(out), None), Swap("", tuple(back), 0)


def measure(shapes: Shapes, compute: Callable[[StepPlan], None], swap: Callable[[Swap], None]) -> PreemptionCosts:
    """The costs, the best of `REPEATS`.

    A token's cost is that of a step of prompts which fills the largest token bucket, or the pool; a page's that of the
    largest number of pages that one program swaps.

    compute, swap: carry out a step, or a swap, and wait for it. The content of pages and slots is lost.
    """
    usable = shapes.num_pages - 1
    tokens = min(shapes.buckets.tokens[-1], shapes.num_slots * shapes.max_model_len)
    while (plan := prefill_plan(shapes, tokens)).chunks[-1].new_pages[-1] > usable:
        tokens -= min(shapes.page_size, tokens - 1)
    pages = max(size for size in shapes.swap_sizes if size <= usable)
    out, back = swap_plans(pages)

    def both() -> None:
        swap(out)
        swap(back)

    return PreemptionCosts(_best(lambda: compute(plan)) / plan.num_tokens, _best(both) / pages)


def _best(call: Callable[[], None]) -> float:
    """Seconds of the fastest of `REPEATS` calls."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
