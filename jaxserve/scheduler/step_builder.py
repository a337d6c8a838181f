"""Builds the plan of one step, in the order given in docs/architecture.md, from the rules in this package's other
files."""

from __future__ import annotations

from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.kv_cache.page_pool import PageCopy
from jaxserve.request import RequestStatus
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.budgets import Budgets
from jaxserve.scheduler.chunk_planner import NO_CHUNKS, ChunkPlanner
from jaxserve.scheduler.found_pages import FoundPages
from jaxserve.scheduler.gap_limit import GapLimit
from jaxserve.scheduler.modes import Mode, StepLimits
from jaxserve.scheduler.plan import NO_DECODES, NO_SAMPLES, StepPlan
from jaxserve.scheduler.policies.policy import Policy
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.sequence_queues import SequenceQueues
from jaxserve.scheduler.step_in_progress import Chunk, StepInProgress
from jaxserve.scheduler.step_time_estimator import StepTimeEstimator

MOST_PADDING = 0.2
"""Share of a bucket that may be padding before the prefill budget is lowered or raised to a bucket boundary."""

MOST_PARKED = 64
"""Maximum number of sequences that one step sets aside because they lack a penalty row."""


class StepBuilder:
    """Builds the plans of steps.

    admitted: sequences that the last step admitted. blocked_by: what kept the first waiting sequence from joining it:
    "slots", "pages", "penalty rows", or None when none waits or the cause is another.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        buckets: Buckets,
        budgets: Budgets,
        mode: Mode,
        policy: Policy,
        queues: SequenceQueues,
        step_times: StepTimeEstimator,
        gap_limit: GapLimit | None = None,
    ):
        self._config = config
        self._buckets = buckets
        self._budgets = budgets
        self._mode = mode
        self._policy = policy
        self._queues = queues
        self._pages = queues.pages
        self._running = queues.running
        self._waiting = queues.waiting
        self._swapped = queues.swapped
        self._prefix_cache = queues.prefix_cache
        self._may_follow = not mode.closed  # a closed batch is admitted as it is
        self._step_times = step_times
        self._gap_limit = gap_limit
        bounded = mode.closed or gap_limit is not None
        self._chunk_planner = ChunkPlanner(queues, policy, budgets, None if bounded else mode)
        self.admitted: list[Sequence] = []
        self.blocked_by: str | None = None
        self._step: StepInProgress | None = None

    @property
    def copies(self) -> tuple[PageCopy, ...]:
        """Returns the copies of pages decided for the last step, whether it was built to its end or not."""
        return () if self._step is None else (*self._step.copies, *self._pages.take_copies())

    def build(self, now: float, number: int) -> StepPlan | None:
        """Builds the next step, with this number; returns None when there is nothing to compute."""
        self.admitted, self.blocked_by, self._step = [], None, None
        step = self._filled(now)
        step.copies += self._pages.take_copies()
        # Copies alone are a step where the others wait for the results of guesses in flight.
        return self._plan(step, number, now) if step.decodes or step.chunks or step.copies else None

    def _filled(self, now: float) -> StepInProgress:
        """Decides how many tokens each sequence computes, and allocates their pages."""
        queues, decoding = self._queues, self._running.decoding
        step_limits = self._mode.step_limits(queues.counts, self._waiting, now)
        step, joined = self._begin(step_limits), 0
        self._step = step
        if step_limits.prefill and len(self._swapped):
            self._swap_in(step, step_limits)
        if step_limits.decode:
            self._extend_decodes(step)
        if step_limits.prefill or not step.decodes:  # a step of decodes alone that finds no room for any
            self._continue_prompts(step, step_limits)
            if not queues.preempted:
                joined = self._admit(step, step_limits, now, step_limits.admit)
                if joined < step_limits.admit and len(self._waiting.new) and len(self._running):
                    joined += self._preempt_for_waiting(step, step_limits, now)
            if not step.chunks and not step_limits.decode and len(decoding):
                step.decodes = decoding.num_tokens  # no prompt finds room: the step decodes after all
                self._extend_decodes(step)
        if step.fill:
            joined += self._fill(step, step_limits, now, step_limits.admit - joined)
        if joined:
            self._mode.admitted(joined)
        return step

    def _plan(self, step: StepInProgress, number: int, now: float) -> StepPlan:
        """Counts the decided tokens as computed and makes the `StepPlan`."""
        running, floors = self._running, self._mode.padded(step)
        decodes, samples = running.decoding.advance() if step.decodes else (NO_DECODES, NO_SAMPLES)
        if self._policy.counts_tokens and step.decodes:
            self._policy.decoded(running.decoding.tenants(decodes))
        num_tokens, planned = decodes.num_tokens, NO_CHUNKS
        if step.chunks:
            planned = self._chunk_planner.plan(step, num_tokens, now)
            self.admitted += planned.forked
            if self._pages.groups.windowed:
                self._queues.filled = [chunk.sequence for chunk in step.chunks.values()]
            num_tokens += sum([chunk.count for chunk in step.chunks.values()])
            samples = samples.followed_by(planned.samples) if planned.samples else samples
        num_sampled = len(samples)
        return StepPlan(
            step=number,
            decodes=decodes,
            chunks=planned.rows,
            samples=samples,
            token_bucket=self._buckets.token_bucket(max(num_tokens, floors[0], planned.num_places)),
            row_bucket=self._buckets.row_bucket(max(num_sampled, floors[1]) if num_sampled else 0),
            num_tokens=num_tokens,
            copies=(*step.copies, *self._pages.take_copies()),
            table_writes=planned.table_writes,
            penalty_writes=planned.penalty_writes,
            scores=planned.scores,
            forks=planned.forks,
        )

    def _begin(self, step_limits: StepLimits) -> StepInProgress:
        """Starts the step with its decodes."""
        config, budgets = self._config, self._budgets
        decodes = self._running.decoding.num_tokens if step_limits.decode else 0
        budget = budgets.max_num_batched_tokens - decodes
        step = StepInProgress(decodes, max(0, budget), config.max_num_batched_tokens - decodes)
        step.copies += self._queues.sharing.take_due()
        if self._gap_limit is not None:
            self._gap_limit.start_step(self._running.decoding)
        if decodes and budgets.prefill_share < 1:
            self._cap(step)
        return step

    def _cap(self, step: StepInProgress) -> None:
        """Caps the prefill tokens at prefill_share.

        When that would leave much of a bucket to padding, the step ends at the next smaller bucket if prompts then keep
        half of their share; otherwise `_fill` extends it to the end of the bucket.
        """
        share = max(1, int(self._budgets.prefill_share * self._budgets.max_num_batched_tokens))
        step.budget = min(step.budget, share)
        wanted = step.decodes + share
        bucket = self._buckets.token_bucket(min(wanted, self._buckets.tokens[-1]))
        if not self._config.admission.fill_buckets or bucket - wanted <= MOST_PADDING * bucket or self._gap_bound:
            return
        within = self._buckets.largest_within(wanted) - step.decodes
        if 2 * within >= share:
            step.budget = min(step.budget, within)
        else:
            step.fill = True

    @property
    def _gap_bound(self) -> bool:
        """Tells whether max_decode_gap bounds the time of the step."""
        return self._gap_limit is not None and self._gap_limit.active

    def _swap_in(self, step: StepInProgress, step_limits: StepLimits) -> None:
        """Swaps sequences back in, lowest priority key first, while slots, budget and pages last.

        Pages that running sequences need in this step are left to them, so that none is preempted for a sequence that
        returned.
        """
        pages, running = self._pages, self._running
        needed = sum(pages.missing(one, self._chunk(one, step, step_limits)) for one in running.prefilling.values())
        if step.decodes:
            needed += len(running.decoding.needing_page()) * pages.groups.count
        while (sequence := self._swapped.peek()) is not None:
            if running.lacks_row(sequence):
                self._queues.park(sequence)
                continue
            count = self._chunk(sequence, step, step_limits)
            if not count or not self._has_place(sequence, step_limits):
                return
            while not pages.fit(sequence, count, spare=needed):
                if len(running) or not self._queues.sharing.reclaim():
                    return
            self._swapped.remove(sequence)
            running.start(sequence)
            held = sequence.num_entries
            step.copies.extend(pages.swap_in(sequence))
            grown = pages.grow(sequence, count)
            assert grown, "pages that fit are not there"
            self.admitted.append(sequence)
            step.add(Chunk(sequence, count, held, admitted=True))
            self._holds_prompt(sequence)

    def _extend_decodes(self, step: StepInProgress) -> None:
        """Allocates a page to every decoding sequence that needs one, preempting sequences with a higher priority key,
        or the sequence itself when its key is the highest."""
        decoding = self._running.decoding
        needing_page = decoding.needing_page()
        if self._pages.groups.windowed:  # a window leaves no more pages than a sequence takes
            for sequence in needing_page:
                self._queues.trim(sequence)
        pages = self._pages.one_each(needing_page) if needing_page else []
        if pages is not None:
            for sequence, of_groups in zip(needing_page, pages, strict=True):
                decoding.give_pages(sequence, of_groups)
            return
        for sequence in needing_page:
            while sequence.status is RequestStatus.RUNNING:  # until it is preempted, now or for one before it
                of_groups = self._pages.one(sequence)
                if of_groups is not None:
                    decoding.give_pages(sequence, of_groups)
                    break
                self._queues.make_room(step)

    def _continue_prompts(self, step: StepInProgress, step_limits: StepLimits) -> None:
        """Schedules a chunk of every prompt in progress, preempting as `_extend_decodes` does."""
        for sequence in list(self._running.prefilling.values()):
            if sequence.status is not RequestStatus.RUNNING or sequence.request_id in step.chunks:
                continue  # preempted for a sequence before it, or back from host memory with a chunk
            count = self._chunk(sequence, step, step_limits)
            held = len(sequence.pages)
            if not count:
                continue
            while sequence.status is RequestStatus.RUNNING and not self._pages.grow(sequence, count):
                self._queues.make_room(step)
            if sequence.status is RequestStatus.RUNNING:
                step.add(Chunk(sequence, count, held))

    def _chunk(self, sequence: Sequence, step: StepInProgress, step_limits: StepLimits, fetched: int = 0) -> int:
        """Returns the number of tokens that this sequence computes in this step; 0 is none. fetched: pages of the
        prefix cache that come back from host memory for it."""
        count = self._budgeted_chunk(sequence, step, step_limits)
        if self._gap_limit is None:
            return count
        return self._gap_limit.tokens(step, sequence.num_computed, count, len(sequence.host_pages) + fetched)

    def _budgeted_chunk(self, sequence: Sequence, step: StepInProgress, step_limits: StepLimits) -> int:
        """Returns what `_chunk` does under the budget and the chunking rules alone."""
        want, budget = sequence.num_known - sequence.num_computed, max(0, step.budget)
        if step_limits.chunk is not None:
            return min(want, budget, step_limits.chunk)
        split = self._budgets.chunked and sequence.num_known > self._config.admission.chunked_prefill_min_tokens
        if split or want > self._config.max_num_batched_tokens or self._gap_bound:
            return min(want, budget, self._config.long_prefill_token_threshold or want)
        if sequence.num_computed:  # back from host memory, or begun while prompts were split
            return min(want, budget)
        whole = want <= budget or (not step.chunks and want <= step.room)
        return want if whole else 0

    def _has_place(self, sequence: Sequence, step_limits: StepLimits) -> bool:
        """Tells whether a sequence could run now, pages aside; one with a token in flight waits for its id."""
        running = self._running
        limit = min(self._budgets.max_num_seqs, self._mode.max_running)
        if sequence.num_pending or len(running.prefilling) >= step_limits.prompts or running.lacks_row(sequence):
            return False
        return not running.full and len(running) < limit

    def _admit(self, step: StepInProgress, step_limits: StepLimits, now: float, most: float) -> int:
        """Admits waiting sequences in admission order until slots, budget or pages run out. Those that lack a penalty
        row are passed over.

        Args:
            step: the step under construction.
            step_limits: the limits that the batching mode sets.
            now: the current time.
            most: maximum number of new requests.

        Returns:
            The number of new requests admitted.
        """
        joined = parked = 0
        if self._swapped.peek() is None:
            delayed = self._delayed(now)
            for sequence in self._waiting.candidates(now):
                if sequence.waits_new and (joined >= most or delayed):
                    break
                if self._may_follow and (
                    self._queues.disk_waits.begin(sequence, now) or self._queues.prefix_waits.follow(sequence)
                ):
                    continue
                if self._running.lacks_row(sequence):
                    self._queues.park(sequence)
                    parked += 1
                    if parked >= MOST_PARKED:
                        break
                    continue
                new = sequence.waits_new
                if not self._join(sequence, step, step_limits):
                    break
                joined += new
        return joined

    def _delayed(self, now: float) -> bool:
        """Tells whether new prompts are delayed so that more of them are batched together (scheduler_delay_factor)."""
        factor, oldest = self._config.admission.scheduler_delay_factor, self._waiting.oldest()
        if not factor or oldest is None or not len(self._running):
            return False
        return now - oldest < factor * self._step_times.last_prefill_seconds

    def _join(self, sequence: Sequence, step: StepInProgress, step_limits: StepLimits) -> bool:
        """Admits a waiting sequence if it fits; returns whether it did."""
        if not self._has_place(sequence, step_limits):
            lacking = "penalty rows" if self._running.lacks_row(sequence) else "slots"
            self.blocked_by = None if sequence.num_pending else lacking
            return False
        prompt, found = sequence.prompt, None
        if prompt is not None and prompt.held and not sequence.must_score:
            sequence.num_computed = prompt.num_ready_tokens
        else:
            found = self._prefix_cache.find(sequence)
            sequence.num_computed = self._prefix_cache.num_tokens(found)
        count = self._chunk(sequence, step, step_limits, 0 if found is None else len(found.host))
        copies = self._allocated(sequence, count, found) if count else None
        if copies is None:
            sequence.num_computed = 0
            self.blocked_by = "pages" if count else self.blocked_by
            return False
        self._prefix_cache.admitted(sequence, found)
        step.copies.extend(copies)
        if sequence.waits_new:
            self._policy.admitted(sequence)
        self._waiting.remove(sequence)
        self._running.start(sequence)
        self._queues.prefix_waits.lead(sequence)
        self.admitted.append(sequence)
        held = 0 if found is None else len(found)
        if prompt is not None:
            held = held or (prompt.num_shared + 1 if sequence.num_computed else 0)
            self._queues.sharing.joined(sequence, prompt)
            self._holds_prompt(sequence)
        step.add(Chunk(sequence, count, held, admitted=True))
        return True

    def _holds_prompt(self, sequence: Sequence) -> None:
        """Records a sample that comes back, or begins, with pages of all of its prompt."""
        prompt = sequence.prompt
        if prompt is None or sequence.num_computed < prompt.num_tokens:
            return
        if prompt.is_in(sequence):
            self._queues.sharing.computed(sequence, prompt)
        else:
            self._queues.sharing.moved(sequence)

    def _allocated(self, sequence: Sequence, count: int, found: FoundPages | None) -> tuple[PageCopy, ...] | None:
        """Allocates the pages of a sequence that joins, beside those that the prefix cache found; returns the copies to
        perform, or None where too few are free."""
        alone = not len(self._running)
        while (copies := self._pages.admit(sequence, count, alone, found)) is None:
            if not alone or not self._queues.sharing.reclaim(spared=sequence.prompt):
                return None
        return copies

    def _preempt_for_waiting(self, step: StepInProgress, step_limits: StepLimits, now: float) -> int:
        """Preempts running sequences for a waiting one that takes precedence; returns how many joined."""
        obstacle = self.blocked_by
        for sequence, in_turn in self._waiting.urgent(now):
            if self._may_pass(sequence) and self._preempt_for(sequence, step, step_limits, in_turn):
                return 1
            if self._queues.preempted:
                break  # not enough for it: what was taken is the next step's
            self.blocked_by = obstacle
        return 0

    def _may_pass(self, sequence: Sequence) -> bool:
        """Tells whether a new sequence may run ahead of preempted ones: it would preempt them if they were running."""
        away = [self._swapped.peek(), self._waiting.returning.peek()]
        if sequence.penalized:
            away += [self._swapped.peek_parked(), self._waiting.returning.peek_parked()]
        return all(one is None or self._queues.preemption.far_better(sequence, one) for one in away)

    def _preempt_for(self, sequence: Sequence, step: StepInProgress, step_limits: StepLimits, in_turn: bool) -> bool:
        """Preempts until a waiting sequence has joined; returns False when no running sequence (or no further one) may
        be preempted for it."""
        if self._loser(sequence, step, in_turn) is None:
            return False
        self.blocked_by = None
        while not self._join(sequence, step, step_limits):
            loser = self._loser(sequence, step, in_turn)
            if loser is None:
                return False
            if self._take_chunk(loser, sequence, step, step_limits):
                return True
            if self.blocked_by is None:
                return False  # it has a place, and tokens as soon as a step has some left
            self._queues.preempt(loser, step)
            self.blocked_by = None
        return True

    def _loser(self, sequence: Sequence, step: StepInProgress, in_turn: bool) -> Sequence | None:
        """Selects the running sequence to preempt for a waiting one, or None; pages alone are a reason only when it is
        first in turn."""
        queues, short_of_pages, spared = self._queues, in_turn and self.blocked_by == "pages", step.joined
        if queues.running.lacks_row(sequence):
            spared |= {one.request_id for one in queues.running.sequences if one.penalty_row is None}
        return queues.preemption.running_to_preempt(queues.running, sequence, short_of_pages, spared=spared)

    def _take_chunk(self, loser: Sequence, sequence: Sequence, step: StepInProgress, step_limits: StepLimits) -> bool:
        """Admits a waiting sequence in place of a running one's chunk, which is deferred to the next step.

        Returns False, and changes nothing, when more than that chunk stands in the way.
        """
        chunk = step.chunks.get(loser.request_id)
        if chunk is None or self._has_budget(step) or not self._has_place(sequence, step_limits):
            return False
        pages = self._pages
        pages.give_back(loser, chunk.held)
        step.drop(loser)
        if self._join(sequence, step, step_limits):
            return True
        grown = pages.grow(loser, chunk.count)
        assert grown, "pages that were given back are not there"
        step.add(chunk)
        return False

    def _has_budget(self, step: StepInProgress) -> bool:
        """Tells whether the step may compute another prompt token."""
        return step.budget > 0 and (self._gap_limit is None or self._gap_limit.tokens(step, 0, 1) > 0)

    def _fill(self, step: StepInProgress, step_limits: StepLimits, now: float, most: float) -> int:
        """Fills the bucket's padding with prompt tokens: first of prompts that a cap cut short, then of up to `most`
        new requests.

        Returns:
            The number of new requests admitted.
        """
        if not step.chunks or not self._budgets.chunked or step_limits.chunk is not None:
            return 0
        spare = self._buckets.token_bucket(step.num_tokens) - step.num_tokens
        threshold = self._config.long_prefill_token_threshold
        for chunk in step.chunks.values():
            sequence = chunk.sequence
            count = min(spare, sequence.num_known - sequence.num_computed - chunk.count)
            if threshold:
                count = min(count, threshold - chunk.count)
            if count > 0 and self._pages.grow(sequence, chunk.count + count):
                step.extend(chunk, count)
                spare -= count
        if not spare or self._queues.preempted:
            return 0
        step.budget = spare
        return self._admit(step, step_limits, now, most)
