"""Allocates pages to sequences on admission, growth and swapping, and releases them at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as List

from jaxserve.config.failpoints import Hit, InjectedFaultError
from jaxserve.config.scheduling import AdmissionConfig
from jaxserve.kv_cache.page_pool import PageCopy, PagePool, PageState
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

    max_model_len: tokens that page_reservation "max_model_len" holds pages for; otherwise not needed.
    """

    def __init__(self, pool: PagePool, config: AdmissionConfig, max_model_len: int | None):
        if config.page_reservation == "max_model_len" and max_model_len is None:
            raise ValueError("page_reservation is 'max_model_len'; it needs the max_model_len of the engine")
        self._pool = pool
        self._reservation = config.page_reservation
        self._max_model_len = max_model_len
        self._watermark = math.ceil(config.watermark * pool.num_usable)

    @property
    def reserves(self) -> bool:
        """Tells whether sequences hold pages ahead of their tokens."""
        return self._reservation != "none"

    def admit(self, sequence: Sequence, count: int, alone: bool, found: List[int] = ()) -> tuple[PageCopy, ...] | None:
        """Allocates the pages that a new sequence needs, and those reserved for it; all or nothing.

        Args:
            sequence: a sequence without pages. Its computed tokens, if any, are in pages that samples of the same
                prompt hold, or that the prompt keeps: it shares the former, and takes over the latter. One that must
                score its prompt computes it again.
            count: number of further tokens to hold.
            alone: no other sequence runs, so no pages need to be left for growth.
            found: pages that the prefix cache found for its computed tokens, which it shares.

        Returns:
            The copies to perform; None, and nothing changes, when too few pages are available.
        """
        needed, reserved = self._needed(sequence, count)
        prompt, left = None if sequence.must_score else sequence.prompt, 0 if alone else self._watermark
        there = len(found) if prompt is None or not prompt.held else self._ready(prompt)
        if needed - there + reserved + left + self._pool.num_unreferenced(found) > self._pool.num_available:
            return None
        copies = () if prompt is None or not prompt.held else self._take_prompt(sequence, prompt)
        if found:
            self._pool.share(found)
            sequence.pages.extend(found)
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
        needed, reserved = self._needed(sequence, 0)
        if needed - full + reserved + self._watermark > self._pool.num_available:
            return None
        self._share(sequence, donor, full)
        self._take(sequence, needed - full, reserved)
        return (_on_device(donor.pages[full], sequence.pages[full]),) if partial else ()

    def missing(self, sequence: Sequence, count: int) -> int:
        """Returns the number of pages that a running sequence must allocate for `count` more tokens."""
        return max(0, self._needed(sequence, count)[0] - len(sequence.pages) - len(sequence.reserved))

    def fit(self, sequence: Sequence, count: int, spare: int) -> bool:
        """Tells whether a swapped sequence and `count` more tokens fit the free pages, less `spare` of them."""
        needed, reserved = self._needed(sequence, count)
        needed = max(needed, len(sequence.host_pages))  # guesses that did not hold may have filled the last one
        return needed + reserved + spare <= self._pool.num_available

    def swap_in(self, sequence: Sequence) -> tuple[PageCopy, ...]:
        """Allocates the pages of a swapped sequence that fits, and those reserved for it; returns the copies to
        perform."""
        _, reserved = self._needed(sequence, 0)
        copies = self._pool.move(sequence.host_pages, PageState.ACTIVE)
        assert copies is not None, "pages that fit are not there"
        sequence.host_pages = []
        sequence.pages = [copy.destination for copy in copies]
        self._take(sequence, 0, reserved)
        return copies

    def swap_out(self, sequence: Sequence) -> tuple[PageCopy, ...] | None:
        """Moves the pages of computed tokens to host memory and releases the others.

        Returns:
            The copies to perform; None, and nothing changes, when host memory has no room.
        """
        held = -(-sequence.num_computed // self._pool.page_size)
        copies = self._pool.move(sequence.pages[:held], PageState.HOST)
        if copies is None:
            return None
        self._pool.release([*sequence.pages[held:], *sequence.reserved])
        sequence.pages, sequence.reserved = [], []
        sequence.host_pages = [copy.destination for copy in copies]
        return copies

    def grow(self, sequence: Sequence, count: int) -> bool:
        """Allocates the pages that `count` more tokens need beyond those held; all or nothing."""
        needed = -(-(sequence.num_computed + count) // self._pool.page_size) - len(sequence.pages)
        if needed <= 0:
            return True
        held = len(sequence.reserved)
        if needed > held:
            pages = self._pool.allocate(needed - held)
            if pages is None:
                return False
            sequence.reserved.extend(pages)
        sequence.pages.extend(sequence.reserved[:needed])
        del sequence.reserved[:needed]
        return True

    def one_each(self, sequences: list[Sequence]) -> list[int] | None:
        """Allocates a page for each sequence at once; returns None, and changes nothing, when some hold reserved pages
        or too few are free."""
        return None if self.reserves else self._pool.allocate(len(sequences))

    def one(self, sequence: Sequence) -> int | None:
        """Allocates a page for a sequence; returns None when there is none."""
        if sequence.reserved:
            return sequence.reserved.pop(0)
        pages = self._pool.allocate(1)
        return None if pages is None else pages[0]

    def give_back(self, sequence: Sequence, held: int) -> None:
        """Releases all pages of the table but the first `held`; reserved pages stay reserved."""
        if self.reserves:
            sequence.reserved[:0] = sequence.pages[held:]
        else:
            self._pool.release(sequence.pages[held:])
        del sequence.pages[held:]

    def release(self, sequence: Sequence) -> None:
        """Releases all pages that a sequence holds, on device and host.

        A step in flight may still write to them. That is safe: whatever is computed for their next owner is dispatched
        after it.
        """
        if sequence.host_pages:
            self._pool.release_host(sequence.host_pages)
        self._pool.release([*sequence.pages, *sequence.reserved])
        sequence.pages, sequence.reserved, sequence.host_pages = [], [], []
        sequence.num_committed = 0

    def _needed(self, sequence: Sequence, count: int) -> tuple[int, int]:
        """Returns the number of pages for the computed tokens and `count` more, and of the reserved pages beyond
        them."""
        needed = -(-(sequence.num_computed + count) // self._pool.page_size)
        tokens = {
            "none": 0,
            "max_tokens": sequence.last_position,
            "max_model_len": max(self._max_model_len or 0, sequence.last_position),
        }[self._reservation]
        total = min(-(-tokens // self._pool.page_size), self._pool.num_usable)
        return needed, max(0, total - needed)

    def _ready(self, prompt: SharedPrompt) -> int:
        """Returns the number of pages that a sample of a held prompt need not allocate: the one with the prompt's last
        token must be copied where another request has found it in the prefix cache, filled and committed."""
        return prompt.num_ready_pages - (bool(prompt.kept) and self._pool.references(prompt.kept[-1]) > 1)

    def _take_prompt(self, sequence: Sequence, prompt: SharedPrompt) -> tuple[PageCopy, ...]:
        """Gives a sample the pages of its prompt, up to the one with its last token, which it will write: that one is
        its own, and a copy where it has other tokens too. Returns the copies to perform."""
        copies: tuple[PageCopy, ...] = ()
        if prompt.kept:
            sequence.pages, prompt.kept = prompt.kept, []
            self._pool.uncommit(last := sequence.pages[-1])
            if not self._pool.writable(last):
                copy = self._pool.copy(last)
                assert copy is not None, "pages that fit are not there"
                sequence.pages[-1] = copy.destination
                copies = (copy,)
        else:
            donor = next(iter(prompt.holders.values()))
            self._share(sequence, donor, prompt.num_shared)
            if (prompt.num_tokens - 1) % self._pool.page_size:
                self._take(sequence, 1, 0)
                copies = (_on_device(donor.pages[prompt.num_shared], sequence.pages[prompt.num_shared]),)
        prompt.holders[sequence.request_id] = sequence
        return copies

    def _share(self, sequence: Sequence, donor: Sequence, count: int) -> None:
        """Enters the first `count` pages of a donor into the empty table of a sequence."""
        shared = donor.pages[:count]
        self._pool.share(shared)
        sequence.pages.extend(shared)

    def _take(self, sequence: Sequence, needed: int, reserved: int) -> None:
        pages = self._pool.allocate(needed + reserved)
        assert pages is not None, "pages that fit are not there"
        sequence.pages.extend(pages[:needed])
        sequence.reserved.extend(pages[needed:])


def _on_device(source: int, destination: int) -> PageCopy:
    return PageCopy(source, PageState.ACTIVE, destination, PageState.ACTIVE)


class FaultyPages(Pages):
    """Raises PageAllocationError for sequences at which a failpoint "allocate" acts. hit: passes that point."""

    def __init__(self, pool: PagePool, config: AdmissionConfig, max_model_len: int | None, hit: Hit):
        super().__init__(pool, config, max_model_len)
        self._hit = hit

    def admit(self, sequence: Sequence, count: int, alone: bool, found: List[int] = ()) -> tuple[PageCopy, ...] | None:
        self._pass([sequence])
        return super().admit(sequence, count, alone, found)

    def fork(self, sequence: Sequence, donor: Sequence) -> tuple[PageCopy, ...] | None:
        self._pass([sequence])
        return super().fork(sequence, donor)

    def grow(self, sequence: Sequence, count: int) -> bool:
        if self.missing(sequence, count):
            self._pass([sequence])
        return super().grow(sequence, count)

    def one_each(self, sequences: list[Sequence]) -> list[int] | None:
        self._pass(sequences)
        return super().one_each(sequences)

    def _pass(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            try:
                self._hit((sequence.request_id,))
            except InjectedFaultError as error:
                raise PageAllocationError(sequence.request_id, str(error)) from error
