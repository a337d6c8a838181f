"""A virtual engine for tests of max_decode_gap: one step in flight, on a clock that a fake device moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.request import EngineRequest, RequestOptions
from jaxserve.scheduler import Scheduler, SequenceUpdate, StepPlan, StepResult
from jaxserve.scheduler.buckets import Buckets, close, powers
from jaxserve.scheduler.gap_monitor import GapExceeded
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.scheduler.step_shape import StepShape, shape_of

PAGE_SIZE = 16


@dataclasses.dataclass(frozen=True)
class FakeCosts:
    """Seconds of a step: fixed, a token of its bucket, a position that decodes attend to, a pair of a chunk's
    attention, a position that a chunk reads, a page copied."""

    fixed: float = 1e-3
    token: float = 2e-5
    position: float = 1e-7
    pair: float = 1e-8
    read: float = 1e-7
    copy: float = 1e-4

    def seconds(self, shape: StepShape) -> float:
        return (
            self.fixed
            + self.token * shape.token_bucket
            + self.position * shape.decode_context
            + self.pair * shape.prefill_pairs
            + self.read * shape.prefill_context
            + self.copy * shape.swapped_pages
        )


def exact(costs: FakeCosts) -> Callable[[StepShape], float]:
    return costs.seconds


class VirtualEngine:
    """Runs a scheduler as the engine does. Every token is 1, so that only max_tokens ends a request.

    device: the true seconds of a step; the scheduler is told `predicted`. token_times: of each request. preempted_at:
    how many tokens each request had when it was preempted. plans: in order, each with the time of its decision. gaps:
    what the updates reported.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        predicted: Callable[[StepShape], float],
        device: Callable[[StepShape], float] | None = None,
        *,
        num_pages: int = 4096,
        num_host_pages: int = 0,
        max_model_len: int = 4096,
        host_seconds: float = 0.0,
        sizes: Callable[[int], tuple[int, ...]] = powers,
        before_step: Callable[[VirtualEngine], object] = lambda engine: None,
    ):
        self.buckets = Buckets(sizes(config.max_num_batched_tokens), sizes(config.max_num_seqs))
        self.scheduler = Scheduler(
            config,
            PagePool(num_pages, PAGE_SIZE, num_host_pages),
            self.buckets,
            costs=PreemptionCosts(1e-5, 1e-5),
            max_model_len=max_model_len,
            step_seconds=predicted,
        )
        self.device = predicted if device is None else device
        self.now = 0.0
        self.token_times: dict[str, list[float]] = {}
        self.preempted_at: dict[str, set[int]] = {}
        self.ended: set[str] = set()
        self.plans: list[StepPlan] = []
        self.gaps: list[GapExceeded] = []
        self._host_seconds = host_seconds
        self._before_step = before_step

    def run(self, requests: Sequence[EngineRequest], max_steps: int = 20_000) -> VirtualEngine:
        """Runs requests, in order of arrival, to their ends."""
        waiting, free_at = list(requests), 0.0
        in_flight: tuple[StepPlan, float] | None = None
        for _ in range(max_steps):
            while waiting and waiting[0].arrival_time <= self.now:
                self.scheduler.add(waiting.pop(0))
            self._before_step(self)
            for update in self.scheduler.expire(self.now):
                self._take(update)
            plan = self.scheduler.schedule(self.now)
            for sequence in self.scheduler.preempted:
                self.preempted_at.setdefault(sequence.request_id, set()).add(len(sequence.output_token_ids))
            self.now += self._host_seconds
            previous, in_flight = in_flight, None
            if plan is not None:
                self.plans.append(plan)
                free_at = max(self.now, free_at) + self.device(shape_of(plan))
                in_flight = plan, free_at
            if previous is not None:
                self._collect(*previous)
            elif plan is None:
                if not waiting and not self.scheduler.unfinished:
                    return self
                self._sleep(waiting[0].arrival_time if waiting else None)
        raise AssertionError(f"not finished after {max_steps} steps: {self.scheduler.request_ids[:5]}")

    def _sleep(self, arrival: float | None) -> None:
        """Nothing runs: the next request must come, or the scheduler know until when it waits."""
        times = [time for time in (arrival, self.scheduler.wake_at()) if time is not None]
        assert times, f"asleep for ever: {self.scheduler.request_ids[:5]}"
        self.now = max(self.now, min(times))

    def _collect(self, plan: StepPlan, end: float) -> None:
        if plan.num_sampled:
            self.now = max(self.now, end)
        update = self.scheduler.update(plan, StepResult(np.ones(plan.num_sampled, np.int32)), self.now)
        self.gaps += update.gaps
        for request_id in update.request_ids:
            self.token_times.setdefault(request_id, []).append(self.now)
        for other in update.others:
            self._take(other)

    def _take(self, update: SequenceUpdate) -> None:
        request_id = update.sequence.request_id
        if update.token_ids:
            self.token_times.setdefault(request_id, []).append(self.now)
        if update.finish_reason is not None:
            self.ended.add(request_id)

    def all_gaps(self, *, preempted: bool = True) -> np.ndarray:
        """The gaps between tokens of every request. preempted: those in which a request was preempted count too; its
        token in flight makes it unclear which of two it was, so that both are left out."""
        found: list[float] = []
        for request_id, times in self.token_times.items():
            skipped = {} if preempted else self.preempted_at.get(request_id, set())
            around = {count + more for count in skipped for more in (0, 1)}
            found += [gap for count, gap in enumerate(np.diff(times), start=1) if count not in around]
        return np.array(found)


def request(name: str, prompt: int, output: int, at: float = 0.0, **options) -> EngineRequest:
    return EngineRequest(name, (7,) * prompt, max_tokens=output, options=RequestOptions(**options), arrival_time=at)


__all__ = ["PAGE_SIZE", "FakeCosts", "VirtualEngine", "close", "exact", "powers", "request"]
