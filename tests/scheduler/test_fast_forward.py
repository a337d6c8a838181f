"""Steps taken at once (`fast_forward_steps`, `advance`) against the same steps one by one."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import Phase, given
from hypothesis import strategies as st

from jaxserve.config.scheduling import FORMATIONS, MODES, SchedulerConfig
from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.request import EngineRequest, RequestOptions
from jaxserve.scheduler import Scheduler, StepPlan, StepResult
from jaxserve.scheduler.buckets import Buckets, powers
from jaxserve.scheduler.plan import NO_DECODES, NO_SAMPLES
from jaxserve.scheduler.policies.fair import Fair
from jaxserve.scheduler.policies.named import POLICIES
from jaxserve.scheduler.update import SequenceUpdate
from tests.budgets import budget
from tests.scheduler.drive import columns
from tests.scheduler.history import PAGE_SIZE, TENANTS, draw_config

STOP = 7
"""Ends a request; every other token is 0."""


class Twins:
    """Two schedulers that get the same requests: `stepped` takes every step, `leaping` takes stretches at once."""

    def __init__(self, rng: random.Random, config: SchedulerConfig):
        self.rng = rng
        self.config = config
        self.now = 0.0
        self.num_pages, host_pages = rng.choice((12, 40, 120)), rng.choice((0, 24))
        buckets = Buckets(powers(config.max_num_batched_tokens), powers(config.max_num_seqs))
        keys = rng.choice((None, ContentKeys(b"the same for both")))
        self.num_ids = rng.choice((2, 50))  # of few ids many prompts begin alike
        self.stepped, self.leaping = (
            Scheduler(
                config,
                PagePool(self.num_pages, PAGE_SIZE, host_pages),
                buckets,
                max_model_len=44,
                content_keys=keys,
            )
            for _ in range(2)
        )
        self.urgent = rng.choice((0, 0, 9))
        self.lengths: dict[str, int] = {}  # output tokens after which each stops by itself
        self.events: Counter[str] = Counter()

    @property
    def both(self) -> tuple[Scheduler, Scheduler]:
        return self.stepped, self.leaping

    def run(self, requests: int) -> None:
        while len(self.lengths) < requests or self.stepped.unfinished:
            if len(self.lengths) < requests:
                self.arrive()
            for _ in range(self.rng.choice((1, 3, 30))):
                self.step()
                if self.rng.random() < 0.7:
                    self.leap()

    def arrive(self) -> None:
        rng = self.rng
        for _ in range(rng.choice((1, 1, 2, 5))):
            name = f"r{len(self.lengths)}"
            self.lengths[name] = rng.choice((rng.randint(1, 30), 1_000))
            prompt = rng.randint(1, 8)
            request = EngineRequest(
                name,
                tuple(rng.randrange(self.num_ids) for _ in range(prompt)),
                max_tokens=rng.randint(1, 36),
                stop_token_ids=(STOP,),
                options=RequestOptions(
                    priority=rng.choice((0, self.urgent)),
                    tenant=rng.choice(list(TENANTS)),
                    deadline=self.now + rng.uniform(0, 9) if rng.random() < 0.05 else None,
                ),
                arrival_time=self.now,
            )
            for scheduler in self.both:
                try:
                    scheduler.add(request)
                except ValueError:
                    self.events["refused"] += 1
        if rng.random() < 0.1 and self.stepped.unfinished:
            gone = rng.choice(self.stepped.request_ids)
            for scheduler in self.both:
                scheduler.abort(gone)

    def step(self) -> None:
        """One step of each, which must be the same."""
        self.now += self.rng.choice((0.0, 0.01, 0.1))
        ended = [[_seen(update) for update in scheduler.expire(self.now)] for scheduler in self.both]
        assert ended[0] == ended[1]
        plans = [scheduler.schedule(self.now) for scheduler in self.both]
        assert _without_pages(plans[0]) == _without_pages(plans[1])
        if plans[0] is None or plans[1] is None:
            wake_at = self.stepped.wake_at()
            assert wake_at == self.leaping.wake_at()
            self.now = max(self.now, wake_at or 0.0)
            return
        ids = self.token_ids(plans[0])
        updates = [self.stepped.update(plans[0], ids), self.leaping.update(plans[1], ids)]
        assert updates[0].request_ids == updates[1].request_ids
        assert updates[0].token_ids == updates[1].token_ids
        assert [_seen(update) for update in updates[0].others] == [_seen(update) for update in updates[1].others]

    def leap(self) -> None:
        """As many steps as can be taken at once, or some of them: at once, and one by one."""
        steady = self.stepped.fast_forward_steps()
        assert steady == self.leaping.fast_forward_steps()
        if not steady:
            return
        rows = list(self.stepped._queues.running.decoding.sequences)
        until_stop = min(self.lengths[row.request_id] - len(row.output_token_ids) for row in rows) - 1
        steps = min(steady, until_stop)
        if steps < 1:
            return
        steps = self.rng.choice((steps, self.rng.randint(1, steps)))
        ids = [100 + place for place in range(len(rows))]  # another one in each row
        moments = np.cumsum([self.rng.choice((0.0, 0.01, 1.0)) for _ in range(steps)]) + self.now
        pages = self.stepped.pool.num_used
        for now in moments.tolist():
            assert self.stepped.expire(now) == []
            plan = self.stepped.schedule(now)
            assert plan is not None
            assert plan.decodes.request_ids == tuple(row.request_id for row in rows)
            assert (plan.chunks, plan.copies) == ((), ())
            assert self.stepped.preempted == []
            update = self.stepped.update(plan, StepResult(ids))
            assert update.others == []
        stretch = self.leaping.advance(steps, ids, moments.tolist())
        assert (stretch.request_ids, stretch.steps) == (tuple(row.request_id for row in rows), steps)
        self.now = float(moments[-1])
        assert _state(self.stepped) == _state(self.leaping)
        self.leaping.check_integrity()
        events = self.events
        events["stretches"] += 1
        events["steps"] += steps
        events["stretches that took pages"] += self.stepped.pool.num_used > pages
        events["stretches while others wait"] += self.stepped.num_waiting > 0
        events["whole stretches"] += steps == steady
        events["stretches with pages that others have"] += self.stepped.prefix_counts.hit_tokens > 0
        events[f"stretches under {self.config.policy}"] += 1

    def token_ids(self, plan: StepPlan) -> StepResult:
        sequences = [self.stepped._sequences[row.request_id] for row in plan.sampled]
        last = [len(one.output_token_ids) + 1 == self.lengths[one.request_id] for one in sequences]
        return StepResult([STOP if stops else 0 for stops in last])


def _seen(update: SequenceUpdate) -> tuple:
    return update.sequence.request_id, update.token_ids, update.finish_reason, update.error


def _without_pages(plan: StepPlan | None) -> tuple | None:
    """A plan, with numbers of pages for their names: a stretch takes its pages in another order."""
    if plan is None:
        return None
    rows = [dataclasses.replace(row, new_pages=(len(row.new_pages),)) for row in plan.rows]
    tiers = [(copy.source_tier, copy.destination_tier) for copy in plan.copies]
    writes = [(write.slot, write.first, len(write.pages)) for write in plan.table_writes]
    rest = dataclasses.replace(plan, decodes=NO_DECODES, chunks=(), samples=NO_SAMPLES, copies=(), table_writes=())
    return rows, columns(plan), tiers, writes, rest


def _state(scheduler: Scheduler) -> tuple:
    """All that later plans depend on, with numbers of pages for their names."""
    pool, queues = scheduler.pool, scheduler._queues
    decoding = queues.running.decoding
    slots = list(decoding._by_slot)
    sequences = [
        (one.request_id, one.status, one.slot, one.order, one.output_token_ids, one.num_computed, one.num_pending,
         one.num_preemptions, len(one.pages), len(one.reserved), len(one.host_pages))
        for one in scheduler._sequences.values()
    ]  # fmt: skip
    columns = [column[slots].tolist() for column in (decoding._position, decoding._capacity, decoding._order)]
    service: Iterable[float] = ()
    if isinstance(scheduler.policy, Fair):
        service = tuple(scheduler.policy.service(tenant) for tenant in TENANTS)
    counts = (pool.num_free, pool.num_used, pool.num_host_used, scheduler.num_waiting, scheduler._steps)
    counts += (pool.num_cached, vars(scheduler.prefix_counts))
    return sequences, slots, columns, service, counts, vars(scheduler._step_times), scheduler.fast_forward_steps()


@pytest.mark.parametrize("mode", MODES)
def test_a_stretch_equals_its_steps(mode: str):
    """Tokens, positions, pages held, service counted, the pace, who ends when, and all plans after it."""
    events: Counter[str] = Counter()

    def histories(policy: str) -> None:
        @budget(9, phases=[Phase.generate])  # a smaller seed is not a simpler history
        @given(seed=st.integers(0, 2**32))
        def run(seed: int) -> None:
            rng = random.Random(f"{mode} {policy} {seed}")
            formation = rng.choice(FORMATIONS) if mode != "dynamic" else "greedy"
            twins = Twins(rng, draw_config(rng, mode, formation, policy))
            twins.run(requests=20)
            events.update(twins.events)

        run()

    for policy in POLICIES:
        histories(policy)
    if mode == "separated":
        assert not events["stretches"]  # its steps alternate
        return
    kinds = ("stretches that took pages", "stretches while others wait", "whole stretches")
    kinds += ("stretches with pages that others have",)
    for kind in (*kinds, *(f"stretches under {policy}" for policy in POLICIES)):
        assert events[kind] >= 5, f"{kind}: {events}"
    assert events["steps"] > 3 * events["stretches"]
