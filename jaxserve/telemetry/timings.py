"""Computes latencies of requests from recorded events."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

from jaxserve.telemetry.recorder import (
    Event,
    FirstToken,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    RequestScheduled,
    TokensProduced,
)


@dataclasses.dataclass(frozen=True)
class RequestTimings:
    """Event times of one request, and the latencies derived from them. All in seconds; None is "not yet, or never".

    Attributes:
        arrived: time of the event; so are scheduled, first_token and finished.
        token_times: one for each output token.
        reason: finish reason, "" while unfinished.
        preemptions: so far.
    """

    request_id: str
    tenant: str
    priority: int
    prompt_tokens: int
    arrived: float
    scheduled: float | None = None
    first_token: float | None = None
    token_times: tuple[float, ...] = ()
    finished: float | None = None
    reason: str = ""
    preemptions: int = 0

    @property
    def output_tokens(self) -> int:
        return len(self.token_times)

    @property
    def queue_time(self) -> float | None:
        """Time from arrival to the first step that computes the request."""
        return _difference(self.arrived, self.scheduled)

    @property
    def prefill_time(self) -> float | None:
        """Time from the end of the queue to the first token."""
        return _difference(self.scheduled, self.first_token)

    @property
    def ttft(self) -> float | None:
        """Time to first token, from arrival."""
        return _difference(self.arrived, self.first_token)

    @property
    def decode_time(self) -> float | None:
        """Time from the first token to the last one so far."""
        return _difference(self.first_token, self.token_times[-1] if self.token_times else None)

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: decode_time / (output_tokens - 1); None below two tokens."""
        decode_time = self.decode_time
        if decode_time is None or self.output_tokens < 2:
            return None
        return decode_time / (self.output_tokens - 1)

    @property
    def itls(self) -> tuple[float, ...]:
        """Inter-token latencies: the time from each token to the next, output_tokens - 1 of them.

        Tokens that were produced together are 0 apart, so the mean is `tpot`.
        """
        return tuple(after - before for before, after in itertools.pairwise(self.token_times))

    @property
    def e2e(self) -> float | None:
        """End-to-end latency, from arrival to finish."""
        return _difference(self.arrived, self.finished)


def request_timings(events: Iterable[Event]) -> tuple[RequestTimings, ...]:
    """Returns the timings of every request whose arrival is among the events, in order of arrival.

    A request whose arrival a full recorder has dropped is left out: its other figures could be wrong. An id that
    arrives again after its request finished is another request.
    """
    requests: list[_Progress] = []
    current: dict[str, _Progress] = {}
    for event in events:
        if isinstance(event, RequestArrived):
            progress = current[event.request_id] = _Progress(event)
            requests.append(progress)
        elif isinstance(event, TokensProduced):
            for request_id in event.request_ids:
                if (progress := current.get(request_id)) is not None:
                    progress.add_token(event.time)
        elif isinstance(event, RequestScheduled | FirstToken | RequestPreempted | RequestFinished):
            progress = current.get(event.request_id)
            if progress is not None:
                progress.add(event)
            if isinstance(event, RequestFinished):
                current.pop(event.request_id, None)
    return tuple(progress.timings() for progress in requests)


class _Progress:
    """Accumulates the events of one request."""

    def __init__(self, arrival: RequestArrived) -> None:
        self._arrival = arrival
        self._scheduled: float | None = None
        self._first_token: float | None = None
        self._token_times: list[float] = []
        self._preemptions = 0
        self._finish: RequestFinished | None = None

    def add_token(self, time: float) -> None:
        self._token_times.append(time)

    def add(self, event: RequestScheduled | FirstToken | RequestPreempted | RequestFinished) -> None:
        if isinstance(event, RequestScheduled):
            self._scheduled = event.time
        elif isinstance(event, FirstToken):
            self._first_token = event.time
        elif isinstance(event, RequestPreempted):
            self._preemptions += 1
        else:
            self._finish = event

    def timings(self) -> RequestTimings:
        return RequestTimings(
            request_id=self._arrival.request_id,
            tenant=self._arrival.tenant,
            priority=self._arrival.priority,
            prompt_tokens=self._arrival.prompt_tokens,
            arrived=self._arrival.time,
            scheduled=self._scheduled,
            first_token=self._first_token,
            token_times=tuple(self._token_times),
            finished=None if self._finish is None else self._finish.time,
            reason="" if self._finish is None else self._finish.reason,
            preemptions=self._preemptions,
        )


def _difference(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
