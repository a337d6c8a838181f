"""Replays a trace on the real engine in this process, to compare a simulation of the same trace with.

Requests arrive at the trace's times, whether or not earlier ones have finished, with random prompts. As in a simulation
they end at the trace's lengths, which the scheduler does not know: the runner is wrapped so that the last token of a
request is its stop id, whatever the model sampled.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from jaxserve.config.settings import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import AddRequest, EngineOutput, FromEngine
from jaxserve.request import EngineRequest, FinishReason
from jaxserve.runner.protocol import Pending, Runner
from jaxserve.runner.wrapper import RunnerWrapper
from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.simulator.simulated_engine import SimulatedDevice
from jaxserve.simulator.simulation import ClientRule, Progress, SimulationResult, fitting, requests_of
from jaxserve.simulator.traces import Trace
from jaxserve.telemetry.recorder import Event, Recorder, StepRecorded
from jaxserve.telemetry.timings import RequestTimings, request_timings

_NEVER = -1


class LengthKeepingRunner(RunnerWrapper):
    """Wraps a runner and emits a stop id where a request reaches its true length.

    lengths: positions of the last tokens by request id, to be filled before the requests are admitted. The stop id lies
    outside the vocabulary, so that the model cannot sample it. (The device keeps what it sampled; the request ends.)
    """

    def __init__(self, runner: Runner, num_slots: int):
        super().__init__(runner)
        self.stop_id = runner.info.vocab_size
        self.last_positions: dict[str, int] = {}
        self._stop_at = np.full(num_slots, _NEVER)

    def dispatch_forward(self, plan: StepPlan) -> Pending:
        for chunk in plan.chunks:
            if chunk.admit is not None:
                self._stop_at[chunk.slot] = self.last_positions.get(chunk.request_id, _NEVER)
        return self._runner.dispatch_forward(plan), plan.samples.positions == self._stop_at[plan.samples.slots]

    def done(self, pending: Pending) -> bool:
        return self._runner.done(pending[0])

    def collect(self, pending: Pending) -> StepResult:
        result, last = self._runner.collect(pending[0]), pending[1]
        return StepResult(np.where(last, self.stop_id, np.asarray(result.token_ids, np.int32)))


def replay(
    config: EngineConfig,
    runner: Runner,
    trace: Trace,
    *,
    client: ClientRule = ClientRule(),
    seed: int = 0,
    recorder: Recorder | None = None,
    progress: Progress | None = None,
) -> SimulationResult:
    """Serves a trace in real time and returns the same result type as a simulation; times are from the first arrival
    on.

    Args:
        config: also of the runner, whose programs must match its limits.
        seed: of the prompts' random ids.
        recorder: receives the engine's events.
    """
    keeping = LengthKeepingRunner(runner, config.scheduler.max_num_seqs)
    recorder = recorder or Recorder()
    core = EngineCore(config, keeping, recorder=recorder)
    events: list[Event] = []
    recorder.subscribe(events.append)
    device = SimulatedDevice(runner.info.num_pages, runner.info.max_model_len, runner.info.platform)
    kept, skipped = fitting(config, trace, device, client)
    rng = np.random.default_rng(seed)
    requests = []
    for request, length in requests_of(kept, device, config, client):
        prompt = tuple(rng.integers(0, runner.info.vocab_size, len(request.prompt_token_ids)).tolist())
        stops = (keeping.stop_id,) if request.stop_token_ids else ()
        requests.append(dataclasses.replace(request, prompt_token_ids=prompt, stop_token_ids=stops))
        keeping.last_positions[request.request_id] = len(prompt) + length - 1
    origin = time.perf_counter()
    _, refused = serve(core, requests, progress=progress)
    return _result(kept, skipped, core, events, origin, refused)


def serve(
    core: EngineCore,
    requests: Sequence[EngineRequest],
    *,
    concurrency: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, float], set[int]]:
    """Runs the engine's loop until every request has ended.

    Args:
        core: An engine whose `now` is `time.time`.
        requests: In the order in which they are sent; arrival times and deadlines count from the start of this call.
        concurrency: Number of clients that each send a request, and the next one when it has ended, whatever the
            arrival times; None sends each request when it is due.
        progress: Called with the number of requests that have ended.

    Returns:
        When each request was sent, on `time.perf_counter`'s clock, by id; and the numbers of those that were refused.
    """
    sent: dict[str, float] = {}
    refused: set[int] = set()
    origin, wall = time.perf_counter(), time.time()
    place, free = 0, len(requests) if concurrency is None else concurrency
    while place < len(requests) or core.busy:
        now = time.perf_counter() - origin
        while place < len(requests) and free and (concurrency or requests[place].arrival_time <= now):
            request = requests[place]
            arrival = request.arrival_time if concurrency is None else time.perf_counter() - origin
            deadline = request.options.deadline
            if deadline is not None:
                deadline += wall + arrival - request.arrival_time
            sent[request.request_id] = origin + arrival
            options = dataclasses.replace(request.options, deadline=deadline)
            moved = dataclasses.replace(request, arrival_time=wall + arrival, options=options)
            answers = core.handle(AddRequest(moved))
            refused |= _errors(answers)
            place, free = place + 1, free - 1 + sum(map(_ends, answers))
        if place == len(requests) and not core.busy:
            break  # the last one was refused
        wait = core.pause if core.busy else np.inf
        if wait:
            due = place < len(requests) and concurrency is None
            coming = requests[place].arrival_time - now if due else np.inf
            time.sleep(max(0.0, min(wait, coming)))
            if core.pause:
                continue
        if core.busy:
            ended = sum(map(_ends, core.step()))
            free += ended
            if progress is not None and ended:
                progress(ended)
    return sent, refused


def _errors(messages: list[FromEngine]) -> set[int]:
    """Returns the numbers of requests that were refused."""
    return {
        int(message.request_id)
        for message in messages
        if isinstance(message, EngineOutput) and message.finish_reason is FinishReason.ERROR
    }


def _ends(message: FromEngine) -> bool:
    return isinstance(message, EngineOutput) and message.finish_reason is not None


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Collects the token times of a run in the form of a simulation's `TokenLog`."""

    times: list[np.ndarray]

    def token_times(self, count: int) -> list[np.ndarray]:
        return self.times


def _result(
    trace: Trace, skipped: int, core: EngineCore, events: list[Event], origin: float, refused: set[int]
) -> SimulationResult:
    timings = {int(each.request_id): each for each in request_timings(events)}

    def column(name: str) -> np.ndarray:
        values = [getattr(timings[index], name) if index in timings else None for index in range(len(trace))]
        return np.array([np.nan if value is None else value - origin for value in values])

    def reason(index: int, timing: RequestTimings | None) -> str:
        return "refused" if index in refused or timing is None else timing.reason

    found = [timings.get(index) for index in range(len(trace))]
    result = SimulationResult(
        trace=trace,
        num_skipped=skipped,
        cost_name=f"the engine in real time, {core.runner.info.architecture} on {core.runner.info.platform}",
        scheduled=column("scheduled"),
        first_token=column("first_token"),
        finished=column("finished"),
        output_tokens=np.array([0 if each is None else each.output_tokens for each in found], np.int64),
        preemptions=np.array([0 if each is None else each.preemptions for each in found], np.int64),
        reasons=tuple(reason(index, each) for index, each in enumerate(found)),
        replica=np.zeros(len(trace), np.int64),
        steps=(_steps([event for event in events if isinstance(event, StepRecorded)], origin),),
        predictor_tau=(core.scheduler.predictor.kendall_tau,),
        replica_seconds=0.0,
        preemptions_by_kind=core.scheduler.num_preemptions_by_kind,
        token_logs=(_Tokens([np.array([] if each is None else each.token_times) - origin for each in found]),),
    )
    return dataclasses.replace(result, replica_seconds=result.seconds)


def _steps(records: list[StepRecorded], origin: float) -> dict[str, np.ndarray]:
    """Returns the columns of a simulation's steps. A step ends when its results arrive, in the next iteration."""
    dispatched = [record.time + record.schedule_seconds + record.dispatch_seconds for record in records]
    collected = [time + record.collect_seconds for time, record in zip(dispatched, records, strict=True)]
    starts = [max(pair) for pair in zip(dispatched, collected, strict=True)]
    columns = {
        name: np.array([getattr(record, name) for record in records], np.float64)
        for name in ("prefill_tokens", "decode_tokens", "rows", "token_bucket", "row_bucket", "pages_used", "waiting")
    }
    columns["running"] = np.array([record.running for record in records], np.float64)
    columns["begin"] = np.array([record.time for record in records]) - origin
    columns["start"] = np.array(starts) - origin
    ends = np.array([*collected[1:], *collected[-1:]]) - origin
    columns["end"] = np.maximum(ends, columns["start"])
    return columns
