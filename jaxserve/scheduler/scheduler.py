"""Iteration-level scheduling: continuous batching with chunked prefill over a paged pool.

One call of `schedule` decides one step, in the order of docs/architecture.md: running sequences that decode get one
token each, prompts under way get a chunk, waiting sequences join while slots, budget and pages allow. When pages are
short for a running sequence, the running sequences of least standing are preempted (by recompute) until they suffice.

The engine dispatches a step before it has read the ids of the one before, so the scheduler counts tokens whose ids it
does not know yet (`Sequence.num_pending`). A sequence that turns out to have stopped is dropped at `update`, together
with what the step in flight computed for it.

Source of the iteration-level design: Orca (OSDI 2022); of paging and recompute preemption: vLLM (SOSP 2023); of
chunked prefill mixed with decodes: Sarathi-Serve (OSDI 2024).
"""

from __future__ import annotations

import dataclasses

from jaxserve.config import SchedulerConfig
from jaxserve.request import EngineRequest, FinishReason, RequestStatus
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.page_pool import PagePool
from jaxserve.scheduler.plan import NOT_FINITE, RowPlan, StepPlan, StepResult
from jaxserve.scheduler.policy import POLICIES
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.waiting import WaitingQueue


@dataclasses.dataclass(frozen=True)
class SequenceUpdate:
    """What a step or an abort changed for one sequence: its new token ids and, at its end, the reason."""

    sequence: Sequence
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str = ""


class Scheduler:
    """Owns the waiting queue, the running set, the slots and the page pool's use."""

    def __init__(self, config: SchedulerConfig, pool: PagePool, buckets: Buckets):
        self._config = config
        self._buckets = buckets
        self._standing = POLICIES[config.policy]
        self._waiting = WaitingQueue(self._standing)
        self._running: dict[str, Sequence] = {}
        self._sequences: dict[str, Sequence] = {}
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._arrivals = 0
        self._steps = 0
        self.pool = pool
        self.num_preemptions = 0
        self.preempted: list[Sequence] = []
        """Sequences preempted by the last `schedule`."""
        self.admitted: list[Sequence] = []
        """Sequences that the last `schedule` moved from waiting to running."""

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def unfinished(self) -> bool:
        return bool(self._sequences)

    @property
    def request_ids(self) -> list[str]:
        """Ids of the unfinished requests, in order of arrival."""
        return list(self._sequences)

    def add(self, request: EngineRequest) -> Sequence:
        """Puts a request in the waiting queue. Raises ValueError when its id is in use or the server is full:
        max_num_seqs requests running (or about to) and max_num_waiting behind them."""
        if request.request_id in self._sequences:
            raise ValueError(f"request_id {request.request_id!r} is in use; ids of unfinished requests must differ")
        if len(self._sequences) >= self._config.max_num_seqs + self._config.max_num_waiting:
            raise ValueError(
                f"{len(self._sequences)} requests are unfinished; max_num_seqs {self._config.max_num_seqs} and "
                f"max_num_waiting {self._config.max_num_waiting} allow no more: retry later"
            )
        sequence = Sequence(request, self._arrivals)
        self._arrivals += 1
        self._sequences[request.request_id] = sequence
        self._waiting.push(sequence)
        return sequence

    def abort(self, request_id: str) -> SequenceUpdate | None:
        """Ends a request and frees its pages at once; None when the id is not (or no longer) known."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else self._finish(sequence, FinishReason.ABORT)

    def expire(self, now: float) -> list[SequenceUpdate]:
        """Ends the waiting sequences at the head of the queue whose deadline has passed, before they cost a prefill."""
        expired = []
        while (head := self._waiting.peek()) is not None:
            deadline = head.request.deadline
            if deadline is None or deadline > now:
                break
            expired.append(self._finish(head, FinishReason.ABORT, error=f"deadline passed {now - deadline:.3f} s ago"))
        return expired

    def schedule(self) -> StepPlan | None:
        """Decides the next step; None when there is nothing to compute now."""
        self.preempted, self.admitted = [], []
        self._retire()
        scheduled: dict[str, tuple[int, int]] = {}  # request -> (tokens in this step, pages held before)
        budget = self._config.max_num_batched_tokens
        running = list(self._running.values())
        decoding = [sequence for sequence in running if sequence.decoding]
        prefilling = [sequence for sequence in running if not sequence.decoding]
        for sequence in decoding + prefilling:
            if sequence.status is not RequestStatus.RUNNING:
                continue  # preempted for a sequence before it
            count = self._chunk(sequence, budget)
            held = len(sequence.pages)
            if not count:
                continue
            freed = self._take_pages(sequence, count, scheduled)
            budget += freed
            if sequence.status is RequestStatus.RUNNING:
                scheduled[sequence.request_id] = (count, held)
                budget -= count
        if not self.preempted:
            self._admit(scheduled, budget)
        if not scheduled:
            return None
        return self._plan(scheduled)

    def update(self, plan: StepPlan, result: StepResult) -> list[SequenceUpdate]:
        """Takes the sampled ids of `plan`; returns what changed, in row order. Ids of ended sequences are dropped."""
        updates = []
        for row, token_id in zip(plan.sampled, result.token_ids, strict=True):
            sequence = self._sequences.get(row.request_id)
            if sequence is None or sequence.order != row.order:
                continue
            sequence.num_pending -= 1
            if token_id == NOT_FINITE:
                updates.append(self._finish(sequence, FinishReason.ERROR, error="the model's logits are not finite"))
                continue
            sequence.output_token_ids.append(token_id)
            reason = _finish_reason(sequence, token_id)
            if reason is None:
                updates.append(SequenceUpdate(sequence, (token_id,)))
            else:
                updates.append(dataclasses.replace(self._finish(sequence, reason), token_ids=(token_id,)))
        return updates

    def check_integrity(self) -> None:
        """Asserts invariant 1 of the design and that slots are owned once; O(pages), for tests and idle moments."""
        self.pool.check_integrity([sequence.pages for sequence in self._sequences.values()])
        slots = [sequence.slot for sequence in self._running.values() if sequence.slot is not None]
        assert sorted([*self._free_slots, *slots]) == list(range(self._config.max_num_seqs)), "slots are not owned once"
        ending = sum(sequence.status is RequestStatus.ENDING for sequence in self._sequences.values())
        queued = len(self._running) + len(self._waiting) + ending
        assert queued == len(self._sequences), "a sequence is in no queue or in two"
        for sequence in self._sequences.values():
            if sequence.status is not RequestStatus.RUNNING:
                assert not sequence.pages, f"{sequence.request_id} waits but holds pages"
                assert sequence.slot is None, f"{sequence.request_id} waits but holds a slot"
            assert sequence.num_computed <= len(sequence.pages) * self.pool.page_size, "computed tokens lack pages"
        if not self._sequences:
            assert self.pool.num_used == 0, f"{self.pool.num_used} pages are in use while idle"

    def _retire(self) -> None:
        """Takes slot and pages from the sequences whose last allowed token is sampled, before its id is read."""
        for sequence in [one for one in self._running.values() if not one.num_uncomputed]:
            self._release(sequence)
            sequence.status = RequestStatus.ENDING

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Tokens of this sequence in this step, by the budget and the chunking rules; 0 is none."""
        want = sequence.num_uncomputed
        threshold = self._config.long_prefill_token_threshold
        if self._config.enable_chunked_prefill:
            return min(want, budget, threshold or want)
        if want > self._config.max_num_batched_tokens or sequence.num_computed:
            return min(want, budget)  # a preempted sequence that outgrew a step can only come back in parts
        return want if want <= budget else 0

    def _take_pages(self, sequence: Sequence, count: int, scheduled: dict[str, tuple[int, int]]) -> int:
        """Gives a running sequence the pages for `count` more tokens, preempting others of less standing, or itself
        when it is the least. Returns the tokens that preempted sequences had been given in this step."""
        freed = 0
        while sequence.status is RequestStatus.RUNNING and not self._grow(sequence, count):
            victim = max(self._running.values(), key=self._standing)
            freed += scheduled.pop(victim.request_id, (0, 0))[0]
            self._preempt(victim)
        return freed

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Allocates what `count` more tokens need beyond the pages held; all or nothing."""
        needed = -(-(sequence.num_computed + count) // self.pool.page_size) - len(sequence.pages)
        pages = self.pool.allocate(needed) if needed > 0 else []
        if pages is None:
            return False
        sequence.pages.extend(pages)
        return True

    def _admit(self, scheduled: dict[str, tuple[int, int]], budget: int) -> None:
        """Moves waiting sequences to running, best standing first, until slots, budget or pages end."""
        while budget > 0 and self._free_slots:
            sequence = self._waiting.peek()
            if sequence is None or sequence.num_pending:
                return  # a preempted sequence waits for its last id
            count = self._chunk(sequence, budget)
            if not count or not self._grow(sequence, count):
                return
            self._waiting.remove(sequence)
            sequence.status = RequestStatus.RUNNING
            sequence.slot = self._free_slots.pop()
            self._running[sequence.request_id] = sequence
            self.admitted.append(sequence)
            scheduled[sequence.request_id] = (count, 0)
            budget -= count

    def _plan(self, scheduled: dict[str, tuple[int, int]]) -> StepPlan:
        admitted = {sequence.request_id for sequence in self.admitted}
        rows = []
        prefill = 0
        for request_id, (count, held) in scheduled.items():
            sequence = self._running[request_id]
            prefill += 0 if sequence.decoding else count
            rows.append(_row(sequence, count, held, request_id in admitted))
            sequence.num_computed += count
            sequence.num_pending += rows[-1].sample
        num_tokens = sum(row.num_tokens for row in rows)
        plan = StepPlan(
            step=self._steps,
            rows=tuple(rows),
            token_bucket=self._buckets.token_bucket(num_tokens),
            row_bucket=self._buckets.row_bucket(sum(row.sample for row in rows)),
            num_tokens=num_tokens,
            num_prefill_tokens=prefill,
        )
        self._steps += 1
        return plan

    def _preempt(self, sequence: Sequence) -> None:
        """Takes back pages and slot; the tokens stay and are computed again when the sequence is next admitted."""
        self._release(sequence)
        sequence.status = RequestStatus.PREEMPTED
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.preempted.append(sequence)
        self._waiting.push(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str = "") -> SequenceUpdate:
        if sequence.status is RequestStatus.RUNNING:
            self._release(sequence)
        elif sequence.status is not RequestStatus.ENDING:
            self._waiting.remove(sequence)
        del self._sequences[sequence.request_id]
        sequence.status = RequestStatus.FINISHED
        return SequenceUpdate(sequence, (), reason, error)

    def _release(self, sequence: Sequence) -> None:
        """Returns pages and slot of a running sequence. A step in flight may still write to those pages: whatever is
        computed for their next owner is dispatched after it, so it is never seen."""
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.num_computed = 0
        assert sequence.slot is not None
        self._free_slots.append(sequence.slot)
        sequence.slot = None
        del self._running[sequence.request_id]


def _row(sequence: Sequence, count: int, held: int, admitted: bool) -> RowPlan:
    start = sequence.num_computed
    token_ids = sequence.known_token_ids(start, start + count)
    assert sequence.slot is not None
    assert count - len(token_ids) in (0, 1)
    outputs = sequence.num_tokens - sequence.num_prompt_tokens
    return RowPlan(
        request_id=sequence.request_id,
        order=sequence.order,
        slot=sequence.slot,
        start=start,
        token_ids=token_ids,
        from_slot=len(token_ids) < count,
        sample=start + count == sequence.num_tokens,
        suppress_stop=outputs < sequence.request.min_tokens,
        first_new_page=held,
        new_pages=tuple(sequence.pages[held:]),
        admit=sequence.request if admitted else None,
    )


def _finish_reason(sequence: Sequence, token_id: int) -> FinishReason | None:
    if token_id in sequence.request.stop_token_ids and len(sequence.output_token_ids) > sequence.request.min_tokens:
        return FinishReason.STOP
    if len(sequence.output_token_ids) >= sequence.request.max_tokens:
        return FinishReason.LENGTH
    return None
