"""Tracks the samples that are drawn from one prompt, and who has the pages of its keys and values."""

from __future__ import annotations

from collections.abc import Sequence as List

from jaxserve.request import RequestStatus
from jaxserve.scheduler.sequence import Sequence

_LEADING = frozenset({RequestStatus.RUNNING, RequestStatus.PREEMPTED, RequestStatus.SWAPPED})


class SharedPrompt:
    """Represents a prompt and its unfinished samples, by request id and in order of their indices.

    The prompt is held while steps that were dispatched have computed all of it and somebody has the pages: samples that
    run (`holders`), or, where none does, the prompt itself (`kept`). While it is not held, one sample computes it and
    those that have never run are withheld, so that it is computed once.

    num_tokens: of the prompt. num_shared: entries of each page table in front of the one with its last token; nobody
    writes their pages again. needed: the first of them in each table that the last token attends to. kept, kept_left:
    as `Sequence.tables` and `Sequence.left`.
    queued: samples in the waiting queue that have never run. withheld: those that have never run and wait in no queue.
    begun: those that have run. counted: its tokens were added to the engine's total.
    """

    def __init__(self, num_tokens: int, page_size: int, needed: List[int] = (0,)):
        self.needed = needed
        self.num_tokens = num_tokens
        self.num_shared = (num_tokens - 1) // page_size
        self.queued: dict[str, Sequence] = {}
        self.withheld: dict[str, Sequence] = {}
        self.begun: dict[str, Sequence] = {}
        self.holders: dict[str, Sequence] = {}
        self.kept: list[list[int]] = []
        self.kept_left: List[int] = needed
        self.counted = False

    @property
    def held(self) -> bool:
        return bool(self.holders or self.kept)

    @property
    def kept_pages(self) -> list[int]:
        """Returns the pages that the prompt keeps."""
        return [page for table, left in zip(self.kept, self.kept_left, strict=False) for page in table[left:]]

    @property
    def left(self) -> List[int]:
        """Returns the number of entries of each table without a page, for a sample that joins now."""
        return self.kept_left if self.kept else self.needed

    @property
    def num_ready_entries(self) -> int:
        """Returns the number of entries of each page table that a sample which joins now need not allocate pages
        for."""
        if self.kept:
            return len(self.kept[0])
        return self.num_shared if self.holders else 0

    def is_in(self, sequence: Sequence) -> bool:
        """Tells whether no window has left pages of a sequence that the prompt's last token attends to."""
        return all(left <= needed for left, needed in zip(sequence.left, self.needed, strict=True))

    @property
    def num_ready_tokens(self) -> int:
        """Returns the number of tokens that a sample which joins now need not compute: all but the last, whose hidden
        state its first token is drawn from."""
        return self.num_tokens - 1 if self.held else 0

    @property
    def led(self) -> bool:
        """Tells whether a sample that has begun will have computed the prompt when it next decodes."""
        return any(self._leads(sequence) for sequence in self.begun.values())

    def _leads(self, sequence: Sequence) -> bool:
        if sequence.status not in _LEADING:
            return False
        computes = not sequence.decoding and sequence.num_computed < self.num_tokens
        return computes or self.is_in(sequence)

    @property
    def empty(self) -> bool:
        return not (self.queued or self.withheld or self.begun)

    def forget(self, sequence: Sequence) -> None:
        """Removes a sample that has ended."""
        for samples in (self.queued, self.withheld, self.begun):
            samples.pop(sequence.request_id, None)

    def check_integrity(self) -> None:
        """Asserts that each sample is where its status says, and that the prompt is computed by one of them."""
        assert not (self.holders and self.kept), "a prompt is kept that samples hold"
        assert not (self.held and self.withheld), "samples are withheld whose prompt is held"
        assert not self.kept or self.queued, "a prompt is kept for nobody"
        assert self.held or len(self.queued) <= 1, "several samples wait to compute one prompt"
        assert self.held or not (self.queued and self.led), "a sample waits to compute a prompt that another computes"
        assert not self.withheld or self.queued or self.led, "samples are withheld for ever"
        for sequence in (*self.queued.values(), *self.withheld.values()):
            assert sequence.status is RequestStatus.WAITING, f"{sequence.request_id} has run, but is queued as new"
        for sequence in self.begun.values():
            assert sequence.status is not RequestStatus.WAITING, f"{sequence.request_id} has begun, but is new"
        for sequence in self.holders.values():
            assert sequence.status is RequestStatus.RUNNING, f"{sequence.request_id} holds a prompt, but does not run"
            held = len(sequence.pages) > self.num_shared and self.is_in(sequence)
            assert held, f"{sequence.request_id} lacks pages of its prompt"
