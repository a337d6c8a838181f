"""Allocates pages to sequences on admission, growth and swapping, and releases them at the end.

A sequence has a page table for each group of layers, and all its tables gain entries together. A page that the window
of its group has left is released, and its entry becomes the null page.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from collections.abc import Sequence as List
from typing import Any

from jaxserve.config.failpoints import Hit, InjectedFaultError
from jaxserve.config.scheduling import AdmissionConfig
from jaxserve.kv_cache.page_groups import PageGroups
from jaxserve.kv_cache.page_pool import PageCopy, PagePool, PageState
from jaxserve.kv_cache.pool_checks import NULL_PAGE
from jaxserve.scheduler.found_pages import FoundPages
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.shared_prompt import SharedPrompt


class PageAllocationError(RuntimeError):
    """Signals that one sequence's pages could not be allocated, for a reason other than their number.

    Nothing was allocated to it. request_id: its request.
    """

    def __init__(self, request_id: str, reason: str):
        super().__init__(reason)
        self.request_id = request_id


class Pages:
    """Manages which sequence holds which pages of the pool.

    groups: of layers. max_model_len: tokens that page_reservation "max_model_len" holds pages for; otherwise not
    needed. tokens_per_step: as in `Scheduler`; of a row with more than one it is not known which are accepted.
    """

    def __init__(
        self,
        pool: PagePool,
        config: AdmissionConfig,
        groups: PageGroups,
        max_model_len: int | None,
        tokens_per_step: int = 1,
    ):
        if config.page_reservation == "max_model_len" and max_model_len is None:
            raise ValueError("page_reservation is 'max_model_len'; it needs the max_model_len of the engine")
        self._pool = pool
        self.groups = groups
        self._unsure = 0 if tokens_per_step == 1 else 2 * tokens_per_step
        self._reservation = config.page_reservation
        self._max_model_len = max_model_len
        self._watermark = math.ceil(config.watermark * pool.num_usable)

    @property
    def reserves(self) -> bool:
        """Tells whether sequences hold pages ahead of their tokens."""
        return self._reservation != "none"

    def open(self, sequence: Sequence) -> None:
        """Gives a sequence its page tables, which are empty."""
        sequence.pages, sequence.more_pages = [], [[] for _ in range(1, self.groups.count)]
        sequence.left = [0] * self.groups.count

    def admit(
        self, sequence: Sequence, count: int, alone: bool, found: FoundPages | None = None
    ) -> tuple[PageCopy, ...] | None:
        """Allocates the pages that a new sequence needs, and those reserved for it; all or nothing.

        Args:
            sequence: a sequence without pages. Its computed tokens, if any, are in pages that samples of the same
                prompt hold, or that the prompt keeps: it shares the former, and takes over the latter. One that must
                score its prompt computes it again.
            count: number of further tokens to hold.
            alone: no other sequence runs, so no pages need to be left for growth.
            found: pages that the prefix cache found for its computed tokens, which it shares; None where it looked for
                none.

        Returns:
            The copies to perform, of pages of host memory that were found among them; None, and nothing changes, when
            too few pages are available.
        """
        prompt, spare = None if sequence.must_score else sequence.prompt, 0 if alone else self._watermark
        shares = prompt is not None and prompt.held
        there, left, live, to_copy = 0, sequence.left, [], 0
        if prompt is not None and shares:
            there, left, to_copy = prompt.num_ready_entries, prompt.left, self._to_copy(prompt)
        elif found is not None:
            there, left, live, to_copy = len(found), found.left, found.live, len(found.host)
        needed, reserved = self._needed(sequence, count, left)
        pages = (needed - there) * self.groups.count + reserved + to_copy + self._pool.num_unreferenced(live)
        if pages + spare > self._pool.num_available:
            return None
        copies: tuple[PageCopy, ...] = ()
        if prompt is not None and shares:
            copies = self._take_prompt(sequence, prompt)
            copies = (*self._pool.take_copies(), *copies)  # what was in the pages that it writes is copied first
        if found is not None:
            self._pool.share(live)
            fetched = self._pool.fetch(found.host) if found.host else ()
            assert fetched is not None, "pages that fit are not there"
            self._enter(sequence, found.arrived([copy.destination for copy in fetched]), found.left)
            copies = (*self._pool.take_copies(), *fetched)
        self._take(sequence, needed - len(sequence.pages), reserved)
        return copies

    def fork(self, sequence: Sequence, donor: Sequence) -> tuple[PageCopy, ...] | None:
        """Gives a sample, all of whose prompt counts as computed, the pages of one that has computed it: the full ones
        are shared, a partial last one is its own.

        Returns:
            The copies to perform once the prompt is in the donor's pages; None, and nothing changes, when too few pages
            are available.
        """
        full, partial = divmod(sequence.num_prompt_tokens, self._pool.page_size)
        assert sequence.prompt is not None
        left = sequence.prompt.needed  # so that it is another holder of the prompt
        needed, reserved = self._needed(sequence, 0, left)
        if (needed - full) * self.groups.count + reserved + self._watermark > self._pool.num_available:
            return None
        self._share(sequence, donor, full, left)
        self._take(sequence, needed - full, reserved)
        return self._copies(donor, sequence, full) if partial else ()

    def missing(self, sequence: Sequence, count: int) -> int:
        """Returns the number of pages that a running sequence must allocate for `count` more tokens."""
        entries = self._entries(sequence, count) - len(sequence.pages)
        return max(0, entries * self.groups.count - len(sequence.reserved))

    def fit(self, sequence: Sequence, count: int, spare: int) -> bool:
        """Tells whether a swapped sequence and `count` more tokens fit the free pages, less `spare` of them."""
        needed, reserved = self._needed(sequence, count, sequence.left)
        needed = max(needed, sequence.num_entries)  # guesses that did not hold may have filled the last one
        pages = needed * self.groups.count - sum(sequence.left)
        return pages + reserved + spare <= self._pool.num_available

    def swap_in(self, sequence: Sequence) -> tuple[PageCopy, ...]:
        """Allocates the pages of a swapped sequence that fits, and those reserved for it; returns the copies to
        perform."""
        _, reserved = self._needed(sequence, 0, sequence.left)
        entries, host, copies = sequence.num_entries, iter(sequence.host_pages), ()
        for group, (table, left) in enumerate(zip(sequence.tables, sequence.left, strict=True)):
            moved = self._pool.move(list(itertools.islice(host, entries - left)), PageState.ACTIVE, left)
            assert moved is not None, "pages that fit are not there"
            table += [NULL_PAGE] * left + [copy.destination for copy in moved]
            copies += (*self._pool.take_copies(), *_of_group(moved, group))
        sequence.host_pages = []
        self._take(sequence, 0, reserved)
        return copies

    def swap_out(self, sequence: Sequence) -> tuple[PageCopy, ...] | None:
        """Moves the pages of computed tokens to host memory and releases the others.

        Returns:
            The copies to perform; None, and nothing changes, when host memory has no room.
        """
        held = -(-sequence.num_computed // self._pool.page_size)
        tables = [table[left:held] for table, left in zip(sequence.tables, sequence.left, strict=True)]
        copies = self._pool.move([page for table in tables for page in table], PageState.HOST)
        if copies is None:
            return None
        self._pool.release([*_by_entry(sequence, held), *sequence.reserved])
        for table in sequence.tables:
            table.clear()
        sequence.reserved = []
        sequence.host_pages = [copy.destination for copy in copies]
        place, named = 0, tuple(self._pool.take_copies())
        for group, table in enumerate(tables):
            named += _of_group(copies[place : place + len(table)], group)
            place += len(table)
        return named

    def grow(self, sequence: Sequence, count: int) -> bool:
        """Allocates the pages that `count` more tokens need beyond those held; all or nothing."""
        entries = self._entries(sequence, count) - len(sequence.pages)
        if entries <= 0:
            return True
        pages = self._pages(sequence, entries)
        if pages is None:
            return False
        self._extend(sequence, pages)
        return True

    def trims(self, sequence: Sequence, position: int) -> bool:
        """Tells whether windows have left pages of a running sequence that computes its token at `position` next."""
        left = self.groups.left(max(0, position - self._unsure))
        return any(now > before for now, before in zip(left, sequence.left, strict=True))

    def trim(self, sequence: Sequence, position: int) -> None:
        """Releases the pages of a running sequence that windows have left.

        A step in flight may still read them. That is safe: whatever is computed for their next owner is dispatched
        after it. Where pages are reserved, the sequence keeps as many as it may hold later.

        Args:
            sequence: the sequence. Its full pages are committed, so that the prefix cache keeps what it released.
            position: of the token that it computes next.
        """
        changed = False
        for group, left in enumerate(self.groups.left(max(0, position - self._unsure))):
            table, before = sequence.tables[group], sequence.left[group]
            if left > before:
                self._pool.release(table[before:left])
                table[before:left] = [NULL_PAGE] * (left - before)
                sequence.left[group] = left
                changed = True
        if changed and self.reserves:
            missing = self._reserved(sequence, len(sequence.pages), sequence.left) - len(sequence.reserved)
            if missing > 0:  # a page that others share too gives none back
                sequence.reserved.extend(self._pool.allocate(min(missing, self._pool.num_available)) or ())

    def start_step(self) -> None:
        """Begins a step, in which a bounded number of reclaimed pages is copied to host memory."""
        self._pool.start_step()

    def take_copies(self) -> list[PageCopy]:
        """Returns the copies of pages that were reclaimed and that no other call has returned."""
        return self._pool.take_copies()

    def one_each(self, sequences: list[Sequence]) -> Iterable[List[int]] | None:
        """Allocates a page of each group for each sequence at once; returns None, and changes nothing, when some hold
        reserved pages or too few are free."""
        pages = None if self.reserves else self._pool.allocate(len(sequences) * self.groups.count)
        return None if pages is None else zip(*[iter(pages)] * self.groups.count, strict=True)

    def one(self, sequence: Sequence) -> list[int] | None:
        """Allocates a page of each group for a sequence; returns None when there are too few."""
        return self._pages(sequence, 1)

    def give_back(self, sequence: Sequence, held: int) -> None:
        """Releases all pages of the tables but the first `held`; reserved pages stay reserved."""
        pages = _by_entry(sequence, held)
        if self.reserves:
            sequence.reserved[:0] = pages
        else:
            self._pool.release(pages)
        for table in sequence.tables:
            del table[held:]

    def release(self, sequence: Sequence) -> None:
        """Releases all pages that a sequence holds, on device and host.

        A step in flight may still write to them. That is safe: whatever is computed for their next owner is dispatched
        after it.
        """
        if sequence.host_pages:
            self._pool.release_host(sequence.host_pages)
        self._pool.release([*_by_entry(sequence), *sequence.reserved], sequence.deferred)
        sequence.reserved, sequence.host_pages = [], []
        self.open(sequence)
        sequence.num_committed, sequence.deferred = 0, None

    def _entries(self, sequence: Sequence, count: int) -> int:
        """Returns the number of entries of each page table for the computed tokens and `count` more."""
        return -(-(sequence.num_computed + count) // self._pool.page_size)

    def _needed(self, sequence: Sequence, count: int, left: List[int]) -> tuple[int, int]:
        """Returns the number of entries of each page table for the computed tokens and `count` more, and of the
        reserved pages beyond them; `left` entries of each table hold no page."""
        entries = self._entries(sequence, count)
        return entries, self._reserved(sequence, entries, left)

    def _reserved(self, sequence: Sequence, entries: int, left: List[int]) -> int:
        """Returns the number of pages reserved beside tables of so many entries, of which `left` hold no page."""
        if self._reservation == "none":
            return 0
        tokens = {
            "max_tokens": sequence.last_position,
            "max_model_len": max(self._max_model_len or 0, sequence.last_position),
        }[self._reservation]
        total = min(-(-tokens // self._pool.page_size), self._pool.num_usable)
        reserved = 0
        for most, gone in zip(self.groups.most(tokens), left, strict=True):
            reserved += max(0, min(total - gone, most) - (entries - gone))
        return max(0, min(reserved, self._pool.num_usable - entries * self.groups.count + sum(left)))

    def _to_copy(self, prompt: SharedPrompt) -> int:
        """Returns the number of pages with the last token of a held prompt that a sample must copy, although the prompt
        keeps them: another request has found them in the prefix cache, filled and committed."""
        return sum(self._pool.references(table[-1]) > 1 for table in prompt.kept)

    def _take_prompt(self, sequence: Sequence, prompt: SharedPrompt) -> tuple[PageCopy, ...]:
        """Gives a sample the pages of its prompt, up to the one with its last token, which it will write: that one is
        its own, and a copy where it has other tokens too. Returns the copies to perform."""
        copies: tuple[PageCopy, ...] = ()
        if prompt.kept:
            self._enter(sequence, prompt.kept, prompt.kept_left)
            prompt.kept = []
            for group, table in enumerate(sequence.tables):
                self._pool.uncommit(last := table[-1])
                if not self._pool.writable(last):
                    copy = self._pool.copy(last)
                    assert copy is not None, "pages that fit are not there"
                    table[-1] = copy.destination
                    copies += _of_group((copy,), group)
        else:
            donor = next(iter(prompt.holders.values()))
            self._share(sequence, donor, prompt.num_shared, prompt.needed)
            if (prompt.num_tokens - 1) % self._pool.page_size:
                self._take(sequence, 1, 0)
                copies = self._copies(donor, sequence, prompt.num_shared)
        prompt.holders[sequence.request_id] = sequence
        return copies

    def _share(self, sequence: Sequence, donor: Sequence, count: int, left: List[int]) -> None:
        """Enters the first `count` entries of a donor's tables into the empty ones of a sequence, without the `left`
        first pages of each."""
        tables = [[NULL_PAGE] * gone + table[gone:count] for table, gone in zip(donor.tables, left, strict=True)]
        self._pool.share([page for table, gone in zip(tables, left, strict=True) for page in table[gone:]])
        self._enter(sequence, tables, left)

    def _enter(self, sequence: Sequence, tables: List[List[int]], left: List[int]) -> None:
        """Makes these the entries of a sequence's tables, which are empty."""
        for table, entries in zip(sequence.tables, tables, strict=True):
            table.extend(entries)
        sequence.left = list(left)

    def _copies(self, donor: Sequence, sequence: Sequence, index: int) -> tuple[PageCopy, ...]:
        """Returns the copies of the pages of one entry from a donor's tables to a sequence's."""
        pages = zip(donor.tables, sequence.tables, strict=True)
        return tuple(
            [
                PageCopy(source[index], PageState.ACTIVE, target[index], PageState.ACTIVE, group)
                for group, (source, target) in enumerate(pages)
            ]
        )

    def _pages(self, sequence: Sequence, entries: int) -> list[int] | None:
        """Takes the pages of so many entries of all tables, reserved ones first; returns None, and takes none, when
        there are too few."""
        needed, held = entries * self.groups.count, sequence.reserved
        if needed > len(held):
            pages = self._pool.allocate(needed - len(held))
            if pages is None:
                return None
            held.extend(pages)
        pages = held[:needed]
        del held[:needed]
        return pages

    def _extend(self, sequence: Sequence, pages: list[int]) -> None:
        """Appends pages, entry by entry and group by group, to a sequence's tables."""
        count = self.groups.count
        for group, table in enumerate(sequence.tables):
            table.extend(pages[group::count])

    def _take(self, sequence: Sequence, entries: int, reserved: int) -> None:
        needed = entries * self.groups.count
        pages = self._pool.allocate(needed + reserved)
        assert pages is not None, "pages that fit are not there"
        self._extend(sequence, pages[:needed])
        sequence.reserved.extend(pages[needed:])


def _by_entry(sequence: Sequence, begin: int = 0) -> list[int]:
    """Returns the pages of all tables from entry `begin` on, entry by entry, so that the last entries are released
    first."""
    if not sequence.more_pages:
        return sequence.pages[max(begin, sequence.left[0]) :]
    tables, left = sequence.tables, sequence.left
    return [
        table[entry]
        for entry in range(begin, len(sequence.pages))
        for table, gone in zip(tables, left, strict=True)
        if entry >= gone
    ]


def _of_group(copies: tuple[PageCopy, ...], group: int) -> tuple[PageCopy, ...]:
    return tuple([dataclasses.replace(copy, group=group) for copy in copies]) if group else copies


class FaultyPages(Pages):
    """Raises PageAllocationError for sequences at which a failpoint "allocate" acts. hit: passes that point. others: as
    `Pages` takes them."""

    def __init__(self, hit: Hit, *others: Any):
        super().__init__(*others)
        self._hit = hit

    def admit(
        self, sequence: Sequence, count: int, alone: bool, found: FoundPages | None = None
    ) -> tuple[PageCopy, ...] | None:
        self._pass([sequence])
        return super().admit(sequence, count, alone, found)

    def fork(self, sequence: Sequence, donor: Sequence) -> tuple[PageCopy, ...] | None:
        self._pass([sequence])
        return super().fork(sequence, donor)

    def grow(self, sequence: Sequence, count: int) -> bool:
        if self.missing(sequence, count):
            self._pass([sequence])
        return super().grow(sequence, count)

    def one_each(self, sequences: list[Sequence]) -> Iterable[List[int]] | None:
        self._pass(sequences)
        return super().one_each(sequences)

    def _pass(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            try:
                self._hit((sequence.request_id,))
            except InjectedFaultError as error:
                raise PageAllocationError(sequence.request_id, str(error)) from error
