"""Decides one step at a time: which requests run, how many tokens each computes, on which pages.

    schedule   sequences whose last token is sampled leave; swapped ones return; decoding ones get a token each;
               prompts in progress continue; waiting ones are admitted; padding of the bucket is filled
    update     the sampled ids are appended; finished sequences leave

The rules are in files of their own: modes.py (which work a step may hold), admission_order.py (which requests join),
policies/ (in which order), preemption.py (which ones are preempted), budgets.py (how many tokens). step_builder.py
builds a step from them.

Decoding sequences are columns (`DecodingSet`): a step updates all of them with a few numpy calls, whatever their
number. The scheduler itself handles the others, and those that allocate a page, end or are preempted.

The engine dispatches a step before it has read the ids of the one before, so it counts tokens whose ids are not known
yet. A sequence that turns out to have stopped is dropped at `update`, along with what the step in flight computed for
it.

Source of the iteration-level design: Orca (OSDI 2022); of paging, recompute and swap preemption: vLLM (SOSP 2023); of
chunked prefill mixed with decodes: Sarathi-Serve (OSDI 2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from collections.abc import Sequence as List

from jaxserve.config.failpoints import Hit
from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.kv_cache.page_groups import PageGroups
from jaxserve.kv_cache.page_pool import PageCopy, PagePool, PageState
from jaxserve.request import EngineRequest, FinishReason
from jaxserve.scheduler.batch_barrier import BatchBarrier
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.budgets import Budgets
from jaxserve.scheduler.deadline_check import DeadlineCheck
from jaxserve.scheduler.decode_gap import DecodeGap
from jaxserve.scheduler.disk_waits import DiskWaits
from jaxserve.scheduler.gap_monitor import CAUSES
from jaxserve.scheduler.host_fetches import HostFetches
from jaxserve.scheduler.length_prediction import OutputLengthPredictor
from jaxserve.scheduler.modes import MODES
from jaxserve.scheduler.plan import FastForward, StepPlan, StepResult, Wants
from jaxserve.scheduler.policies.named import POLICIES
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.scheduler.prefix_cache import PrefixCache, PrefixCounts
from jaxserve.scheduler.prefix_costs import PrefixPredictor, StepSeconds, by_tokens
from jaxserve.scheduler.prefix_waits import WaitCounts
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.sequence_queues import SequenceQueues
from jaxserve.scheduler.step_builder import StepBuilder
from jaxserve.scheduler.step_results import StepResults
from jaxserve.scheduler.step_shape import StepShape
from jaxserve.scheduler.step_time_estimator import StepTimeEstimator
from jaxserve.scheduler.update import SequenceUpdate, StepUpdate


class Scheduler:
    """Owns the waiting, running and swapped sequences and the page pool's use.

    Times are seconds on the clock of the requests' arrival times and deadlines. costs: the measured costs of
    preemption, if any.
    max_model_len: tokens of the longest sequence, for page_reservation "max_model_len". tokens_per_step: maximum tokens
    of a decoding row; more than one when the device drafts tokens and reports how many were accepted. step_seconds:
    predicts the time of a step, for max_decode_gap. allocation_hit: passes the failpoint "allocate" whenever pages are
    allocated to a sequence; None where there is none. content_keys: identify the content of pages, so that requests
    share them; None where they do not. group_windows: of each group of layers, the positions that they attend to; None
    for all.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PagePool,
        buckets: Buckets,
        *,
        costs: PreemptionCosts | None = None,
        max_model_len: int | None = None,
        tokens_per_step: int = 1,
        step_seconds: Callable[[StepShape], float] | None = None,
        allocation_hit: Hit | None = None,
        content_keys: ContentKeys | None = None,
        group_windows: tuple[int | None, ...] = (None,),
    ):
        needed, rows = config.max_num_seqs * tokens_per_step, buckets.rows[-1] if tokens_per_step > 1 else None
        for name, limit in (("max_num_batched_tokens", config.max_num_batched_tokens), ("row_buckets", rows)):
            if limit is not None and needed > limit:
                raise ValueError(
                    f"{name} ends at {limit}; max_num_seqs {config.max_num_seqs} rows of {tokens_per_step} tokens need "
                    f"{needed}: raise it"
                )
        self._config = config
        self._buckets = buckets
        self._step_times = StepTimeEstimator()
        self._budgets = Budgets(config)
        self.policy = POLICIES[config.policy](config.ordering, self._step_times)
        self._mode = MODES[config.mode](config, self.policy)
        self._deadline_check = DeadlineCheck(config, self._step_times, tokens_per_step)
        groups = self.page_groups = PageGroups(pool.page_size, group_windows, buckets.tokens[-1])
        self._queues = SequenceQueues(
            config,
            self.policy,
            self._mode.formation,
            pool,
            costs,
            max_model_len,
            tokens_per_step,
            allocation_hit,
            deadline_check=self._deadline_check,
            groups=groups,
            prefix_cache=PrefixCache(
                pool, content_keys, groups, HostFetches.configured(config, step_seconds, costs, buckets)
            ),
            predictor=None if not config.admission.wait_for_prefix else self._predictor(step_seconds or by_tokens),
        )
        pool.cached.by_group = [0] * groups.count if groups.count > 1 else []
        self.decode_gap = DecodeGap.configured(config, step_seconds, buckets)
        self._builder = StepBuilder(
            config,
            buckets,
            self._budgets,
            self._mode,
            self.policy,
            self._queues,
            self._step_times,
            None if self.decode_gap is None else self.decode_gap.limit,
        )
        self._sequences: dict[str, Sequence] = {}
        self._barrier = BatchBarrier()
        self._arrivals = 0
        self._steps = 0
        self._steady = False
        self.pool = pool
        self.predictor = OutputLengthPredictor(config.prediction)
        self._priorities_seen = (0, 0)  # lowest and highest
        self._results = StepResults(
            self._sequences,
            self._queues,
            self._barrier,
            holds=self._mode.holds,
            policy=self.policy,
            learn=lambda request, length, expected: self.predictor.observe(request, length, expected),
            decode_gap=self.decode_gap,
        )

    @property
    def num_waiting(self) -> int:
        return len(self._queues.waiting) + self._queues.waiting.num_withheld

    @property
    def num_running(self) -> int:
        return len(self._queues.running)

    @property
    def num_swapped(self) -> int:
        return len(self._queues.swapped)

    @property
    def preempted(self) -> list[Sequence]:
        """Returns the sequences preempted by the last `schedule`; their status is PREEMPTED (recompute) or SWAPPED."""
        return self._queues.preempted

    @property
    def admitted(self) -> list[Sequence]:
        """Returns the sequences that the last `schedule` admitted or brought back."""
        return self._builder.admitted

    @property
    def num_preemptions_by_kind(self) -> dict[str, int]:
        """Returns the number of preemptions since the start by kind, "recompute" and "swap"."""
        return dict(self._queues.preemptions)

    @property
    def num_preemptions(self) -> int:
        return sum(self._queues.preemptions.values())

    @property
    def num_pages_by_group(self) -> list[int]:
        """Returns the number of pages in the tables of all sequences, for each group of layers; O(running). Pages that
        sequences share count for each of them."""
        held = [0] * self.page_groups.count
        for sequence in self._queues.running.sequences:
            for group, left in enumerate(sequence.left):
                held[group] += len(sequence.pages) - left
        return held

    @property
    def group_pages(self) -> tuple[tuple[int, int, int], ...]:
        """Returns for each group of layers its window (0 for none), the pages in the tables of running sequences, as
        `num_pages_by_group`, and the cached pages; empty where there is one group. O(running)."""
        windows = [window or 0 for window in self.page_groups.windows]
        cached = self.pool.cached.by_group
        return tuple(zip(windows, self.num_pages_by_group, cached, strict=True)) if cached else ()

    @property
    def prefix_counts(self) -> PrefixCounts:
        """Returns the counts of the prefix cache since the start."""
        return self._queues.prefix_cache.counts

    @property
    def prefix_cache(self) -> PrefixCache:
        return self._queues.prefix_cache

    @property
    def num_gaps_exceeded(self) -> dict[str, int]:
        """Returns by cause the number of gaps between tokens that exceeded max_decode_gap since the start."""
        return dict.fromkeys(CAUSES, 0) if self.decode_gap is None else dict(self.decode_gap.monitor.exceeded)

    @property
    def profile(self) -> str:
        """Returns the name of the load-dependent profile in force, or ""."""
        return self._budgets.profile

    @property
    def unfinished(self) -> bool:
        return bool(self._sequences)

    @property
    def request_ids(self) -> list[str]:
        """Returns the ids of the unfinished requests, in order of arrival."""
        return list(self._sequences)

    def __contains__(self, request_id: str) -> bool:
        """Tells whether a request is unfinished."""
        return request_id in self._sequences

    @property
    def wait_counts(self) -> WaitCounts:
        """Returns the counts of requests that waited for a prefix since the start."""
        return self._queues.prefix_waits.counts

    def flush_prefix_cache(self) -> int:
        """Forgets all computed pages; returns how many became free. O(unfinished requests + pages).

        Requests that run keep theirs, and commit them again with the next page that they fill.
        """
        for sequence in self._sequences.values():
            sequence.num_committed = 0
        self._queues.disk_waits.release_all()
        return self._queues.prefix_cache.forget("flush")

    @property
    def disk_waits(self) -> DiskWaits:
        return self._queues.disk_waits

    def add(self, request: EngineRequest, wants: Wants = Wants.NONE) -> Sequence:
        """Puts a request in the waiting queue.

        Args:
            request: the request.
            wants: what each of its samples wants.

        Raises:
            ValueError: its id is in use, or the server is full: max_num_seqs requests are running (or about to) and
                max_num_waiting are queued behind them.
        """
        self._check_new((request,))
        sequence = self._sequence(request, wants)
        self._queues.waiting.push(sequence)
        return sequence

    def add_samples(self, requests: List[EngineRequest], wants: List[Wants]) -> list[Sequence]:
        """Puts requests of one prompt in the waiting queue, so that it is computed once and its pages are shared.

        Args:
            requests: at least one; they differ in what decides their samples.
            wants: what the samples of each want.

        Raises:
            ValueError: as `add` does, for any of them; then none is added.
        """
        self._check_new(requests)
        sequences = [self._sequence(request, want) for request, want in zip(requests, wants, strict=True)]
        self._queues.sharing.add(sequences)
        return sequences

    def _predictor(self, seconds: StepSeconds) -> PrefixPredictor:
        budget, threshold = self._config.max_num_batched_tokens, self._config.long_prefill_token_threshold
        return PrefixPredictor(seconds, self._buckets, pace=min(budget, threshold or budget), budget=budget)

    def _check_new(self, requests: List[EngineRequest]) -> None:
        """Raises ValueError where `add` does."""
        names = {request.request_id for request in requests}
        for request in requests:
            if request.request_id in self._sequences or len(names) < len(requests):
                raise ValueError(f"request_id {request.request_id!r} is in use; ids of unfinished requests must differ")
        if len(self._sequences) + len(requests) > self._config.max_num_seqs + self._config.max_num_waiting:
            raise ValueError(
                f"{len(self._sequences)} requests are unfinished; max_num_seqs {self._config.max_num_seqs} and "
                f"max_num_waiting {self._config.max_num_waiting} allow no {len(requests)} more: retry later"
            )

    def _sequence(self, request: EngineRequest, wants: Wants) -> Sequence:
        """Returns the record of a new request."""
        sequence = Sequence(request, self._arrivals, 1.0 if request.pooling else self.predictor.expected(request))
        self._queues.pages.open(sequence)
        sequence.wants = int(wants)
        self._queues.prefix_order.arrived(sequence)
        sequence.tenant_number = self.policy.tenant_number(request.options.tenant)
        self._arrivals += 1
        self._sequences[request.request_id] = sequence
        self._queues.changed = True
        lowest, highest = self._priorities_seen
        self._priorities_seen = min(lowest, request.options.priority), max(highest, request.options.priority)
        self._budgets.arrived(sequence.num_prompt_tokens)
        return sequence

    def abort(self, request_id: str) -> SequenceUpdate | None:
        """Ends a request and frees its pages at once; returns None when the id is not (or no longer) known."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else self._results.finish(sequence, FinishReason.ABORT)

    def fail(self, request_id: str, error: str) -> SequenceUpdate | None:
        """Ends a request that cannot be computed and frees its pages at once.

        Ids that a step in flight samples for it are dropped at `update`.

        Args:
            request_id: id of the request.
            error: one line for the client, with finish reason ERROR.

        Returns:
            The update, or None when the id is not (or no longer) known.
        """
        sequence = self._sequences.get(request_id)
        return None if sequence is None else self._results.finish(sequence, FinishReason.ERROR, error)

    def complete(self, request_id: str) -> SequenceUpdate | None:
        """Ends a request whose output is complete, so that no token can follow, with STOP.

        The token that a step in flight samples for it is dropped at `update`. Returns None when the id is not (or no
        longer) known.
        """
        sequence = self._sequences.get(request_id)
        return None if sequence is None else self._results.end(sequence, FinishReason.STOP, ())

    @property
    def lost_copies(self) -> tuple[PageCopy, ...]:
        """Returns the copies of pages that the last `schedule` had decided when it raised an error."""
        return self._builder.copies

    def restart(self, lost: Iterable[PageCopy]) -> list[Sequence]:
        """Preempts, for recomputation, every sequence that holds device pages, whose content is lost. O(unfinished
        requests).

        Other pages in host memory stay valid, cached ones too.

        Args:
            lost: copies of the plans whose ids will not arrive, none of which has taken place. Their tokens are sampled
                again (a policy that counts tokens has already counted them).

        Returns:
            The preempted sequences.
        """
        lost_pages = {copy.destination for copy in lost if copy.destination_tier is PageState.HOST}
        self._queues.sharing.lost()
        self._queues.prefix_cache.forget()
        self.pool.lost_copies(lost_pages)
        self._queues.disk_waits.release_all()
        going_on = [sequence for name, sequence in self._sequences.items() if name not in self._barrier]
        preempted = [sequence for sequence in going_on if self._queues.restart(sequence, lost_pages)]
        for sequence in going_on:
            sequence.score_again()
        self._queues.sharing.settle()
        self._steady = False
        self._step_times.begins(None, 0.0)
        if self.decode_gap is not None:
            self.decode_gap.monitor.restarted([sequence.order for sequence in preempted])
        return preempted

    def expire(self, now: float) -> list[SequenceUpdate]:
        """Ends waiting requests that have missed their deadline or cannot meet it, before they cost a prefill.

        Also returns the final outputs of a static batch that has ended otherwise than by a step.
        """
        ended = self._results.let_go() if self._barrier else []
        while (sequence := self._queues.waiting.expired(now)) is not None:
            late = now - (sequence.request.options.deadline or now)
            ended.append(
                self._results.finish(sequence, FinishReason.DEADLINE, error=f"deadline passed {late:.3f} s ago")
            )
        while (sequence := self._queues.waiting.late(now)) is not None:
            if sequence.request.options.deadline is None and not self._config.ordering.drop_late:
                self._queues.waiting.demote(sequence)
                continue
            error = self._deadline_check.error(sequence, now, self.policy.due)
            ended.append(self._results.finish(sequence, FinishReason.DEADLINE, error=error))
        return ended

    def schedule(self, now: float = 0.0) -> StepPlan | None:
        """Decides the next step; returns None when there is nothing to compute now (see `wake_at`).

        Raises:
            PageAllocationError: the pages of one sequence cannot be allocated. Its request must be ended (`fail`) and
                the others restarted (`restart`, with `lost_copies`), as for a step that was dispatched and is lost.
        """
        self._step_times.ends(now)
        self._commit_pages()
        self._queues.start_step()
        self._budgets.update(len(self._sequences))
        try:
            plan = self._builder.build(now, self._steps)
        finally:
            if self._mode.holds:
                for sequence in self._builder.admitted:
                    self._barrier.joined(sequence, self._steps)
        self._queues.prefix_cache.planned(plan)
        self._queues.prefix_cache.fetches.planned(plan, now)
        if plan is not None:
            self._queues.prefix_waits.planned(plan)
        self._step_times.begins(plan, now)
        if self.decode_gap is not None:
            preempted = [sequence.order for sequence in self._queues.preempted]
            self.decode_gap.planned(self._steps, plan, now, preempted)
        self._steps += plan is not None
        self._steady = plan is not None and not plan.chunks
        return plan

    def wake_at(self) -> float | None:
        """Returns the time at which an idle `schedule` may next have something to do without a new event; None is
        never."""
        return self._mode.wake_at(self._queues.waiting) if self._queues.waiting.new else None

    def update(self, plan: StepPlan, result: StepResult, now: float | None = None) -> StepUpdate:
        """Appends the sampled ids of `plan` to their sequences and returns what changed. Ids of ended sequences are
        dropped.

        Args:
            plan: the step.
            result: its ids.
            now: the time at which they were there, for max_decode_gap; None where nobody measures it.
        """
        if self._queues.prefix_cache.planned_step == plan.step:  # no other was planned while it ran
            self._commit_pages()
        update = self._results.apply(plan, result)
        if self.decode_gap is None or now is None:
            return update
        going_on = update.request_ids if update.scored is None else update.request_ids + update.scored.request_ids
        orders = [self._sequences[request_id].order for request_id in going_on]
        orders += [other.sequence.order for other in update.others if other.token_ids]
        gaps = self.decode_gap.collected(plan, orders, now)
        for other in update.others:
            if other.sequence.finished:
                self.decode_gap.monitor.ended(other.sequence.order)
        return dataclasses.replace(update, gaps=gaps) if gaps else update

    def _commit_pages(self) -> None:
        """Commits the pages that the step planned last fills, and tells those that wait for them."""
        for sequence in self._queues.prefix_cache.commit(self._results.owner):
            self._queues.prefix_waits.committed(sequence)
        self._queues.prefix_order.update()

    def masked_sequences(self, plan: StepPlan) -> list[Sequence | None]:
        """Returns the sequence of each sample of `plan` that wants a mask, in order; None for those that have ended.
        If the step before has been passed to `update`, all tokens before that sample are known."""
        owners = {row.slot: (row.request_id, row.order) for row in (*plan.rows, *plan.forks)}
        return [self._results.owner(*owners[slot]) for slot in plan.samples.slots[plan.samples.masked].tolist()]

    def fast_forward_steps(self) -> int:
        """Returns the number of coming steps that only decode the same rows, if nothing arrives and no stop id is
        sampled.

        In these steps no sequence joins, ends or is preempted, and the pages they need are free. Returns 0 when that is
        not certain. A simulation may take all of them at once with `advance`. No plan may be in flight whose update
        ends a row.
        """
        queues = self._queues
        if not self._steady or queues.changed or queues.counts.preempted or queues.pages.reserves:
            return 0
        if not queues.pages.groups.alike:
            return 0  # pages come and go while the rows stay
        if not len(queues.running.decoding) or not self._mode.steady:
            return 0
        if self.decode_gap is not None or (len(queues.waiting) and not self._obstacle_stays()):
            return 0
        return queues.running.decoding.fast_forward_steps(self.pool.num_available)

    def advance(self, steps: int, token_ids: list[int], begins: Iterable[float] = ()) -> FastForward:
        """Does what `steps` times `schedule` and `update` do, with the same id sampled in a row each time; the final
        state is the same.

        Args:
            steps: number of steps, at most `fast_forward_steps`.
            token_ids: the id sampled in each row, in the order of the last plan's.
            begins: the time of each `schedule`, from which step times are learned.
        """
        decoding = self._queues.running.decoding
        pages = self.pool.allocate(decoding.pages_needed(steps))
        assert pages is not None, "more steps than are steady"
        if self.policy.counts_tokens:
            self.policy.decoded(decoding.tenants(), steps)
        self._step_times.decodes(len(decoding), begins)
        self._steps += steps
        return decoding.repeat(steps, token_ids, pages)

    def check_integrity(self) -> None:
        """Asserts invariant 1 of the design and that every sequence is in exactly one queue."""
        self._barrier.check_integrity(set(self._sequences))
        self._queues.check_integrity(list(self._sequences.values()), self.pool)

    def _obstacle_stays(self) -> bool:
        """Tells whether waiting sequences will stay blocked, whatever the time, until a request arrives or leaves."""
        blocked_by, waiting = self._builder.blocked_by, self._queues.waiting
        if self.policy.clocked or waiting.timed or self._config.admission.scheduler_delay_factor:
            return False
        if self._mode.closed:
            return True
        if self.policy.timeless and self._config.formation == "greedy":
            return blocked_by is not None
        return blocked_by == "slots" and not self._queues.preemption.preempts_for(*self._priorities_seen)
