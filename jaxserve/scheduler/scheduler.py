"""Iteration-level scheduling: continuous batching with chunked prefill over a paged pool.

One call of `schedule` decides one step, in the order of docs/architecture.md: running sequences that decode get one
token each, prompts under way get a chunk, waiting sequences join while slots, budget and pages allow. When pages are
short for a running sequence, the running sequences of least standing are preempted (by recompute) until they suffice.

The sequences that decode are columns (`DecodingSet`): a step changes them together, at a few numpy calls whatever their
number. The scheduler itself touches the others, and those that take a page, end or are preempted.

The engine dispatches a step before it has read the ids of the one before, so tokens are counted whose ids are not known
yet. A sequence that turns out to have stopped is dropped at `update`, together with what the step in flight computed
for it.

Source of the iteration-level design: Orca (OSDI 2022); of paging and recompute preemption: vLLM (SOSP 2023); of
chunked prefill mixed with decodes: Sarathi-Serve (OSDI 2024).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from jaxserve.config import SchedulerConfig
from jaxserve.request import EngineRequest, FinishReason, RequestStatus
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.decoding import DecodingSet
from jaxserve.scheduler.page_pool import PagePool
from jaxserve.scheduler.plan import NO_DECODES, NOT_FINITE, StepPlan, StepResult
from jaxserve.scheduler.policy import POLICIES
from jaxserve.scheduler.progress import Chunk, StepInProgress
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.waiting import WaitingQueue


@dataclasses.dataclass(frozen=True)
class SequenceUpdate:
    """What a step or an abort changed for one sequence: its new token ids and, at its end, the reason."""

    sequence: Sequence
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class StepUpdate:
    """What a step changed.

    request_ids, token_ids: requests that decode on, and the one new token of each. others: every other sequence that
    the step changed: it has its first token since it was admitted, or has ended.
    """

    request_ids: tuple[str, ...]
    token_ids: list[int]
    others: list[SequenceUpdate]


class Scheduler:
    """Owns the waiting queue, the running set, the slots and the page pool's use."""

    def __init__(self, config: SchedulerConfig, pool: PagePool, buckets: Buckets):
        self._config = config
        self._buckets = buckets
        self._standing = POLICIES[config.policy]
        self._waiting = WaitingQueue(self._standing)
        self._decoding = DecodingSet(config.max_num_seqs, pool.page_size)
        self._prefilling: dict[str, Sequence] = {}  # running sequences that do not decode yet
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
        return len(self._decoding) + len(self._prefilling)

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
        step = StepInProgress(self._config.max_num_batched_tokens - len(self._decoding))
        self._extend_decodes(step)
        self._continue_prompts(step)
        if not self.preempted:
            self._admit(step)
        if not self._decoding and not step.chunks:
            return None
        return self._plan(step)

    def update(self, plan: StepPlan, result: StepResult) -> StepUpdate:
        """Takes the sampled ids of `plan`; returns what changed. Ids of ended sequences are dropped."""
        token_ids = np.asarray(result.token_ids, np.int32)
        if len(token_ids) != plan.num_sampled:
            raise ValueError(f"step {plan.step} has {len(token_ids)} token ids; it sampled {plan.num_sampled} rows")
        request_ids, sampled = plan.decodes.request_ids, token_ids[: len(plan.decodes)]
        stay = self._decoding.take(plan.decodes, sampled)
        others = []
        for request_id, order, token_id in _one_by_one(plan, token_ids, ~stay):
            sequence = self._sequences.get(request_id)
            if sequence is not None and sequence.order == order:
                others.append(self._take(sequence, token_id))
        if not stay.all():
            request_ids, sampled = tuple(itertools.compress(request_ids, stay.tolist())), sampled[stay]
        return StepUpdate(request_ids, sampled.tolist(), others)

    def check_integrity(self) -> None:
        """Asserts invariant 1 of the design and that slots are owned once; O(pages), for tests and idle moments."""
        self.pool.check_integrity([sequence.pages for sequence in self._sequences.values()])
        running = self._running()
        slots = [sequence.slot for sequence in running if sequence.slot is not None]
        assert sorted([*self._free_slots, *slots]) == list(range(self._config.max_num_seqs)), "slots are not owned once"
        self._decoding.check_integrity()
        statuses = [sequence.status for sequence in self._sequences.values()]
        assert statuses.count(RequestStatus.RUNNING) == len(running), "a sequence runs that does not, or the reverse"
        queued = len(running) + len(self._waiting) + statuses.count(RequestStatus.ENDING)
        assert queued == len(self._sequences), "a sequence is in no queue or in two"
        for sequence in self._sequences.values():
            if sequence.status is not RequestStatus.RUNNING:
                assert not sequence.decoding, f"{sequence.request_id} waits but decodes"
                assert not sequence.pages, f"{sequence.request_id} waits but holds pages"
                assert sequence.slot is None, f"{sequence.request_id} waits but holds a slot"
            assert sequence.num_computed <= len(sequence.pages) * self.pool.page_size, "computed tokens lack pages"
        if not self._sequences:
            assert self.pool.num_used == 0, f"{self.pool.num_used} pages are in use while idle"

    def _running(self) -> list[Sequence]:
        return [*self._decoding.sequences, *self._prefilling.values()]

    def _retire(self) -> None:
        """Takes slot and pages from the sequences whose last allowed token is sampled, before its id is read."""
        for sequence in self._decoding.complete():
            self._release(sequence)
            sequence.status = RequestStatus.ENDING

    def _extend_decodes(self, step: StepInProgress) -> None:
        """Gives a page to every sequence that decodes and needs one, preempting others of less standing, or itself
        when it is the least."""
        short = self._decoding.short()
        if not short:
            return
        pages = self.pool.allocate(len(short))
        if pages is not None:
            for sequence, page in zip(short, pages, strict=True):
                self._decoding.give_page(sequence, page)
            return
        for sequence in short:
            while sequence.status is RequestStatus.RUNNING:  # until it is preempted, now or for one before it
                pages = self.pool.allocate(1)
                if pages is not None:
                    self._decoding.give_page(sequence, pages[0])
                    break
                self._preempt_least(step)

    def _continue_prompts(self, step: StepInProgress) -> None:
        """Gives a chunk to every prompt under way, preempting as `_extend_decodes` does."""
        for sequence in list(self._prefilling.values()):
            if sequence.status is not RequestStatus.RUNNING:
                continue  # preempted for a sequence before it
            count = self._chunk(sequence, step.budget)
            held = len(sequence.pages)
            if not count:
                continue
            while sequence.status is RequestStatus.RUNNING and not self._grow(sequence, count):
                self._preempt_least(step)
            if sequence.status is RequestStatus.RUNNING:
                step.add(Chunk(sequence, count, held))

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Tokens of this sequence in this step, by the budget and the chunking rules; 0 is none."""
        want = sequence.num_known - sequence.num_computed
        threshold = self._config.long_prefill_token_threshold
        if self._config.enable_chunked_prefill:
            return min(want, budget, threshold or want)
        if want > self._config.max_num_batched_tokens or sequence.num_computed:
            return min(want, budget)  # a preempted sequence that outgrew a step can only come back in parts
        return want if want <= budget else 0

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Allocates what `count` more tokens need beyond the pages held; all or nothing."""
        needed = -(-(sequence.num_computed + count) // self.pool.page_size) - len(sequence.pages)
        pages = self.pool.allocate(needed) if needed > 0 else []
        if pages is None:
            return False
        sequence.pages.extend(pages)
        return True

    def _admit(self, step: StepInProgress) -> None:
        """Moves waiting sequences to running, best standing first, until slots, budget or pages end."""
        while step.budget > 0 and self._free_slots:
            sequence = self._waiting.peek()
            if sequence is None or sequence.num_pending:
                return  # a preempted sequence waits for its last id
            count = self._chunk(sequence, step.budget)
            if not count or not self._grow(sequence, count):
                return
            self._waiting.remove(sequence)
            sequence.status = RequestStatus.RUNNING
            sequence.slot = self._free_slots.pop()
            self._prefilling[sequence.request_id] = sequence
            self.admitted.append(sequence)
            step.add(Chunk(sequence, count, held=0, admitted=True))

    def _plan(self, step: StepInProgress) -> StepPlan:
        decodes = self._decoding.advance() if self._decoding else NO_DECODES
        chunks = []
        num_tokens = num_sampled = len(decodes)
        for chunk in step.chunks.values():
            row = chunk.row()
            chunks.append(row)
            num_tokens += chunk.count
            num_sampled += row.sample
            chunk.sequence.num_computed += chunk.count
            if row.sample:
                del self._prefilling[row.request_id]
                self._decoding.join(chunk.sequence)
        plan = StepPlan(
            step=self._steps,
            decodes=decodes,
            chunks=tuple(chunks),
            token_bucket=self._buckets.token_bucket(num_tokens),
            row_bucket=self._buckets.row_bucket(num_sampled),
            num_tokens=num_tokens,
            num_sampled=num_sampled,
        )
        self._steps += 1
        return plan

    def _preempt_least(self, step: StepInProgress) -> None:
        """Preempts the running sequence of least standing, whatever it was given in this step."""
        victim = max(self._running(), key=self._standing)
        step.drop(victim)
        self._preempt(victim)

    def _preempt(self, sequence: Sequence) -> None:
        """Takes back pages and slot; the tokens stay and are computed again when the sequence is next admitted."""
        self._release(sequence)
        sequence.status = RequestStatus.PREEMPTED
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.preempted.append(sequence)
        self._waiting.push(sequence)

    def _take(self, sequence: Sequence, token_id: int) -> SequenceUpdate:
        """Gives one sequence its next token."""
        if not sequence.decoding:
            sequence.num_pending -= 1
        if token_id == NOT_FINITE:
            return self._finish(sequence, FinishReason.ERROR, error="the model's logits are not finite")
        sequence.output_token_ids.append(token_id)
        reason = _finish_reason(sequence, token_id)
        if reason is None:
            return SequenceUpdate(sequence, (token_id,))
        return dataclasses.replace(self._finish(sequence, reason), token_ids=(token_id,))

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
        if sequence.decoding:
            self._decoding.leave(sequence)
        else:
            del self._prefilling[sequence.request_id]
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.num_computed = 0
        assert sequence.slot is not None
        self._free_slots.append(sequence.slot)
        sequence.slot = None


def _one_by_one(plan: StepPlan, token_ids: np.ndarray, special: np.ndarray) -> Iterator[tuple[str, int, int]]:
    """Request id, order and sampled id of the `special` decodes, bool [R], and of the chunks that sample."""
    for row in special.nonzero()[0].tolist():
        yield plan.decodes.request_ids[row], int(plan.decodes.orders[row]), int(token_ids[row])
    sampled = (row for row in plan.chunks if row.sample)
    for row, token_id in zip(sampled, token_ids[len(plan.decodes) :].tolist(), strict=True):
        yield row.request_id, row.order, token_id


def _finish_reason(sequence: Sequence, token_id: int) -> FinishReason | None:
    if token_id in sequence.request.stop_token_ids and len(sequence.output_token_ids) > sequence.request.min_tokens:
        return FinishReason.STOP
    if len(sequence.output_token_ids) >= sequence.request.max_tokens:
        return FinishReason.LENGTH
    return None
