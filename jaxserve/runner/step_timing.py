"""Measures step times at warm-up, from which the chunks under max_decode_gap follow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from jaxserve.planning.step_cost_models import FittedCosts, StepTime
from jaxserve.programs.step_programs import Shapes
from jaxserve.scheduler.plan import NO_DECODES, DecodeRows, PageTableWrite, RowPlan, Samples, StepPlan, table_writes
from jaxserve.scheduler.step_shape import shape_of

_MOST_REPEATS = 3
_REPEAT_SECONDS = 0.2
"""A step is repeated while its repetitions took less than this; the median counts."""

_LONGEST = 16_384
"""Maximum context of a measured prompt."""

_DECODE_POSITIONS = 65_536
"""Maximum number of positions that the rows of a measured decode step attend to, in all."""


def measure_steps(shapes: Shapes, compute: Callable[[StepPlan], None], swap_seconds_per_page: float) -> FittedCosts:
    """Measures steps of every token bucket and fits costs to them.

    Each bucket is measured with prompts at their begin and at the end of a long context, with decodes of short and of
    long contexts, and with both in one step.

    Args:
        shapes: of the programs.
        compute: runs a step and waits for its ids. The content of pages and slots is lost.
        swap_seconds_per_page: a page out and in; 0 where nothing is swapped.
    """
    compute(next(_plans(shapes)))  # what is loaded at the first use is not measured
    found = [StepTime((shape_of(plan),), _seconds(lambda plan=plan: compute(plan))) for plan in _plans(shapes)]
    return FittedCosts.fit(found, name="measured at warm-up", swap_seconds_per_page=swap_seconds_per_page)


def _plans(shapes: Shapes) -> Iterator[StepPlan]:
    usable = (shapes.num_pages - 1) * shapes.page_size
    longest = min(shapes.max_model_len, usable, _LONGEST)
    most_rows = min(shapes.num_slots, shapes.buckets.rows[-1])
    for size in shapes.buckets.tokens:
        chunk = min(size, longest)
        yield _plan(shapes, size, 0, 0, chunk, 0)
        if longest - chunk > chunk:
            yield _plan(shapes, size, 0, 0, chunk, longest - chunk)
        rows = min(size, most_rows)
        for context in (min(16, longest), min(longest, _DECODE_POSITIONS // rows, usable // rows)):
            if size <= shapes.buckets.token_bucket(most_rows):
                yield _plan(shapes, size, rows, max(1, context), 0, 0)
        beside = min(rows // 2, 16)
        if beside and size > beside:
            chunk = min(size - beside, longest)
            context = max(1, min(longest // 4, usable // beside))
            yield _plan(shapes, size, beside, context, chunk, (longest - chunk) // 2)


def _plan(shapes: Shapes, bucket: int, rows: int, context: int, tokens: int, start: int) -> StepPlan:
    """Makes a step of decoding rows with `context` positions each, and of a chunk that samples, padded to `bucket`.

    Pages are those of the pool in turn, so that rows may share some: what is computed does not matter.
    """
    usable, size = shapes.num_pages - 1, shapes.page_size
    decoding = [RowPlan("", -1, slot, context - 1, (), 0, (), None) for slot in range(rows)]
    writes: list[PageTableWrite] = []
    first = 0
    for slot, length in [*((row.slot, context) for row in decoding), *([(rows, start + tokens)] if tokens else [])]:
        count = -(-length // size)
        pages = [1 + (first + index) % usable for index in range(count)]
        for group in range(shapes.num_groups):
            writes += table_writes(group, slot % shapes.num_slots, pages)
        first += count
    chunks: tuple[RowPlan, ...] = ()
    samples = [(row, row, context, False, 0) for row in range(rows)]
    if tokens:
        slot = rows % shapes.num_slots
        chunks = (RowPlan("", -1, slot, start, (0,) * tokens, 0, (), None),)
        samples.append((rows + tokens - 1, slot, start + tokens, False, 0))
    return StepPlan(
        step=-1,
        decodes=DecodeRows.of(decoding, size) if decoding else NO_DECODES,
        chunks=chunks,
        samples=Samples.of(samples),
        token_bucket=bucket,
        row_bucket=shapes.buckets.row_bucket(len(samples)),
        num_tokens=rows + tokens,
        table_writes=tuple(writes),
    )


def _seconds(call: Callable[[], None]) -> float:
    """Returns the median seconds of a few calls."""
    found: list[float] = []
    while len(found) < _MOST_REPEATS and sum(found) < _REPEAT_SECONDS:
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return sorted(found)[len(found) // 2]
