"""Lets requests wait for a prefix that another one is computing, where that is cheaper than computing it twice.

    leader      a running request whose prompt is in progress; the page that it fills next is its frontier
    follower    a request whose look-up ends at the frontier of a leader with which it shares pages beyond: it waits, in
                no queue, until the leader has committed them, and then finds them
    released    the followers of a leader that is preempted, ends or is lost; they queue again, and the first of them
                that is admitted leads the others

A request follows at most one leader at a time, and for no longer than that one's prefill takes. Choices are made by the
predicted time until its prompt is computed (`prefix_costs.wait_and_compute_seconds`), and counted.
"""

from __future__ import annotations

import dataclasses

from jaxserve.request import RequestStatus
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.prefix_cache import PrefixCache
from jaxserve.scheduler.prefix_costs import PrefixPredictor
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.waiting import Waiting


@dataclasses.dataclass
class WaitCounts:
    """Counts choices since the start.

    waited: requests that followed. computed: those that could have and did not. waited_in_vain: those that followed and
    were released by a leader that left, or waited through steps that are predicted to take longer than computing was.
    """

    waited: int = 0
    computed: int = 0
    waited_in_vain: int = 0


@dataclasses.dataclass(frozen=True)
class _Follower:
    """A request that waits. pages: of its prompt that the leader will have committed. patience: predicted seconds of
    steps after which it would have been better to compute, counted as `PrefixWaits` counts them."""

    sequence: Sequence
    leader: Sequence
    pages: int
    patience: float


class PrefixWaits:
    """Keeps the leaders and followers of one scheduler. predictor: None where requests never wait."""

    def __init__(self, cache: PrefixCache, waiting: Waiting, predictor: PrefixPredictor | None):
        self._cache = cache
        self._waiting = waiting
        self._predictor = predictor
        self._seconds = 0.0  # predicted, of the steps planned while somebody waited
        self._leaders: dict[bytes, Sequence] = {}  # by the content key of the page that each fills next
        self._frontiers: dict[int, bytes] = {}  # the reverse, by order
        self._followers: dict[int, list[_Follower]] = {}  # by the order of the leader
        self.counts = WaitCounts()

    @property
    def num_followers(self) -> int:
        return sum(one.sequence.withheld for followers in self._followers.values() for one in followers)

    def lead(self, sequence: Sequence) -> None:
        """Enters a sequence that was admitted or has committed pages; others may follow it from its next page on."""
        self._forget(sequence)
        if self._predictor is None or sequence.decoding:
            return
        key = self._cache.next_key(sequence, sequence.num_committed, sequence.num_known)
        if key is not None and self._leaders.setdefault(key, sequence) is sequence:
            self._frontiers[sequence.order] = key

    def follow(self, sequence: Sequence) -> bool:
        """Decides whether a waiting sequence follows a leader; if so, it is in no queue any more."""
        if not self._leaders or self._predictor is None or not sequence.waits_new or sequence.prompt is not None:
            return False
        found = len(self._cache.find(sequence))
        key = self._cache.next_key(sequence, found, sequence.num_skippable)
        leader = None if key is None else self._leaders.get(key)
        if leader is None:
            return False
        pages = self._cache.common_pages(sequence, leader)
        if pages <= found:
            return False
        size = self._cache.page_size
        start, shared = found * size, (pages - found) * size
        left = pages * size - leader.num_computed
        own = sequence.num_known - pages * size
        waits, computes = self._predictor.wait_and_compute(start, max(0, left), shared, own)
        if waits > computes:
            self.counts.computed += 1
            return False
        self.counts.waited += 1
        self._waiting.withhold(sequence)
        self._followers.setdefault(leader.order, []).append(
            _Follower(sequence, leader, pages, self._seconds + computes)
        )
        return True

    def planned(self, plan: StepPlan) -> None:
        """Records the step that was planned."""
        if self._followers and self._predictor is not None:
            self._seconds += self._predictor.step(plan)

    def committed(self, sequence: Sequence) -> None:
        """Records that a leader has committed pages: releases followers that find what they waited for."""
        if sequence.order in self._frontiers:
            self.lead(sequence)
        followers = self._followers.get(sequence.order)
        if not followers:
            return
        waiting = []
        for one in followers:
            if sequence.num_committed >= one.pages:
                self._release(one, in_vain=self._seconds > one.patience)
            else:
                waiting.append(one)
        if waiting:
            self._followers[sequence.order] = waiting
        else:
            del self._followers[sequence.order]

    def left(self, sequence: Sequence) -> None:
        """Records that a sequence does not run any more, or not in these pages."""
        self._forget(sequence)
        for one in self._followers.pop(sequence.order, ()):
            self._release(one, in_vain=True)

    def check_integrity(self) -> None:
        """Asserts that followers wait for sequences that run."""
        assert len(self._leaders) == len(self._frontiers), "a leader has two frontiers"
        leaders = [one.leader for followers in self._followers.values() for one in followers]
        for sequence in (*self._leaders.values(), *leaders):
            assert sequence.status is RequestStatus.RUNNING, f"{sequence.request_id} leads, but does not run"

    def _forget(self, sequence: Sequence) -> None:
        key = self._frontiers.pop(sequence.order, None)
        if key is not None:
            del self._leaders[key]

    def _release(self, follower: _Follower, *, in_vain: bool) -> None:
        if not follower.sequence.withheld:
            return  # it has ended
        self.counts.waited_in_vain += in_vain
        self._waiting.offer(follower.sequence)
