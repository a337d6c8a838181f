"""Checks the accounts of a page pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence, Sized
from typing import Protocol

from jaxserve.kv_cache.deferred_keys import DeferredRun, marked

NULL_PAGE = 0
"""Page 0 is never allocated: padding reads and writes it."""


class _Pages(Container[int], Sized, Protocol):
    """A set of pages."""


def check_pages(
    tables: Iterable[Sequence[int]],
    references: Sequence[int],
    free: Sequence[int],
    cached: _Pages,
    keys: Sequence[bytes | DeferredRun | None],
    page_of_key: Mapping[bytes, int],
    deferred: Mapping[bytes, DeferredRun],
) -> None:
    """Raises AssertionError unless every device page is free, cached or in as many tables as it has references.

    Args:
        tables: of all sequences.
        references: of each page, the null page included.
        free: pages without content.
        cached: pages that no table holds, whose content can be found.
        keys: of each page the content key, the run that it belongs to while it has none, or None.
        page_of_key: the page that is found by a key.
        deferred: runs by the key of the page in front of each.
    """
    held = count_references(tables, "table")
    expect(NULL_PAGE not in held, f"page {NULL_PAGE} is the null page, but {held[NULL_PAGE]} tables hold it")
    lists_of = Counter(free)
    for page, kept in enumerate(references):
        counted = held.pop(page, 0)
        expect(counted == kept, f"page {page} is in {counted} tables, but has {kept} references")
        lists = (kept > 0) + lists_of[page] + (page in cached)
        wanted = 0 if page == NULL_PAGE else 1
        expect(lists == wanted, f"page {page} is {lists} times active, free or cached, not {wanted}")
        key = keys[page]
        expect(key is None or not lists_of[page], f"page {page} is free, but has a content key")
        if isinstance(key, DeferredRun):
            expect(page in key.pages, f"page {page} is not in its run")
            continue
        found = None if key is None else page_of_key.get(key)
        expect(page not in cached or found == page, f"page {page} is cached, but its key finds {found}")
    expect(not held, f"pages {sorted(held)} are in tables, but the pool ends at {len(references) - 1}")
    for key, page in page_of_key.items():
        expect(keys[page] == key, f"page {page} is found by key {key.hex()}, but has another")
    for key, run in deferred.items():
        expect(key in page_of_key, f"a run is behind key {key.hex()}, which finds no page")
        there = marked(run, keys)
        expect(all(keys[page] is run for page in run.pages[:there]), f"run {run.pages} lacks a page in its midst")
    total = len(free) + sum(count > 0 for count in references) + len(cached)
    expect(total == len(references) - 1, f"free + used + cached pages are {total}, not {len(references) - 1}")


def count_references(tables: Iterable[Sequence[int]], name: str) -> Counter[int]:
    """Returns in how many tables each page is. name: of a table, in the text of an error."""
    held: Counter[int] = Counter()
    for table in tables:
        expect(len(set(table)) == len(table), f"{name} {list(table)} holds a page twice")
        held.update(table)
    return held


def expect(holds: bool, message: str) -> None:
    """Raises AssertionError with a message unless `holds`."""
    # Not an `assert` statement: an integrity check must not vanish under `python -O`.
    if not holds:
        raise AssertionError(message)
