"""Replays what a trace's prompts share through a prefix cache alone: no engine, no clock, a few seconds for an hour.

    bound = infinite_cache(trace, page_size=64)                       what a cache without end would find
    found = replay_cache(trace, PagePool(num_pages, page_size=64))    what a pool finds, with its own eviction

Requests come one after another in the trace's order. Each takes the pages that it finds, allocates the rest of its
prompt and its answer, commits them and, when `in_flight` others have come, releases them.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable

import numpy as np

from jaxserve.config.checks import at_least
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.simulator.prompt_content import Content, answer_content, pages_of
from jaxserve.simulator.traces import Trace

KEY_BYTES = 8


@dataclasses.dataclass(frozen=True)
class CacheFigures:
    """Counts of a replay.

    Attributes:
        page_size: tokens of a page.
        pool_tokens: tokens that the pool holds; None for a cache without end.
        prompt_tokens: of all prompts.
        hit_tokens: of these, in pages that were found.
        hits: requests that found a page.
        host_tokens: tokens that host memory holds.
        host_hit_tokens: of those found, in pages that came back from there.
        skipped: requests that do not fit the pool, which find nothing.
        prompt_seconds: to compute all full pages of all prompts; 0 where no costs are given.
        hit_seconds: of these, for pages that were found.
    """

    page_size: int
    pool_tokens: int | None
    requests: int
    prompt_tokens: int
    hit_tokens: int
    hits: int
    host_tokens: int = 0
    host_hit_tokens: int = 0
    skipped: int = 0
    prompt_seconds: float = 0.0
    hit_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that were found."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def saved(self) -> float:
        """Share of the prompts' seconds that were saved; 0 where no costs are given."""
        return self.hit_seconds / self.prompt_seconds if self.prompt_seconds else 0.0


@dataclasses.dataclass(frozen=True)
class BlockBound:
    """Blocks of a trace's prompts (runs of one content, a partial last one included), and those that a cache without
    end finds: a prefix of each prompt, all of it before. tokens, hit_tokens: of these blocks."""

    blocks: int
    hit_blocks: int
    tokens: int
    hit_tokens: int


def block_bound(trace: Trace) -> BlockBound:
    """Returns what a cache without end would find of the trace's own blocks, answers not counted.

    This is the bound that is published for traces of block hashes. An engine finds less at a prompt's end, of which it
    computes at least one token, and whole pages only: see `infinite_cache`.
    """
    seen: set[int] = set()
    blocks = hit_blocks = tokens = hit_tokens = 0
    for prompt in trace.prompts:
        key, found = 0, True
        for content_id, count in prompt.runs():
            key = hash((key, content_id, count))
            found = found and key in seen
            seen.add(key)
            blocks, tokens = blocks + 1, tokens + count
            if found:
                hit_blocks, hit_tokens = hit_blocks + 1, hit_tokens + count
    return BlockBound(blocks, hit_blocks, tokens, hit_tokens)


PageSeconds = Callable[[int], float]
"""Returns the seconds that computing a page takes behind so many others of its sequence."""


def infinite_cache(trace: Trace, page_size: int, page_seconds: PageSeconds | None = None) -> CacheFigures:
    """Returns what an engine would find with pages for everything, if each request had ended before the next one came.

    Whole pages of prompts and answers are found, but never the last token of a prompt.
    """
    at_least("page_size", page_size, 1)
    seen: set[int] = set()
    tally = _Tally(trace, page_size, page_seconds)
    for index in range(len(trace)):
        keys = page_keys(trace, index, page_size)
        findable = keys[: _findable(trace, index, page_size)]
        found = next((place for place, key in enumerate(findable) if key not in seen), len(findable))
        tally.found(found)
        seen.update(keys)
    return tally.figures(None)


def replay_cache(
    trace: Trace, pool: PagePool, in_flight: int = 1, page_seconds: PageSeconds | None = None
) -> CacheFigures:
    """Returns what an empty pool finds.

    Args:
        trace: a trace with content.
        pool: changed; all of its pages are free or cached afterwards.
        in_flight: requests that hold their pages at once, as far as the pool has room for them.
        page_seconds: gives the figures in seconds.
    """
    at_least("in_flight", in_flight, 1)
    size = pool.page_size
    held: deque[list[int]] = deque()
    tally, skipped = _Tally(trace, size, page_seconds), 0
    for index in range(len(trace)):
        while len(held) >= in_flight:
            pool.release(held.popleft())
        keys = [key.to_bytes(KEY_BYTES, "little", signed=True) for key in page_keys(trace, index, size)]
        found = _find(pool, keys[: _findable(trace, index, size)])
        pool.share([page for page, on_host in found if not on_host])
        tokens = int(trace.prompt_tokens[index] + trace.output_tokens[index]) - 1
        missing = -(-tokens // size) - len(found)
        back = [page for page, on_host in found if on_host]
        while pool.num_available < missing + len(back) and held:
            pool.release(held.popleft())
        if pool.num_available < missing + len(back):
            pool.release([page for page, on_host in found if not on_host])
            skipped += 1
            continue
        fetched = iter(pool.fetch(back) or ())
        table = [next(fetched).destination if on_host else page for page, on_host in found]
        table += pool.allocate(missing) or ()
        pool.take_copies()  # no device copies anything
        pool.commit(table[len(found) : len(keys)], keys[len(found) :], len(found))
        held.append(table)
        tally.found(len(found), len(back))
    for pages in held:
        pool.release(pages)
    return tally.figures(pool.num_usable * size, skipped, pool.host.num_pages * size)


def _find(pool: PagePool, keys: list[bytes]) -> list[tuple[int, bool]]:
    """Returns the pages of the longest run of keys, and of each whether it is in host memory."""
    found = []
    for key in keys:
        page = pool.page_of(key)
        host = pool.host.page_of(key) if page is None else None
        if page is None and host is None:
            break
        found.append((host, True) if page is None else (page, False))
    return found


class _Tally:
    """Adds up what is found."""

    def __init__(self, trace: Trace, page_size: int, page_seconds: PageSeconds | None):
        self._trace = trace
        self._size = page_size
        most = int(trace.prompt_tokens.max(initial=0)) // page_size
        seconds = [0.0 if page_seconds is None else page_seconds(depth) for depth in range(most)]
        self._seconds = np.concatenate([[0.0], np.cumsum(seconds)])  # of so many pages
        self._tokens = self._host_tokens = self._hits = 0
        self._found_seconds = 0.0

    def found(self, pages: int, on_host: int = 0) -> None:
        """Counts the pages that a request found, and of them those in host memory."""
        self._host_tokens += on_host * self._size
        self._tokens += pages * self._size
        self._hits += pages > 0
        self._found_seconds += float(self._seconds[pages])

    def figures(self, pool_tokens: int | None, skipped: int = 0, host_tokens: int = 0) -> CacheFigures:
        prompts = self._trace.prompt_tokens
        return CacheFigures(
            page_size=self._size,
            pool_tokens=pool_tokens,
            requests=len(self._trace),
            prompt_tokens=int(prompts.sum()),
            hit_tokens=self._tokens,
            hits=self._hits,
            host_tokens=host_tokens,
            host_hit_tokens=self._host_tokens,
            skipped=skipped,
            prompt_seconds=float(self._seconds[prompts // self._size].sum()),
            hit_seconds=self._found_seconds,
        )


def page_keys(trace: Trace, index: int, page_size: int) -> list[int]:
    """Returns a key of 64 bits for each full page of a prompt and its answer (but for the answer's last token, which is
    never computed), equal where the page and all before it are.

    The keys are hashes of content ids instead of token ids, which would take most of a replay's time. Prompts without
    content have none.
    """
    prompt = trace.prompts[index] if trace.prompts else Content()
    if not prompt:
        return []
    answer = answer_content(int(trace.answers[index]), int(trace.output_tokens[index]))
    key = hash(trace.tenants[index]) if trace.tenants[index] else 0
    keys = []
    pages = pages_of(prompt + answer, page_size)
    for page in pages[: (len(prompt) + len(answer) - 1) // page_size]:
        key = hash((key, page))
        keys.append(key)
    return keys


def _findable(trace: Trace, index: int, page_size: int) -> int:
    """Returns how many of its pages a request may find: at least the last token of a prompt is computed."""
    return (int(trace.prompt_tokens[index]) - 1) // page_size
