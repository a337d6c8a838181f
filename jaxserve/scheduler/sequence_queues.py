"""Keeps every sequence in one queue, waiting, running or swapped, and moves it with its slot and pages."""

from __future__ import annotations

from collections.abc import Set

from jaxserve.config.failpoints import Hit
from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.kv_cache.page_groups import PageGroups
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.kv_cache.pool_checks import NULL_PAGE
from jaxserve.request import RequestStatus
from jaxserve.scheduler.admission_order import AdmissionOrder
from jaxserve.scheduler.deadline_check import DeadlineCheck
from jaxserve.scheduler.disk_waits import DiskWaits
from jaxserve.scheduler.modes import Counts
from jaxserve.scheduler.parking_queue import ParkingQueue
from jaxserve.scheduler.policies.policy import Policy
from jaxserve.scheduler.preemption import Preemption
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.scheduler.prefix_cache import PrefixCache
from jaxserve.scheduler.prefix_costs import PrefixPredictor
from jaxserve.scheduler.prefix_order import PrefixOrder
from jaxserve.scheduler.prefix_waits import PrefixWaits
from jaxserve.scheduler.prompt_sharing import PromptSharing
from jaxserve.scheduler.running import Running
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.sequence_pages import FaultyPages, Pages
from jaxserve.scheduler.step_in_progress import StepInProgress
from jaxserve.scheduler.waiting import Waiting


class SequenceQueues:
    """Keeps the three queues over one page pool.

    waiting: new requests and those preempted to be computed again. swapped: those whose pages are in host memory, in
    the order of the policy. sharing: what the samples of one prompt share. prefix_cache: what requests share, for which
    some wait (prefix_waits; disk_waits where it is on disk) or are put forward (prefix_order).
    preempted: sequences preempted by the last step; `start_step` clears them. changed: a sequence arrived or left since
    the last step. filled: sequences of which the last step computes chunks, where groups of layers have windows.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        formation: AdmissionOrder,
        pool: PagePool,
        costs: PreemptionCosts | None,
        max_model_len: int | None,
        tokens_per_step: int = 1,
        allocation_hit: Hit | None = None,
        *,
        groups: PageGroups,
        deadline_check: DeadlineCheck,
        prefix_cache: PrefixCache,
        predictor: PrefixPredictor | None,
    ):
        told = pool, config.admission, groups, max_model_len, tokens_per_step
        self.pages = Pages(*told) if allocation_hit is None else FaultyPages(allocation_hit, *told)
        self.prefix_cache = prefix_cache
        self.preemption = Preemption(config.preemption, policy, groups, costs)
        urgency_queues = self.preemption.urgency_queues
        self.waiting = Waiting(policy, formation, urgency_queues(), urgency_queues(), deadline_check, prefix_cache)
        self.prefix_waits = PrefixWaits(prefix_cache, self.waiting, predictor)
        self.disk_waits = DiskWaits(prefix_cache, pool, self.waiting)
        self.prefix_order = PrefixOrder(prefix_cache, self.waiting, watching=policy.matches_prefixes)
        self.running = Running(config.max_num_seqs, pool.page_size, tokens_per_step, config.num_penalty_rows)
        self.sharing = PromptSharing(pool, self.pages, self.waiting, self.running)
        self.swapped = ParkingQueue(policy.queue)
        self.preempted: list[Sequence] = []
        self.preemptions = {"recompute": 0, "swap": 0}
        self.changed = False
        self.filled: list[Sequence] = []

    @property
    def counts(self) -> Counts:
        preempted = len(self.swapped) + len(self.waiting.returning)
        return Counts(len(self.running.decoding), len(self.running.prefilling), preempted)

    def start_step(self) -> None:
        """Frees slot and pages of sequences whose last allowed token is sampled, before its id is read, and of those
        whose prompt is embedded, before the result is."""
        self.preempted = []
        self.changed = False
        self.pages.start_step()
        for sequence in self.filled:
            if sequence.status is RequestStatus.RUNNING:
                self.trim(sequence)
        self.filled = []
        for sequence in (*self.running.decoding.complete(), *self.running.ended.values()):
            self._release(sequence, sequence.num_known)
            sequence.status = RequestStatus.ENDING
        for _ in range(self.running.num_free_penalty_rows):
            # Those that have run come first, as they do where rows are free.
            if not (self.swapped.unpark() or self.waiting.returning.unpark() or self.waiting.unpark()):
                break

    def trim(self, sequence: Sequence) -> None:
        """Releases the pages of a running sequence that windows have left, with those of its prompt where they are
        among them: other samples then compute it again."""
        position = self.running.position(sequence)
        if self.pages.trims(sequence, position):
            self.prefix_cache.filled(sequence, position)
            self.pages.trim(sequence, position)
            self.sharing.trimmed(sequence)

    def park(self, sequence: Sequence) -> None:
        """Sets aside a swapped or waiting sequence that lacks a penalty row."""
        (self.swapped if sequence.status is RequestStatus.SWAPPED else self.waiting).park(sequence)

    def make_room(self, step: StepInProgress) -> None:
        """Frees the pages of a prompt that no sample runs with, or else preempts the running sequence that the
        preemption rules select, and drops its share of this step."""
        if self.sharing.reclaim():
            return
        self.preempt(self.preemption.victim(self.running.sequences), step)

    def preempt(self, sequence: Sequence, step: StepInProgress) -> None:
        """Preempts a running sequence: frees its slot and pages, and drops its share of this step.

        Its tokens stay; their keys and values are moved to host memory or recomputed when it is next admitted.
        """
        step.drop(sequence, self.running.decoding.next_tokens(sequence) if sequence.decoding else 0)
        self.running.leave(sequence)
        self.prefix_cache.leaves(sequence, sequence.num_known)
        self.prefix_waits.left(sequence)
        self.sharing.leaves(sequence, keep=False)
        self.preemption.boosted(sequence)
        copies = None
        if sequence.num_computed and self.preemption.prefers_swap(sequence.num_computed):
            copies = self.pages.swap_out(sequence)
        if copies is None:
            self.pages.release(sequence)
            sequence.num_computed = 0
            sequence.status = RequestStatus.PREEMPTED
            self.waiting.push_back(sequence)
        else:
            step.copies.extend(copies)
            sequence.status = RequestStatus.SWAPPED
            self.swapped.push(sequence)
        if self.pages.groups.windowed:
            self.sharing.moved(sequence)
        self.preemptions["recompute" if copies is None else "swap"] += 1
        self.preempted.append(sequence)

    def restart(self, sequence: Sequence, lost_pages: Set[int]) -> bool:
        """Rolls a sequence back to its known tokens after the device has lost its pages and the steps in flight.

        Args:
            sequence: an unfinished sequence.
            lost_pages: host pages whose copies from the device did not take place.

        Returns:
            True when the sequence must be recomputed.
        """
        status = sequence.status
        # Of a prompt that is embedded, sums may be in a lost step, too.
        lost = sequence.pooled is not None or not lost_pages.isdisjoint(sequence.host_pages)
        if status is RequestStatus.SWAPPED and lost:
            self.swapped.remove(sequence)
            self.pages.release(sequence)
        elif status is RequestStatus.RUNNING:
            self._release(sequence, 0)
        elif status is not RequestStatus.ENDING:  # what was to be its last token is lost too
            sequence.num_pending = 0
            # What samples the next token is the computation of the last known one, which may have been in a lost step.
            sequence.num_computed = min(sequence.num_computed, sequence.num_known - 1)
            return False
        self.changed = True
        sequence.num_preemptions += 1
        sequence.num_computed = sequence.num_pending = 0
        sequence.status = RequestStatus.PREEMPTED
        self.waiting.push_back(sequence)
        self.preemptions["recompute"] += 1
        return True

    def leave(self, sequence: Sequence, *, failed: bool = False) -> None:
        """Removes a sequence from its queue, and frees all that it holds. failed: what it holds may not be computed."""
        self.changed = True
        match sequence.status:
            case RequestStatus.RUNNING:
                # The last known token may be of a step that waits for masks, and is not dispatched.
                self._release(sequence, 0 if failed else sequence.num_known - 1)
            case RequestStatus.SWAPPED:
                self.swapped.remove(sequence)
                self.pages.release(sequence)
                sequence.num_computed = 0
            case RequestStatus.WAITING | RequestStatus.PREEMPTED:
                self.waiting.remove(sequence)
            case _:
                pass  # ENDING: it holds nothing any more

    def _release(self, sequence: Sequence, num_tokens: int) -> None:
        """Frees slot and pages of a running sequence; those of its first `num_tokens` known tokens can be found."""
        self.running.leave(sequence)
        self.prefix_cache.leaves(sequence, num_tokens)
        self.prefix_waits.left(sequence)
        self.sharing.leaves(sequence, keep=True)
        self.pages.release(sequence)
        sequence.num_computed = 0

    def check_integrity(self, sequences: list[Sequence], pool: PagePool) -> None:
        """Asserts invariant 1 of the design and that each of the unfinished `sequences` is in one queue; O(pages)."""
        tables = [[*sequence.live_pages, *sequence.reserved] for sequence in sequences]
        pool.check_integrity([*tables, *self.sharing.tables], [sequence.host_pages for sequence in sequences])
        self._check_groups(sequences)
        self.running.check_integrity()
        self.sharing.check_integrity()
        self.prefix_waits.check_integrity()
        withheld = self.sharing.num_withheld + self.prefix_waits.num_followers + self.disk_waits.num_withheld
        assert withheld == self.waiting.num_withheld, "withheld requests are counted wrong"
        statuses = [sequence.status for sequence in sequences]
        assert statuses.count(RequestStatus.RUNNING) == len(self.running), "a sequence runs that does not"
        assert statuses.count(RequestStatus.SWAPPED) == len(self.swapped), "a sequence is swapped that is not"
        waiting = statuses.count(RequestStatus.WAITING) + statuses.count(RequestStatus.PREEMPTED)
        assert waiting == len(self.waiting) + self.waiting.num_withheld, (
            "a sequence waits that does not, or the reverse"
        )
        for sequence in sequences:
            if sequence.status is not RequestStatus.RUNNING:
                assert not sequence.decoding, f"{sequence.request_id} decodes, but does not run"
                assert not sequence.pages, f"{sequence.request_id} holds pages, but does not run"
                assert not sequence.reserved, f"{sequence.request_id} holds reserved pages, but does not run"
                assert sequence.slot is None, f"{sequence.request_id} holds a slot, but does not run"
                assert sequence.penalty_row is None, f"{sequence.request_id} holds a penalty row, but does not run"
            else:
                assert not sequence.parked, f"{sequence.request_id} runs, but is parked"
            swapped = sequence.status is RequestStatus.SWAPPED
            assert swapped == bool(sequence.host_pages), f"{sequence.request_id} is not where its pages are"
            assert sequence.num_computed <= sequence.num_entries * pool.page_size, "computed tokens lack pages"
            next_page = self.running.position(sequence) // pool.page_size
            for page in (page for table in sequence.tables for page in table[next_page:]):
                assert pool.references(page) == 1, f"page {page} of {sequence.request_id} is shared, and written next"
        if not sequences:
            assert pool.num_used == 0, f"{pool.num_used} pages are in use while idle"
            assert pool.num_host_used == 0, f"{pool.num_host_used} host pages are in use while idle"

    def _check_groups(self, sequences: list[Sequence]) -> None:
        """Asserts that a page is of one group, that the tables of a sequence agree, and that they have the pages which
        its next token attends to."""
        groups, owner = self.pages.groups, {}
        for sequence in sequences:
            name, needed = sequence.request_id, groups.left(self.running.position(sequence))
            assert len(sequence.tables) == len(sequence.left) == groups.count, f"{name} lacks page tables"
            for group, (table, left) in enumerate(zip(sequence.tables, sequence.left, strict=True)):
                assert len(table) == len(sequence.pages), f"the page tables of {name} differ in length"
                assert left <= needed[group], f"{name} has released pages of group {group} that it needs"
                assert not any(table[:left]), f"{name} counts pages as released that it holds"
                assert NULL_PAGE not in table[left:], f"{name} lacks a page of group {group}"
                for page in table[left:]:
                    assert owner.setdefault(page, group) == group, f"page {page} is of groups {group} and {owner[page]}"
