"""Reports a simulation: throughput, latencies, goodput under targets, fairness; as a table and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxserve.request import COMPLETED
from jaxserve.simulator.simulation import SimulationResult
from jaxserve.telemetry.batch_metrics import Spread

METRICS = ("ttft", "tpot", "itl", "e2e", "queue_time")


@dataclasses.dataclass(frozen=True)
class Slo:
    """Latency targets in seconds, all of which a request must meet; infinite is no target."""

    ttft: float = math.inf
    tpot: float = math.inf
    e2e: float = math.inf

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Parses "ttft=0.5,tpot=0.05". Raises ValueError for anything else."""
        names = [field.name for field in dataclasses.fields(cls)]
        found: dict[str, float] = {}
        for item in filter(None, text.split(",")):
            name, _, value = item.partition("=")
            try:
                if name not in names or not float(value) > 0:
                    raise ValueError(item)
                found[name] = float(value)
            except ValueError as error:
                raise ValueError(
                    f"slo {item!r}: it must be NAME=SECONDS with NAME one of {', '.join(names)}"
                ) from error
        return cls(**found)

    def __str__(self) -> str:
        parts = [f"{name}={value:g}" for name, value in dataclasses.asdict(self).items() if not math.isinf(value)]
        return ",".join(parts) or "none"

    def met(self, result: SimulationResult) -> np.ndarray:
        """Returns bool [N]: requests that ended with all tokens and within every target; a single token has no tpot."""
        good = result.completed & (result.ttft <= self.ttft) & (result.e2e <= self.e2e)
        return good & ~(result.tpot > self.tpot)

    def share(self, result: SimulationResult) -> float:
        """Returns the share of all arrived requests that met every target: skipped, refused and dropped ones did
        not.
        """
        return _share(self.met(result).sum(), result.num_requests)


@dataclasses.dataclass(frozen=True)
class TenantReport:
    """Metrics of one tenant's requests. service: tokens computed for it, prompt and output."""

    requests: int
    completed: int
    service: int
    goodput: float
    ttft: Spread | None
    tpot: Spread | None


@dataclasses.dataclass(frozen=True)
class Report:
    """Metrics of a run. Latencies are in seconds, of requests that ended with all of their tokens.

    Attributes:
        requests: all that arrived.
        skipped: of these, too long to be served.
        seconds: from the first arrival to the last end.
        goodput: requests a second that met the targets.
        good_share: of all that arrived.
        batch_utilisation: useful over computed tokens.
        device_utilisation: time in which the devices computed, over the time that replicas were up.
        kendall_tau: of the predictors (a mean over replicas).
        prompt_tokens: of the prompts that were computed.
        cached_tokens: of these, found in the prefix cache.
        jain: Jain's index of the tenants' mean time to the first token, 1 where all wait alike.
        replica_seconds_per_1000_tokens: replicas' time for 1,000 output tokens, the measure of cost.
    """

    requests: int
    skipped: int
    reasons: Mapping[str, int]
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    slo: str
    goodput: float
    good_share: float
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None
    queue_time: Spread | None
    steps: int
    batch_utilization: float
    device_utilization: float
    mean_batch_size: float
    preemptions: Mapping[str, int]
    kendall_tau: float | None
    prompt_tokens: int
    cached_tokens: int
    tenants: Mapping[str, TenantReport]
    jain: float
    replicas: int
    replica_seconds: float
    replica_seconds_per_1000_tokens: float
    costs: str

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that were found in the prefix cache."""
        return _share(self.cached_tokens, self.prompt_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return dataclasses.asdict(self) | {"hit_rate": self.hit_rate}


def report(result: SimulationResult, slo: Slo = Slo()) -> Report:
    """Computes the metrics of a result."""
    done, trace, seconds = result.completed, result.trace, result.seconds
    good = slo.met(result)
    outputs, prompts = int(result.output_tokens.sum()), int(trace.prompt_tokens[~np.isnan(result.first_token)].sum())
    columns = {name: np.concatenate([steps[name] for steps in result.steps]) for name in result.steps[0]}
    useful = columns["prefill_tokens"].sum() + columns["decode_tokens"].sum()
    taus = [tau for tau in result.predictor_tau if tau is not None]
    tenants = {
        name: _tenant(result, good, np.array([tenant == name for tenant in trace.tenants], bool), seconds)
        for name in sorted(set(trace.tenants))
    }
    return Report(
        requests=result.num_requests,
        skipped=result.num_skipped,
        reasons=dict(sorted(Counter(result.reasons).items())),
        seconds=seconds,
        requests_per_second=_share(done.sum(), seconds),
        output_tokens_per_second=_share(outputs, seconds),
        total_tokens_per_second=_share(outputs + prompts, seconds),
        slo=str(slo),
        goodput=_share(good.sum(), seconds),
        good_share=slo.share(result),
        ttft=_spread(result.ttft[done]),
        tpot=_spread(result.tpot[done]),
        itl=_spread(result.itl),
        e2e=_spread(result.e2e[done]),
        queue_time=_spread(result.queue_time[done]),
        steps=len(columns["begin"]),
        batch_utilization=_share(useful, columns["token_bucket"].sum()),
        device_utilization=_share((columns["end"] - columns["start"]).sum(), result.replica_seconds),
        mean_batch_size=float(columns["rows"].mean()) if len(columns["rows"]) else 0.0,
        preemptions=result.preemptions_by_kind,
        kendall_tau=sum(taus) / len(taus) if taus else None,
        prompt_tokens=prompts,
        cached_tokens=int(result.cached_tokens.sum()),
        tenants=tenants,
        jain=jain_index([each.ttft.mean for each in tenants.values() if each.ttft is not None]),
        replicas=len(result.steps),
        replica_seconds=result.replica_seconds,
        replica_seconds_per_1000_tokens=_share(1000 * result.replica_seconds, outputs),
        costs=result.cost_name,
    )


def jain_index(values: Sequence[float]) -> float:
    """Computes (sum x)^2 / (n sum x^2): 1 where all are equal, 1 / n where one has everything.

    Source: Jain, Chiu and Hawe, 1984.
    """
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def table(reports: Mapping[str, Report]) -> str:
    """Formats one column for each report, for the terminal; times in milliseconds."""
    names = list(reports)
    rows: list[tuple[str, list[str]]] = [
        ("requests", [f"{each.requests:,}" for each in reports.values()]),
        ("of these too long, not served", [f"{each.skipped:,}" for each in reports.values()]),
        ("ended otherwise", [_otherwise(each) for each in reports.values()]),
        ("seconds", [f"{each.seconds:,.1f}" for each in reports.values()]),
        ("requests/s", [f"{each.requests_per_second:.2f}" for each in reports.values()]),
        ("output tokens/s", [f"{each.output_tokens_per_second:,.1f}" for each in reports.values()]),
        ("all tokens/s", [f"{each.total_tokens_per_second:,.1f}" for each in reports.values()]),
        ("goodput, requests/s", [f"{each.goodput:.3f}" for each in reports.values()]),
        ("within targets, %", [f"{100 * each.good_share:.2f}" for each in reports.values()]),
    ]
    for metric, label in zip(METRICS, ("TTFT", "TPOT", "ITL", "end to end", "queue"), strict=True):
        for figure in ("mean", "p50", "p90", "p99"):
            values = [getattr(each, metric) for each in reports.values()]
            cells = ["-" if value is None else f"{1e3 * getattr(value, figure):,.2f}" for value in values]
            rows.append((f"{label}, ms, {figure}", cells))
    rows += [
        ("steps", [f"{each.steps:,}" for each in reports.values()]),
        ("mean batch size", [f"{each.mean_batch_size:.1f}" for each in reports.values()]),
        ("batch utilization, %", [f"{100 * each.batch_utilization:.1f}" for each in reports.values()]),
        ("device utilization, %", [f"{100 * each.device_utilization:.1f}" for each in reports.values()]),
        ("preemptions", [_counts(each.preemptions) for each in reports.values()]),
        ("Kendall tau", ["-" if (tau := each.kendall_tau) is None else f"{tau:.2f}" for each in reports.values()]),
    ]
    if any(each.cached_tokens for each in reports.values()):
        rows += [
            ("cached prompt tokens", [f"{each.cached_tokens:,}" for each in reports.values()]),
            ("cached prompt tokens, %", [f"{100 * each.hit_rate:.2f}" for each in reports.values()]),
        ]
    if any(each.replicas > 1 for each in reports.values()):
        rows.append(
            ("replicas, mean", [f"{_share(each.replica_seconds, each.seconds):.2f}" for each in reports.values()])
        )
    rows.append(
        ("replica s / 1,000 tokens", [f"{each.replica_seconds_per_1000_tokens:.3f}" for each in reports.values()])
    )
    rows += _tenant_rows(reports)
    return _table(["", *names], [[label, *cells] for label, cells in rows])


def _tenant_rows(reports: Mapping[str, Report]) -> list[tuple[str, list[str]]]:
    tenants = sorted({tenant for each in reports.values() for tenant in each.tenants})
    if len(tenants) < 2:
        return []
    rows = []
    for tenant in tenants:
        cells = []
        for each in reports.values():
            found = each.tenants.get(tenant)
            known = found is not None and found.ttft is not None
            cells.append(f"{1e3 * found.ttft.mean:,.1f} / {1e3 * found.ttft.p99:,.1f}" if known else "-")  # type: ignore[union-attr]
        rows.append((f"TTFT of {tenant or 'no tenant'}, ms, mean / p99", cells))
    rows.append(("Jain's index of TTFT", [f"{each.jain:.3f}" for each in reports.values()]))
    return rows


def _tenant(result: SimulationResult, good: np.ndarray, mine: np.ndarray, seconds: float) -> TenantReport:
    done = mine & result.completed
    computed = mine & ~np.isnan(result.first_token)
    return TenantReport(
        requests=int(mine.sum()),
        completed=int(done.sum()),
        service=int(result.trace.prompt_tokens[computed].sum() + result.output_tokens[mine].sum()),
        goodput=_share((good & mine).sum(), seconds),
        ttft=_spread(result.ttft[done]),
        tpot=_spread(result.tpot[done]),
    )


def _spread(values: np.ndarray) -> Spread | None:
    return Spread.of(values[~np.isnan(values)])


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0


def _otherwise(each: Report) -> str:
    return _counts({reason: count for reason, count in each.reasons.items() if reason not in COMPLETED})


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "0"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [header, *rows]
    widths = [max(len(row[place]) for row in cells) for place in range(len(header))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if place else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
