"""Drives a scheduler over the fake runner as the engine does, checking every invariant after every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxserve.config.settings import SchedulerConfig
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.request import EngineRequest, FinishReason, RequestOptions
from jaxserve.runner.fake import FakeRunner, next_token
from jaxserve.runner.protocol import Pending, Runner
from jaxserve.scheduler import Scheduler, StepPlan, StepResult, StepUpdate
from jaxserve.scheduler.buckets import Buckets, powers
from jaxserve.scheduler.step_in_progress import StepInProgress


@dataclasses.dataclass
class Run:
    """What came of each request, by id, and the plans in order."""

    tokens: dict[str, list[int]]
    reasons: dict[str, FinishReason]
    finish_step: dict[str, int]
    plans: list[StepPlan]
    scheduler: Scheduler


def make_scheduler(
    config: SchedulerConfig, num_pages: int = 64, page_size: int = 4, num_host_pages: int = 0, **others
) -> Scheduler:
    rows = config.max_num_seqs * others.get("tokens_per_step", 1)
    buckets = Buckets(powers(config.max_num_batched_tokens), powers(rows))
    return Scheduler(config, PagePool(num_pages, page_size, num_host_pages), buckets, **others)


def request(name: str, prompt: int, output: int, *, arrival_time: float = 0.0, **options) -> EngineRequest:
    """A request of `prompt` tokens that ends after `output` of its own."""
    ids = tuple((7 * i + len(name)) % 101 for i in range(prompt))
    return EngineRequest(name, ids, max_tokens=output, options=RequestOptions(**options), arrival_time=arrival_time)


def start_decoding(scheduler: Scheduler, *requests: EngineRequest) -> None:
    """Brings requests to where only their newest token is left to compute."""
    for one in requests:
        scheduler.add(one)
    plan = scheduler.schedule()
    assert plan is not None
    assert len(plan.sampled) == len(requests)
    scheduler.update(plan, StepResult(tuple(1 for _ in requests)))


def preempt(scheduler: Scheduler, request_id: str) -> None:
    """Takes the place of one running sequence, as if memory were short, outside of a step."""
    queues = scheduler._queues
    sequence = next(one for one in queues.running.sequences if one.request_id == request_id)
    queues.preempt(sequence, StepInProgress(0, 0, 0))


def columns(plan: StepPlan) -> list[tuple]:
    """What a plan samples, sample by sample."""
    samples = plan.samples
    wants = [0] * len(samples) if samples.wants is None else samples.wants.tolist()
    found = (samples.hidden_rows, samples.slots, samples.positions, samples.suppress_stop)
    return list(zip(*(column.tolist() for column in found), wants, strict=True))


def dispatch(runner: Runner, plan: StepPlan) -> Pending:
    """Starts both halves of a step whose samples want no masks."""
    pending = runner.dispatch_forward(plan)
    runner.dispatch_sample(plan)
    return pending


def drive(
    scheduler: Scheduler,
    requests: Sequence[EngineRequest],
    runner: FakeRunner | None = None,
    before_step: Callable[[int], None] | None = None,
    max_steps: int = 20_000,
) -> Run:
    """Runs all requests to their end with one step in flight; `before_step` may add or abort."""
    pool, windows = scheduler.pool, scheduler.page_groups.windows
    runner = runner or FakeRunner(num_pages=pool.num_pages, page_size=pool.page_size, group_windows=windows)
    run = Run({request.request_id: [] for request in requests}, {}, {}, [], scheduler)
    for request in requests:
        scheduler.add(request)
    in_flight = None
    for step in range(max_steps):
        if before_step is not None:
            before_step(step)
        plan = scheduler.schedule()
        dispatched = None if plan is None else (plan, dispatch(runner, plan))
        scheduler.check_integrity()
        if in_flight is not None:
            take(run, in_flight[0], scheduler.update(in_flight[0], runner.collect(in_flight[1])))
            scheduler.check_integrity()
        in_flight = dispatched
        if plan is not None:
            run.plans.append(plan)
        elif not scheduler.unfinished:
            return run
    raise AssertionError(f"not finished after {max_steps} steps: {scheduler.request_ids}")


def take(run: Run, plan: StepPlan, step: StepUpdate) -> None:
    for request_id, token_id in zip(step.request_ids, step.token_ids, strict=True):
        assert request_id not in run.reasons, "an update after the end"
        run.tokens.setdefault(request_id, []).append(token_id)
    for update in step.others:
        request_id = update.sequence.request_id
        assert request_id not in run.reasons, "an update after the end"
        run.tokens.setdefault(request_id, []).extend(update.token_ids)
        if update.finish_reason is not None:
            run.reasons[request_id] = update.finish_reason
            run.finish_step[request_id] = plan.step


def alone(
    request: EngineRequest, vocab_size: int = 101, windows: tuple[int | None, ...] = (None,)
) -> tuple[list[int], FinishReason]:
    """The answer worked out token by token, with neither scheduler nor pages. What no window reaches counts as 0."""
    context, outputs = list(request.prompt_token_ids), []
    while True:
        reach = max(len(context) if window is None else window for window in windows)
        seen = [0] * (len(context) - reach) + context[-reach:]
        token = next_token(seen, request, len(outputs) < request.min_tokens, vocab_size)
        outputs.append(token)
        context.append(token)
        if token in request.stop_token_ids:
            return outputs, FinishReason.STOP
        if len(outputs) == request.max_tokens:
            return outputs, FinishReason.LENGTH
