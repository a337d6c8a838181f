"""Random histories of a scheduler over a small pool: arrivals, aborts, deadlines, a clock, one step in flight.

`run_history` draws settings and events from a seed, drives the scheduler over the fake runner as the engine does, and
checks after every step what must hold whatever the settings: the accounts of the pool, who may join before whom (a
brute force over all that wait), that a request ends once and that its tokens are those worked out alone.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

from jaxserve.config.scheduling import (
    PAGE_RESERVATIONS,
    PHASE_ORDERS,
    PREEMPTION_MODES,
    VICTIMS,
    AdaptationConfig,
    AdmissionConfig,
    BatchingConfig,
    PolicyConfig,
    PreemptionConfig,
    SchedulerConfig,
)
from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.kv_cache.page_groups import PageGroups
from jaxserve.kv_cache.page_pool import PagePool, PageState
from jaxserve.request import EngineRequest, FinishReason, RequestOptions, RequestStatus
from jaxserve.runner.fake import FakeRunner
from jaxserve.scheduler import Scheduler, SequenceUpdate, StepPlan
from jaxserve.scheduler.buckets import Buckets, powers
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.scheduler.sequence import Sequence
from tests.scheduler.drive import alone, dispatch
from tests.scheduler.order_model import OrderModel

PAGE_SIZE = 4
TENANTS = {"a": 1.0, "b": 2.0, "c": 0.5}  # and their weights: powers of two, so that counters are exact
MAX_STEPS_TO_DRAIN = 3_000
"""A history that has not ended by then makes no progress."""


class History:
    """One scheduler, its runner and what came of each request. events: how often each kind of thing happened."""

    def __init__(
        self, rng: random.Random, mode: str, formation: str, policy: str, windows: tuple[int | None, ...] = (None,)
    ):
        self.rng, self.windows = rng, windows
        self.events: Counter[str] = Counter()
        self.now = 100.0
        self.config = with_gap(random.Random(f"gap {rng.getstate()[1][0]}"), draw_config(rng, mode, formation, policy))
        num_pages, host_pages = rng.randint(7, 20), rng.choice((0, 8, 24, 24))
        num_pages, host_pages = num_pages * len(windows), host_pages * len(windows)
        buckets = Buckets(powers(self.config.max_num_batched_tokens), powers(self.config.max_num_seqs))
        groups = PageGroups(PAGE_SIZE, windows, buckets.tokens[-1])
        self.capacity = groups.pool_tokens(num_pages - 1, 30 * PAGE_SIZE)
        self.caches = random.Random(f"cache {rng.getstate()[1][1]}").random() < 0.8
        tiers = random.Random(f"tiers {rng.getstate()[1][2]}").random() < 0.7  # evicted pages move to the host
        self.scheduler = Scheduler(
            self.config,
            PagePool(num_pages, PAGE_SIZE, host_pages, caches_on_host=tiers),
            buckets,
            costs=rng.choice((None, PreemptionCosts(1.0, 0.5), PreemptionCosts(1.0, 3.5), PreemptionCosts(1.0, 9.0))),
            max_model_len=self.capacity,
            step_seconds=lambda shape: (
                1e-3 * (4 + shape.token_bucket + shape.prefill_context / 4 + shape.swapped_pages)
            ),
            content_keys=ContentKeys(b"secret") if self.caches else None,
            group_windows=windows,
        )
        self.runner = FakeRunner(
            num_pages=num_pages, page_size=PAGE_SIZE, num_host_pages=host_pages, group_windows=windows
        )
        self.order = OrderModel(self.config, self.scheduler.policy)
        self.requests: dict[str, EngineRequest] = {}
        self.sequences: dict[str, Sequence] = {}
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.in_flight: tuple[StepPlan, Any] | None = None

    def run(self, steps: int) -> None:
        """So many steps with events, then as many as it takes until nobody is left."""
        while self.events["steps"] < steps:
            self.act()
            self.step()
        for _ in range(MAX_STEPS_TO_DRAIN):
            if not self.scheduler.unfinished and self.in_flight is None:
                break
            self.step()
        else:
            raise AssertionError(f"no progress: {self.scheduler.request_ids}")
        self.check_answers()
        self.events["waited for a prefix"] = self.scheduler.wait_counts.waited
        self.events["waited in vain"] = self.scheduler.wait_counts.waited_in_vain
        self.events["did not wait for a prefix"] = self.scheduler.wait_counts.computed
        self.events["passed over"] = self.order.passed
        fetches = self.scheduler.prefix_cache.fetches.counts
        self.events["fetched"], self.events["not fetched"] = fetches.fetched, fetches.computed
        self.events["host evictions"] = sum(self.scheduler.pool.host.evictions.values())

    def act(self) -> None:
        """What clients do between two steps."""
        rng = self.rng
        self.now += rng.choice((0.0, 0.001, 0.01, 0.05, 0.3))
        backlog = len(self.scheduler.request_ids)
        for _ in range(rng.choice((0, 0, 1, 1, 4)) if backlog < 10 else rng.choice((0, 0, 0, 0, 1))):
            self.arrive()
        if rng.random() < 0.04 and self.scheduler.unfinished:
            rare = (RequestStatus.SWAPPED, RequestStatus.PREEMPTED, RequestStatus.ENDING)
            request_ids = self.scheduler.request_ids
            in_rare_places = [name for name in request_ids if self.sequences[name].status in rare]
            request_id = rng.choice(in_rare_places or request_ids)
            status = self.sequences[request_id].status
            update = self.scheduler.abort(request_id)
            assert update is not None
            self.events[f"aborted {status.name.lower()}"] += 1
            self.take(update)

    def arrive(self) -> None:
        rng = self.rng
        longest = self.capacity if self.config.enable_chunked_prefill else self.config.max_num_batched_tokens
        prompt = rng.randint(1, min(longest, self.capacity, rng.choice((6, 24, 60))))
        output = rng.randint(1, min(rng.choice((4, 24)), self.capacity - prompt + 1))
        request = EngineRequest(
            f"r{len(self.requests)}",
            self.prompt(prompt),
            max_tokens=output,
            min_tokens=rng.randint(0, min(3, output)),
            stop_token_ids=tuple(sorted(rng.sample(range(101), rng.choice((0, 3, 12))))),
            options=RequestOptions(
                priority=rng.choice((0, 0, 3, 5, 8, 12)),
                tenant=rng.choice(list(TENANTS)),
                deadline=self.now + rng.uniform(0.1, 4.0) if rng.random() < 0.1 else None,
            ),
            arrival_time=self.now,
        )
        try:
            sequence = self.scheduler.add(request)
        except ValueError:
            self.events["refused"] += 1
            return
        self.events["arrived"] += 1
        self.requests[request.request_id], self.sequences[request.request_id] = request, sequence
        self.tokens[request.request_id] = []
        self.order.add(sequence)

    def prompt(self, length: int) -> tuple[int, ...]:
        """A prompt that begins, most of the time, as an earlier one and its output so far, or as a part of these."""
        rng, begun = self.rng, []
        if self.requests and rng.random() < 0.7:
            earlier = rng.choice(list(self.requests))
            begun = [*self.requests[earlier].prompt_token_ids, *self.tokens[earlier]]
            begun = begun[: rng.randint(len(begun) // 2, len(begun))][: length - 1]
        return (*begun, *(rng.randrange(101) for _ in range(length - len(begun))))

    def step(self) -> None:
        """A turn of the engine's loop."""
        scheduler, previous = self.scheduler, self.in_flight
        for update in scheduler.expire(self.now):
            self.events["expired"] += update.finish_reason is FinishReason.DEADLINE
            self.take(update)
        unfinished = [one for one in self.sequences.values() if one.request_id not in self.reasons]
        self.ran = [one for one in unfinished if one.status is RequestStatus.RUNNING]
        away = [one for one in unfinished if one.status in (RequestStatus.PREEMPTED, RequestStatus.SWAPPED)]
        self.swapped = {one.request_id for one in away if one.status is RequestStatus.SWAPPED}
        plan = scheduler.schedule(self.now)
        scheduler.check_integrity()
        all_back = all(one.status is RequestStatus.RUNNING for one in away)
        self.away = [] if all_back else away
        self.in_flight = None if plan is None else (plan, dispatch(self.runner, plan))
        self.check_plan(plan)
        if previous is not None:
            update = scheduler.update(previous[0], self.runner.collect(previous[1]), self.now)
            self.events["gap exceeded"] += sum(gap.count for gap in update.gaps)
            for request_id, token_id in zip(update.request_ids, update.token_ids, strict=True):
                assert request_id not in self.reasons, "a token after the end"
                self.tokens[request_id].append(token_id)
            for other in update.others:
                self.take(other)
            scheduler.check_integrity()
        elif plan is None and scheduler.unfinished:
            self.sleep()

    def sleep(self) -> None:
        """Nothing runs although somebody waits: the scheduler must know until when."""
        self.events["slept"] += 1
        wake_at = self.scheduler.wake_at()
        assert wake_at is not None, f"asleep for ever: {self.scheduler.request_ids}"
        assert wake_at > self.now, "asleep with something to do"
        self.now = wake_at

    def take(self, update: SequenceUpdate) -> None:
        request_id = update.sequence.request_id
        assert request_id not in self.reasons, "an update after the end"
        self.tokens[request_id].extend(update.token_ids)
        if update.finish_reason is not None:
            self.reasons[request_id] = update.finish_reason
            self.events[f"ended {update.finish_reason.name.lower()}"] += 1
            self.order.remove(update.sequence)

    def check_plan(self, plan: StepPlan | None) -> None:
        scheduler, events = self.scheduler, self.events
        joined = self.order.step(scheduler.admitted, plan, self.now, self.ran, self.away)
        for sequence in scheduler.preempted:
            events["swapped out" if sequence.status is RequestStatus.SWAPPED else "recomputed"] += 1
        events["displaced"] += bool(joined and scheduler.preempted)
        if plan is None:
            return
        events["steps"] += 1
        rows = plan.rows
        assert plan.num_tokens == sum(row.num_tokens for row in rows) <= self.config.max_num_batched_tokens
        assert plan.num_rows == len({row.slot for row in rows}) <= self.config.max_num_seqs
        assert plan.num_sampled == len(plan.sampled)
        assert plan.num_tokens <= plan.token_bucket
        assert plan.num_sampled <= plan.row_bucket
        chunks = {row.request_id: row for row in plan.chunks}
        if self.config.mode == "separated":
            assert len(chunks) <= self.config.batching.max_prefill_seqs, (
                "more prompts in a step than its phase may have"
            )
        back = {copy.destination for copy in plan.copies if copy.source_tier is PageState.HOST}
        written = {page for write in plan.table_writes for page in write.pages}
        assert back <= written, "a page is back that no table knows"
        for slot in {write.slot for write in plan.table_writes}:
            pages = {page for write in plan.table_writes if write.slot == slot for page in write.pages}
            (chunk,) = (row for row in plan.chunks if row.slot == slot)  # a sequence is back, so it has a chunk
            swapped = chunk.request_id in self.swapped
            assert pages <= back if swapped else self.caches, "pages are entered that nobody computed"
            events["swapped in" if swapped else "hit"] += 1
            events["host hit"] += bool(pages & back) and not swapped
            assert chunk.admit is self.requests[chunk.request_id]
            for group, window in enumerate(self.windows):
                runs = [one for one in plan.table_writes if (one.slot, one.group) == (slot, group)]
                ends = [0, *(one.first + len(one.pages) for one in runs)]
                assert ends[-1] in ((0, chunk.first_new_page) if window else (chunk.first_new_page,))
                assert window or [one.first for one in runs] == ends[:-1], "a page without a window is not entered"
        events["mixed"] += bool(len(plan.decodes) and plan.chunks)
        events["chunked"] += plan.num_sampled < plan.num_rows
        events["several chunks"] += len(plan.chunks) > 1

    def check_answers(self) -> None:
        """Every request ended once, with the tokens that it has alone; who was cut off has the first of them."""
        assert set(self.reasons) == set(self.requests)
        for request_id, request in self.requests.items():
            tokens, reason = alone(request, windows=self.windows)
            if self.reasons[request_id] in (FinishReason.ABORT, FinishReason.DEADLINE):
                assert self.tokens[request_id] == tokens[: len(self.tokens[request_id])]
            else:
                assert (self.tokens[request_id], self.reasons[request_id]) == (tokens, reason)
        pool = self.scheduler.pool
        assert (pool.num_free + pool.num_cached, pool.num_host_used) == (pool.num_usable, 0)
        assert self.caches or not pool.num_cached


def draw_config(rng: random.Random, mode: str, formation: str, policy: str) -> SchedulerConfig:
    """Settings of every section, small enough that each limit is met often."""
    seqs = rng.randint(1, 6)
    chunked = rng.random() < 0.75
    return SchedulerConfig(
        max_num_seqs=seqs,
        max_penalty_rows=1 + seqs // 2,
        max_num_batched_tokens=rng.choice((8, 16, 24, 40)),
        enable_chunked_prefill=chunked,
        long_prefill_token_threshold=rng.choice((0, 0, 3, 7)) if chunked else 0,
        mode=mode,
        formation=formation,
        policy=policy,
        max_num_waiting=rng.choice((3, 20)),
        batching=BatchingConfig(
            batch_size=rng.randint(1, 5),
            max_wait_seconds=rng.choice((0.0, 0.05, 0.5)),
            length_bucket=rng.choice((4, 16)),
            phase_order=rng.choice(PHASE_ORDERS),
            max_prefill_seqs=rng.randint(1, 3),
            max_decode_seqs=rng.randint(1, 6),
        ),
        admission=AdmissionConfig(
            watermark=rng.choice((0.0, 0.0, 0.2)),
            page_reservation=rng.choice(("none", "none", *PAGE_RESERVATIONS)),
            prefill_share=rng.choice((1.0, 1.0, 0.2, 0.6)),
            fill_buckets=rng.random() < 0.5,
            scheduler_delay_factor=rng.choice((0.0, 0.0, 0.5, 2.0)),
            chunked_prefill_min_tokens=rng.choice((0, 0, 6)),
            length_tolerance=0.2,
            max_passed_over_seconds=rng.choice((0.2, 3.0)),
        ),
        ordering=PolicyConfig(
            sjf_ageing=rng.choice((1.0, 10.0)),
            prefix_match_seconds=2.0,
            tenant_weights=TENANTS,
            ttft_target=rng.choice((0.2, 1.0)),
            drop_late=rng.random() < 0.3,
        ),
        preemption=PreemptionConfig(
            preemption_mode=rng.choice(("swap", *PREEMPTION_MODES)),
            victim=rng.choice(VICTIMS),
            preempt_priority_gap=rng.choice((None, 5, 5)),
            preempt_length_ratio=rng.choice((None, None, 3.0)),
            preempt_for_pages=rng.random() < 0.4,
        ),
        adaptation=AdaptationConfig(
            adaptive_batch_size=rng.random() < 0.2,
            target_batch_tokens=40,
            min_batch_size=1,
            load_profile=rng.random() < 0.2,
            latency_tokens=8,
            balanced_tokens=16,
            throughput_tokens=32,
        ),
    )


def with_gap(rng: random.Random, config: SchedulerConfig) -> SchedulerConfig:
    """Sets max_decode_gap in some histories where it may be: from what allows the smallest chunks only to no limit."""
    if not config.enable_chunked_prefill or config.mode in ("static", "dynamic") or rng.random() < 0.5:
        return config
    return dataclasses.replace(config, max_decode_gap=rng.choice((0.014, 0.02, 0.03, 0.1)))


def run_history(
    seed: int, mode: str, formation: str, policy: str, steps: int, windows: tuple[int | None, ...] = (None,)
) -> Counter[str]:
    """Drives one history and checks it; how often each kind of event happened. windows: of the groups of layers."""
    history = History(random.Random(f"{mode} {formation} {policy} {seed}"), mode, formation, policy, windows)
    history.run(steps)
    return history.events
