"""Simulates a trace in one call: `simulate(config, trace, costs, device) -> SimulationResult`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxserve.config.settings import EngineConfig
from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.planning.step_cost_models import CostModel
from jaxserve.request import COMPLETED, EngineRequest, RequestOptions
from jaxserve.simulator.prompt_content import STOP_ID, UNKNOWN_ID
from jaxserve.simulator.simulated_engine import Outcome, SimulatedDevice, SimulatedEngine
from jaxserve.simulator.traces import ROOT, Trace
from jaxserve.telemetry.recorder import Recorder

_SECRET = b"the same in every simulation"

Progress = Callable[[int], object]
"""Called with the number of requests that have ended since the last call."""


@dataclasses.dataclass(frozen=True)
class ClientRule:
    """Determines the max_tokens of clients where the trace does not give it.

    Attributes:
        max_tokens: a number; "context" is the rest of the context, as of a client that sets nothing; "exact" is the
            true length (ignore_eos with max_tokens, as in benchmarks), so that the scheduler knows it.
    """

    max_tokens: int | str = "context"

    def __post_init__(self) -> None:
        named = self.max_tokens in ("context", "exact")
        if not named and not (isinstance(self.max_tokens, int) and self.max_tokens >= 1):
            raise ValueError(f"client max_tokens is {self.max_tokens!r}; it must be at least 1, 'context' or 'exact'")

    @classmethod
    def parse(cls, text: str) -> ClientRule:
        """Parses the command-line form."""
        return cls(int(text) if text.isdecimal() else text)


@dataclasses.dataclass(frozen=True, eq=False)
class SimulationResult:
    """Holds the results of the N requests of a trace; times in seconds of the virtual clock, nan for never.

    Attributes:
        trace: those that could be served: requests that fit neither context nor pool are `num_skipped`.
        arrived: when each was sent: in the trace's order, but turns of sessions are sent when the one before has ended.
        finished: time of the final output.
        reasons: "stop" and "length", "deadline" for deadlines missed, "refused" for a full queue.
        output_tokens: int64 [N], those generated.
        cached_tokens: int64 [N], of each prompt, those that were found in the prefix cache.
        replica: int64 [N].
        steps: columns of `records.STEP_COLUMNS` of each replica.
        token_times: float64 arrays, one a request.
        seconds: from the first arrival to the end of the last request.
        predictor_tau: Kendall's tau of each replica's predictor, None where it saw too few requests.
        replica_seconds: total time that replicas were up, the basis of costs.
    """

    trace: Trace
    num_skipped: int
    cost_name: str
    arrived: np.ndarray
    scheduled: np.ndarray
    first_token: np.ndarray
    finished: np.ndarray
    output_tokens: np.ndarray
    cached_tokens: np.ndarray
    preemptions: np.ndarray
    reasons: tuple[str, ...]
    replica: np.ndarray
    steps: tuple[dict[str, np.ndarray], ...]
    predictor_tau: tuple[float | None, ...]
    replica_seconds: float
    preemptions_by_kind: dict[str, int]
    token_logs: tuple[Any, ...] = dataclasses.field(repr=False, default=())

    @property
    def num_requests(self) -> int:
        """Number of requests that arrived, those that could not be served included."""
        return len(self.trace) + self.num_skipped

    @property
    def seconds(self) -> float:
        ends = self.finished[~np.isnan(self.finished)]
        return float(ends.max() - self.trace.arrivals.min()) if len(ends) else 0.0

    @functools.cached_property
    def completed(self) -> np.ndarray:
        """Returns bool [N]: requests that ended with all of their tokens."""
        return np.array([reason in COMPLETED for reason in self.reasons], bool)

    @property
    def queue_time(self) -> np.ndarray:
        """Seconds from arrival to the first step that computes the request."""
        return self.scheduled - self.arrived

    @property
    def ttft(self) -> np.ndarray:
        return self.first_token - self.arrived

    @functools.cached_property
    def last_token(self) -> np.ndarray:
        """Time of the last token, which may be before the final output."""
        return np.array([times[-1] if len(times) else np.nan for times in self.token_times])

    @functools.cached_property
    def tpot(self) -> np.ndarray:
        """Seconds a token after the first; nan below two tokens."""
        gaps = np.where(self.output_tokens > 1, self.output_tokens - 1, np.nan)
        return (self.last_token - self.first_token) / gaps

    @property
    def e2e(self) -> np.ndarray:
        return self.finished - self.arrived

    @functools.cached_property
    def token_times(self) -> list[np.ndarray]:
        """Times of each request's tokens."""
        found: list[np.ndarray] = [np.empty(0)] * len(self.trace)
        for log in self.token_logs:
            for index, times in enumerate(log.token_times(len(self.trace))):
                if len(times):
                    found[index] = times
        return found

    @functools.cached_property
    def itl(self) -> np.ndarray:
        """Gaps between the tokens of all requests, concatenated."""
        return np.concatenate([np.empty(0), *(np.diff(times) for times in self.token_times)])


def simulate(
    config: EngineConfig,
    trace: Trace,
    costs: CostModel,
    device: SimulatedDevice,
    *,
    client: ClientRule = ClientRule(),
    recorder: Recorder | None = None,
    stretches: bool = True,
    progress: Progress | None = None,
) -> SimulationResult:
    """Serves a trace with one engine until every request has ended. The same inputs give the same result.

    recorder: gets the events of the real engine. stretches: False goes step by step, for proofs. progress: see there.
    """
    kept, skipped = fitting(config, trace, device, client)
    requests = TraceRequests(kept, device, config, client)

    def on_finish(index: int) -> None:
        for turn in requests.after(index, engine.outcomes[index].finished):
            engine.submit(*turn)
        if progress is not None:
            progress(1)

    engine = SimulatedEngine(
        config,
        device,
        costs,
        content_keys=keys_of(config, kept),
        recorder=recorder,
        stretches=stretches,
        on_finish=on_finish,
    )
    for root in requests.roots():
        engine.run_until(root.request.arrival_time)
        engine.submit(*root)
    engine.run_until()
    return collect(kept, skipped, [engine], np.zeros(len(kept), np.int64))


def keys_of(config: EngineConfig, trace: Trace) -> ContentKeys | None:
    """Returns what identifies pages in a simulation; None where requests share none: prefix caching is off, or the
    trace does not tell what its prompts hold."""
    return ContentKeys(_SECRET) if config.cache.enable_prefix_caching and trace.prompts else None


def fitting(config: EngineConfig, trace: Trace, device: SimulatedDevice, client: ClientRule) -> tuple[Trace, int]:
    """Returns the requests that the engine would accept, and the number of the others."""
    most = min(device.max_model_len, device.pool_tokens(config))
    wanted = trace.output_tokens if client.max_tokens == "exact" else np.minimum(trace.output_tokens, 1)
    wanted = np.maximum(wanted, trace.max_tokens)
    if isinstance(client.max_tokens, int):
        wanted = np.where(trace.max_tokens > 0, wanted, client.max_tokens)
    keep = trace.prompt_tokens + wanted <= most
    if not config.scheduler.enable_chunked_prefill:
        keep &= trace.prompt_tokens <= config.scheduler.max_num_batched_tokens
    return (trace if keep.all() else trace.select(keep)), int((~keep).sum())


class ReadyRequest(NamedTuple):
    """A request to submit, the number of tokens that it will generate, and the id of each but the last of them."""

    request: EngineRequest
    output_tokens: int
    answer_id: int = UNKNOWN_ID


class TraceRequests:
    """Makes the engine's requests of a trace that fits, one by one: token ids exist from a request's arrival on.

    A prompt whose content the trace does not tell has one id throughout, and does not use the prefix cache.
    """

    def __init__(self, trace: Trace, device: SimulatedDevice, config: EngineConfig, client: ClientRule):
        self.trace = trace
        self._client = client
        self._most = min(device.max_model_len, device.pool_tokens(config) + 1)
        self._turns: dict[int, list[int]] = {}
        for index in np.flatnonzero(trace.parents != ROOT).tolist():
            self._turns.setdefault(int(trace.parents[index]), []).append(index)

    def __iter__(self) -> Iterator[ReadyRequest]:
        """Iterates over all requests, each as it is in the trace."""
        return map(self.make, range(len(self.trace)))

    def roots(self) -> Iterator[ReadyRequest]:
        """Iterates over the requests that wait for no other one, in order of arrival."""
        return map(self.make, np.flatnonzero(self.trace.parents == ROOT).tolist())

    def after(self, index: int, ended: float) -> list[ReadyRequest]:
        """Returns the turns that follow request `index`, which ended at the time `ended`."""
        pauses = self.trace.pauses
        return [self.make(turn, ended + float(pauses[turn])) for turn in self._turns.get(index, ())]

    def has_turns(self, index: int) -> bool:
        """Tells whether turns follow a request."""
        return index in self._turns

    def make(self, index: int, arrival: float | None = None) -> ReadyRequest:
        """Makes the request of that index. arrival: its time, None for that of the trace."""
        trace = self.trace
        arrival = float(trace.arrivals[index]) if arrival is None else arrival
        prompt, output, limit = (
            int(column[index]) for column in (trace.prompt_tokens, trace.output_tokens, trace.max_tokens)
        )
        deadline = float(trace.deadlines[index])
        if not limit:
            limit = {"context": self._most - prompt, "exact": output}.get(
                str(self._client.max_tokens), self._client.max_tokens
            )
        limit = int(limit)
        output = min(output, limit)
        content = trace.prompts[index] if trace.prompts else None
        request = EngineRequest(
            str(index),
            content.token_ids() if content else (UNKNOWN_ID,) * prompt,
            max_tokens=limit,
            stop_token_ids=(STOP_ID,) if output < limit else (),
            options=RequestOptions(
                trace.tenants[index],
                int(trace.priorities[index]),
                None if math.isinf(deadline) else arrival + deadline,
                prefix_caching=content is None or bool(content),
            ),
            arrival_time=arrival,
        )
        return ReadyRequest(request, output, int(trace.answers[index]))


def collect(
    trace: Trace,
    skipped: int,
    engines: list[SimulatedEngine],
    replica: np.ndarray,
    replica_seconds: float | None = None,
) -> SimulationResult:
    """Collects the result of engines that are done."""
    nothing = Outcome()
    found = [engines[where].outcomes.get(index, nothing) for index, where in enumerate(replica.tolist())]
    kinds: dict[str, int] = {}
    for engine in engines:
        for kind, count in engine.scheduler.num_preemptions_by_kind.items():
            kinds[kind] = kinds.get(kind, 0) + count
    result = SimulationResult(
        trace=trace,
        num_skipped=skipped,
        cost_name=engines[0].costs.name,
        arrived=np.array([each.arrived for each in found]),
        scheduled=np.array([each.scheduled for each in found]),
        first_token=np.array([each.first_token for each in found]),
        finished=np.array([each.finished for each in found]),
        output_tokens=np.array([each.tokens for each in found], np.int64),
        cached_tokens=np.array([each.cached_tokens for each in found], np.int64),
        preemptions=np.array([each.preemptions for each in found], np.int64),
        reasons=tuple(each.reason for each in found),
        replica=replica,
        steps=tuple(engine.steps.columns() for engine in engines),
        predictor_tau=tuple(engine.scheduler.predictor.kendall_tau for engine in engines),
        replica_seconds=0.0,
        preemptions_by_kind=kinds,
        token_logs=tuple(engine.tokens for engine in engines),
    )
    up = result.seconds * len(engines) if replica_seconds is None else replica_seconds
    return dataclasses.replace(result, replica_seconds=up)
