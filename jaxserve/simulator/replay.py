"""Replays a trace on the real engine in this process, to compare a simulation of the same trace with.

Requests arrive at the trace's times, whether or not earlier ones have finished, but later turns of a session when the
one before has; with random prompts, which begin alike where the trace says so. As in a simulation they end at the
trace's lengths, which the scheduler does not know: the runner is wrapped so that the last token of a request is its
stop id, whatever the model sampled.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxserve.config.settings import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import AddRequest, EngineOutput, FromEngine, TokenBatch
from jaxserve.request import EngineRequest, FinishReason
from jaxserve.runner.protocol import Pending, Runner
from jaxserve.runner.wrapper import RunnerWrapper
from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.simulator.simulated_engine import SimulatedDevice
from jaxserve.simulator.simulation import (
    ClientRule,
    Progress,
    ReadyRequest,
    SimulationResult,
    TraceRequests,
    fitting,
)
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
    info = runner.info
    device = SimulatedDevice(info.num_pages, info.max_model_len, info.platform, group_windows=info.group_windows)
    kept, skipped = fitting(config, trace, device, client)
    requests = EngineRequests(TraceRequests(kept, device, config, client), keeping, seed=seed)
    origin = time.perf_counter()
    served = serve(core, requests.roots(), follow=requests.after, progress=progress)
    return _result(kept, skipped, core, events, origin, served)


class EngineRequests:
    """Makes the requests of a trace for an engine with a model: with token ids of its vocabulary.

    Ids are random, and equal where the trace's content is. A later turn repeats the prompt of the turn before and what
    the engine answered. A prompt whose content the trace does not tell shares nothing with others.
    """

    def __init__(self, requests: TraceRequests, runner: LengthKeepingRunner, *, seed: int = 0, first_id: int = 0):
        """first_id: the smallest id in a prompt. runner: learns where each request ends."""
        self._requests = requests
        self._runner = runner
        self._seed = seed
        self._first_id = first_id
        self._prompts: dict[int, tuple[int, ...]] = {}  # of requests that have not ended, of which turns follow

    def roots(self) -> list[EngineRequest]:
        """Returns the requests that wait for no other one, in order of arrival."""
        return [self._real(ready, ()) for ready in self._requests.roots()]

    def after(self, request_id: str, output_ids: tuple[int, ...], ended: float) -> list[EngineRequest]:
        """Returns the turns that follow a request which ended at the time `ended` with these token ids."""
        stop_id = self._runner.stop_id  # not in the vocabulary
        said = self._prompts.pop(int(request_id), ())
        said += tuple([self._first_id if token_id == stop_id else token_id for token_id in output_ids])
        return [self._real(ready, said) for ready in self._requests.after(int(request_id), ended)]

    def _real(self, ready: ReadyRequest, said: tuple[int, ...]) -> EngineRequest:
        """Returns the request with real ids. said: prompt and answer of the turn before, which it may begin with."""
        request, trace = ready.request, self._requests.trace
        index = int(request.request_id)
        vocab_size = self._runner.info.vocab_size
        if trace.prompts and trace.prompts[index]:
            content, repeated = trace.prompts[index], trace.repeated(index)
            prompt = said if repeated else ()
            prompt += content.after(repeated).drawn_ids(vocab_size, self._seed, self._first_id)
        else:
            rng = np.random.default_rng((self._seed, index))
            prompt = tuple(rng.integers(self._first_id, vocab_size, len(request.prompt_token_ids)).tolist())
        if self._requests.has_turns(index):
            self._prompts[index] = prompt
        self._runner.last_positions[request.request_id] = len(prompt) + ready.output_tokens - 1
        stops = (self._runner.stop_id,) if request.stop_token_ids else ()
        return dataclasses.replace(request, prompt_token_ids=prompt, stop_token_ids=stops)


Follow = Callable[[str, tuple[int, ...], float], Iterable[EngineRequest]]
"""Returns the requests to send after one has ended: from its id, its token ids and the time. Their arrival times, like
that time, count from the start of `serve`."""


@dataclasses.dataclass
class Served:
    """Holds what clients saw of a run.

    Attributes:
        sent: when each request was sent, on `time.perf_counter`'s clock, by id.
        refused: numbers of the requests that were refused.
        cached_tokens: prompt tokens found in the prefix cache, by id, where there were some.
    """

    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    refused: set[int] = dataclasses.field(default_factory=set)
    cached_tokens: dict[str, int] = dataclasses.field(default_factory=dict)


def serve(
    core: EngineCore,
    requests: Sequence[EngineRequest],
    *,
    concurrency: int | None = None,
    follow: Follow = lambda request_id, output_ids, ended: (),
    progress: Progress | None = None,
) -> Served:
    """Runs the engine's loop until every request has ended.

    Args:
        core: An engine whose `now` is `time.time`.
        requests: In the order in which they are sent; arrival times and deadlines count from the start of this call.
        concurrency: Number of clients that each send a request, and the next one when it and its turns have ended,
            whatever the arrival times; None sends each request when it is due.
        follow: Called with each request that ends.
        progress: Called with the number of requests that have ended.
    """
    clients = _Clients(core, requests, concurrency, follow)
    while clients.waiting or core.busy:
        clients.send()
        if not clients.waiting and not core.busy:
            break  # the last one was refused
        wait = core.pause if core.busy else np.inf
        if wait:
            time.sleep(max(0.0, min(wait, clients.seconds_to_next())))
            if core.pause:
                continue
        if core.busy:
            ended = clients.take(core.step())
            if progress is not None and ended:
                progress(ended)
    return clients.served


class _Clients:
    """Sends requests when they are due and takes what the engine says of them."""

    def __init__(
        self, core: EngineCore, requests: Sequence[EngineRequest], concurrency: int | None, follow: Follow
    ) -> None:
        self.served = Served()
        self._requests = deque(requests)
        self._turns: list[tuple[float, int, EngineRequest]] = []  # a heap of (arrival, order, request)
        self._num_turns = 0
        self._core = core
        self._timed = concurrency is None
        self._free = math.inf if concurrency is None else concurrency
        self._follow = follow
        self._outputs: dict[str, list[int]] = {}
        self._origin, self._wall = time.perf_counter(), time.time()

    @property
    def waiting(self) -> bool:
        """Tells whether there are requests to send."""
        return bool(self._requests or self._turns)

    def send(self) -> None:
        """Sends the requests that are due."""
        while (due := self._next()) is not None:
            arrival, request = due
            deadline = request.options.deadline
            if deadline is not None:
                deadline += self._wall + arrival - request.arrival_time
            self.served.sent[request.request_id] = self._origin + arrival
            options = dataclasses.replace(request.options, deadline=deadline)
            moved = dataclasses.replace(request, arrival_time=self._wall + arrival, options=options)
            self._outputs[request.request_id] = []
            answers = self._core.handle(AddRequest(moved))
            self.served.refused |= _errors(answers)
            self.take(answers)

    def seconds_to_next(self) -> float:
        """Returns the time until another request is due; infinite where that depends on others."""
        arrivals = [self._turns[0][0]] if self._turns else []
        arrivals += [self._requests[0].arrival_time] if self._requests and self._timed else []
        return min(arrivals, default=math.inf) - self._now()

    def _next(self) -> tuple[float, EngineRequest] | None:
        """Takes the next request that is due, with its arrival. A client is free when its session has ended."""
        now = self._now()
        if self._turns and self._turns[0][0] <= now:
            arrival, _, request = heapq.heappop(self._turns)
            return arrival, request
        if not self._requests or self._free < 1 or (self._timed and self._requests[0].arrival_time > now):
            return None
        self._free -= 1
        request = self._requests.popleft()
        return request.arrival_time if self._timed else now, request

    def take(self, messages: Iterable[FromEngine]) -> int:
        """Takes messages of the engine; returns the number of requests that have ended with them."""
        ended = 0
        for message in messages:
            if isinstance(message, TokenBatch):
                for request_id, token_id in zip(message.request_ids, message.token_ids, strict=True):
                    self._outputs[request_id].append(token_id)
            elif isinstance(message, EngineOutput):
                self._outputs[message.request_id] += message.token_ids
                if message.num_cached_tokens:
                    self.served.cached_tokens[message.request_id] = message.num_cached_tokens
                if message.finish_reason is not None:
                    self._end(message)
                    ended += 1
        return ended

    def _end(self, message: EngineOutput) -> None:
        outputs = tuple(self._outputs.pop(message.request_id))
        turns = list(self._follow(message.request_id, outputs, self._now()))
        for request in turns:
            heapq.heappush(self._turns, (request.arrival_time, self._num_turns, request))
            self._num_turns += 1
        self._free += 1 - len(turns)

    def _now(self) -> float:
        return time.perf_counter() - self._origin


def _errors(messages: Iterable[FromEngine]) -> set[int]:
    """Returns the numbers of requests that were refused."""
    return {
        int(message.request_id)
        for message in messages
        if isinstance(message, EngineOutput) and message.finish_reason is FinishReason.ERROR
    }


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Collects the token times of a run in the form of a simulation's `TokenLog`."""

    times: list[np.ndarray]

    def token_times(self, count: int) -> list[np.ndarray]:
        return self.times


def _result(
    trace: Trace, skipped: int, core: EngineCore, events: list[Event], origin: float, served: Served
) -> SimulationResult:
    timings = {int(each.request_id): each for each in request_timings(events)}

    def column(name: str) -> np.ndarray:
        values = [getattr(timings[index], name) if index in timings else None for index in range(len(trace))]
        return np.array([np.nan if value is None else value - origin for value in values])

    def reason(index: int, timing: RequestTimings | None) -> str:
        return "refused" if index in served.refused or timing is None else timing.reason

    found = [timings.get(index) for index in range(len(trace))]
    result = SimulationResult(
        trace=trace,
        num_skipped=skipped,
        cost_name=f"the engine in real time, {core.runner.info.architecture} on {core.runner.info.platform}",
        arrived=np.array([served.sent.get(str(index), np.nan) - origin for index in range(len(trace))]),
        scheduled=column("scheduled"),
        first_token=column("first_token"),
        finished=column("finished"),
        output_tokens=np.array([0 if each is None else each.output_tokens for each in found], np.int64),
        cached_tokens=np.array([served.cached_tokens.get(str(index), 0) for index in range(len(trace))], np.int64),
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
