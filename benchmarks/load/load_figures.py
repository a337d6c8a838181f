"""The figures of a serving run under vLLM's names (times in ms unless a name says otherwise), from what was seen of
each request."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

GOODPUT_METRICS = ("ttft", "tpot", "e2el")
PERCENTILES = (90, 95, 99)


@dataclasses.dataclass(frozen=True)
class Seen:
    """One request as its client saw it; times in seconds of one clock.

    arrival: when it was due. sent: when it was sent; later where --max-concurrency held it back. tokens: (time, count)
    of each message that brought tokens. ended: when its stream ended. error: one line, empty where it succeeded.
    """

    arrival: float
    sent: float
    ended: float
    tokens: tuple[tuple[float, int], ...]
    input_tokens: int
    text: str = ""
    finish_reason: str = ""
    error: str = ""

    @property
    def output_tokens(self) -> int:
        return sum(count for _, count in self.tokens)

    @property
    def ttft(self) -> float:
        """From sending to the first token; of a request without tokens, to its end."""
        return (self.tokens[0][0] if self.tokens else self.ended) - self.sent

    @property
    def latency(self) -> float:
        """From sending to the last token."""
        return (self.tokens[-1][0] if self.tokens else self.ended) - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean time of a token after the first; None where there is at most one."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itls(self) -> list[float]:
        """Times between messages with tokens. One that brings several tokens counts once, with the whole wait."""
        times = [time for time, _ in self.tokens]
        return [later - sooner for sooner, later in itertools.pairwise(times)]


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """{"ttft": 500.0, ...} in ms from ["ttft:500", ...]. Raises ValueError for another metric or no positive number."""
    found = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = 0.0
        if name not in GOODPUT_METRICS or not limit > 0:
            raise ValueError(f"goodput {pair!r} is not METRIC:MS with METRIC one of {', '.join(GOODPUT_METRICS)}")
        found[name] = limit
    return found


def is_good(seen: Seen, limits: Mapping[str, float]) -> bool:
    """Whether a request met every limit, in ms; a failed one never does."""
    values = {"ttft": seen.ttft, "tpot": seen.tpot or 0.0, "e2el": seen.latency}
    return not seen.error and all(1e3 * values[name] <= limit for name, limit in limits.items())


def figures(seen: Sequence[Seen], goodput: Mapping[str, float] | None = None, details: bool = False) -> dict[str, Any]:
    """The run's figures. duration runs from the first arrival to the last stream's end.

    Failed requests count under `failed` alone. details: the lists per request too, in the order of `seen`.
    """
    done = [one for one in seen if not one.error]
    duration = max(one.ended for one in seen) - min(one.arrival for one in seen)
    inputs = sum(one.input_tokens for one in done)
    outputs = sum(one.output_tokens for one in done)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(seen) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration,
        "request_goodput": sum(is_good(one, goodput) for one in done) / duration if goodput else None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "max_concurrent_requests": most_open([(one.sent, one.ended) for one in seen]),
    }
    found |= statistics_ms("ttft", [one.ttft for one in done])
    found |= statistics_ms("tpot", [one.tpot for one in done if one.tpot is not None])
    found |= statistics_ms("itl", [gap for one in done for gap in one.itls])
    found |= statistics_ms("e2el", [one.latency for one in done])
    if details:
        found |= {
            "input_lens": [one.input_tokens for one in seen],
            "output_lens": [one.output_tokens for one in seen],
            "ttfts": [one.ttft for one in seen],
            "itls": [one.itls for one in seen],
            "latencies": [one.latency for one in seen],
            "queue_times": [one.sent - one.arrival for one in seen],
            "errors": [one.error for one in seen],
        }
    return found


def statistics_ms(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """{mean, median, std, p90, p95, p99}_NAME_ms; None where there is no value. Percentiles are interpolated."""
    if not seconds:
        return {f"{kind}_{name}_ms": None for kind in ("mean", "median", "std", *(f"p{part}" for part in PERCENTILES))}
    values = 1e3 * np.asarray(seconds)
    found = {"mean": values.mean(), "median": np.median(values), "std": values.std()}
    found |= {f"p{part}": np.percentile(values, part) for part in PERCENTILES}
    return {f"{kind}_{name}_ms": float(value) for kind, value in found.items()}


def most_open(spans: Sequence[tuple[float, float]]) -> int:
    """How many of the spans (begin, end) overlap at most; one that ends as another begins does not."""
    changes = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
