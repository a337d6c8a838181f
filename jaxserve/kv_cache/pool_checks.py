"""Checks the accounts of a page pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence, Sized
from typing import Protocol

from jaxserve.kv_cache.deferred_keys import DeferredRun

NULL_PAGE = 0
"""Page 0 is never allocated: padding reads and writes it."""


class _Pages(Container[int], Sized, Protocol):
    """A set of pages."""


def check_pages(
    tables: Iterable[Sequence[int]],
    references: Sequence[int],
    free: Sequence[int],
    cached: _Pages,
    keys: Sequence[bytes | None],
    page_of_key: Mapping[bytes, int],
    deferred: Collection[int] = (),
) -> None:
    """Raises AssertionError unless every device page is free, cached or in as many tables as it has references.

    Args:
        tables: of all sequences.
        references: of each page, the null page included.
        free: pages without content.
        cached: pages that no table holds, whose content can be found.
        keys: of each page the content key, or None.
        page_of_key: the page that is found by a key.
        deferred: cached pages without keys, each of which has a reference that no table holds.
    """
    held = count_references(tables, "table")
    expect(NULL_PAGE not in held, f"page {NULL_PAGE} is the null page, but {held[NULL_PAGE]} tables hold it")
    lists_of = Counter(free)
    for page, kept in enumerate(references):
        counted, unowned = held.pop(page, 0), page in deferred
        kept -= unowned
        expect(counted == kept, f"page {page} is in {counted} tables, but has {kept} references")
        lists = (kept > 0) + lists_of[page] + (page in cached)
        wanted = 0 if page == NULL_PAGE else 1
        expect(lists == wanted, f"page {page} is {lists} times active, free or cached, not {wanted}")
        key = keys[page]
        expect(key is None or not lists_of[page], f"page {page} is free, but has a content key")
        found = None if key is None else page_of_key.get(key)
        expect(page not in cached or unowned or found == page, f"page {page} is cached, but its key finds {found}")
    expect(not held, f"pages {sorted(held)} are in tables, but the pool ends at {len(references) - 1}")
    for key, page in page_of_key.items():
        expect(keys[page] == key, f"page {page} is found by key {key.hex()}, but has another")
    total = len(free) + sum(count > 0 for count in references) - len(deferred) + len(cached)
    expect(total == len(references) - 1, f"free + used + cached pages are {total}, not {len(references) - 1}")


def check_runs(
    deferred: Mapping[bytes, DeferredRun],
    cached: Iterable[DeferredRun],
    references: Sequence[int],
    keys: Sequence[bytes | None],
    page_of_key: Mapping[bytes, int],
) -> None:
    """Raises AssertionError unless the pages of every run have one owner and no key, and can be found.

    Args:
        deferred: runs by the key of the page in front of each.
        cached: runs that own pages.
        references, keys, page_of_key: as for `check_pages`, with a reference for each page that a run owns.
    """
    for key, run in deferred.items():
        expect(key in page_of_key, f"a run is behind key {key.hex()}, which finds no page")
        expect(run.keys[run.first - 1] == key, f"a run that begins at page {run.first} is listed behind another")
    cached = list(cached)
    for run in cached:
        listed = not run.pages or deferred.get(run.keys[run.first - 1]) is run
        expect(listed, f"cached pages {run.pages} have no keys, and no key leads to them")
    for run in (*deferred.values(), *cached):
        for page in run.pages:
            expect(references[page] == 1, f"page {page} of a run has {references[page]} references, not 1")
            expect(keys[page] is None, f"page {page} of a run has a key")


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
