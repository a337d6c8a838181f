"""Describes what the prefix cache found for a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as List

from jaxserve.scheduler.host_fetches import FetchChoice


def on_host(page: int) -> int:
    """Returns the entry of a page table that stands for a page of host memory, until it is back: a negative number."""
    return -1 - page


ON_DISK = -(2**62)
"""The entry of a page table that stands for a page on disk."""


@dataclasses.dataclass(frozen=True, eq=False)
class FoundPages:
    """Holds the first entries of a sequence's page tables, whose content is computed.

    tables: of each group, as `Sequence.tables`; an entry below 0 is a page of host memory (`on_host`). left: as
    `Sequence.left`. choice: whether pages of host memory are brought back, where there was a choice.
    """

    tables: List[List[int]]
    left: List[int]
    choice: FetchChoice | None = None

    def __len__(self) -> int:
        return len(self.tables[0])

    @property
    def live(self) -> list[int]:
        """Returns the device pages of all tables."""
        pairs = zip(self.tables, self.left, strict=True)
        return [page for table, left in pairs for page in table[left:] if page > 0]

    @property
    def host(self) -> list[int]:
        """Returns the pages of host memory, table by table."""
        return [on_host(page) for table in self.tables for page in table if page < 0]

    def arrived(self, pages: List[int]) -> list[list[int]]:
        """Returns the tables with the device pages that those of host memory are copied to, in the order of `host`."""
        if not pages:
            return [list(table) for table in self.tables]
        targets = iter(pages)
        return [[next(targets) if page < 0 else page for page in table] for table in self.tables]
