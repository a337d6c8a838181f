"""How well output lengths are predicted on traces of real requests, and what a prediction costs.

    python -m benchmarks.prediction azure_2023_conv.csv azure_2023_code.csv

Each request of a trace is predicted and then taught, in the order of arrival. Coverage is the share of outputs that lie
within the predicted quantile; tau is Kendall's tau-b of predicted (the median) against real lengths, over each window
of requests. Files are those that the simulator reads (jaxserve/simulator/traces.py).
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import report
from jaxserve.config.scheduling import PredictionConfig
from jaxserve.request import EngineRequest, RequestOptions
from jaxserve.scheduler.length_prediction import OutputLengthPredictor
from jaxserve.simulator.trace_files import read_trace
from jaxserve.simulator.traces import Trace

QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.95)


def measure(trace: Trace, max_tokens: int, window: int) -> dict[str, Any]:
    """Coverage of each quantile, tau of every window, and the median microseconds of a call."""
    predictor = OutputLengthPredictor(PredictionConfig(prediction_window=window))
    covered = dict.fromkeys(QUANTILES, 0)
    taus: list[float] = []
    microseconds: dict[str, list[float]] = {"expected": [], "observe": [], "kendall_tau": []}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = call()
        microseconds[name].append(1e6 * (time.perf_counter() - start))
        return value

    for row in range(len(trace)):
        limit = int(trace.max_tokens[row]) or max_tokens
        request = EngineRequest(
            request_id=str(row),
            prompt_token_ids=(0,) * int(trace.prompt_tokens[row]),
            max_tokens=limit,
            stop_token_ids=(1,),
            options=RequestOptions(tenant=trace.tenants[row]),
        )
        output = min(int(trace.output_tokens[row]), limit)
        expected = timed("expected", lambda request=request: predictor.expected(request))
        for q in QUANTILES:
            covered[q] += output <= predictor.quantile(request, q)
        timed("observe", functools.partial(predictor.observe, request, output, expected))
        if predictor.num_observed % window == 0:
            tau = timed("kendall_tau", lambda: predictor.kendall_tau)
            taus += [] if tau is None else [tau]
    return {
        "trace": trace.name,
        "requests": len(trace),
        "coverage": {str(q): count / len(trace) for q, count in covered.items()},
        "tau": {"mean": statistics.fmean(taus), "windows": taus} if taus else None,
        "microseconds": {name: statistics.median(values) for name, values in microseconds.items() if values},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.prediction", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("traces", nargs="+", type=pathlib.Path, metavar="TRACE", help="CSV or JSONL files")
    parser.add_argument("--limit", type=int, help="requests of each trace at most")
    parser.add_argument("--max-tokens", type=int, default=2048, help="where the trace does not say (%(default)s)")
    parser.add_argument("--window", type=int, default=512, help="PredictionConfig.prediction_window (%(default)s)")
    parser.add_argument("--name", default="prediction", help="of the result file (%(default)s)")
    options = parser.parse_args(arguments)
    results = [measure(read_trace(path, options.limit), options.max_tokens, options.window) for path in options.traces]
    settings = {"limit": options.limit, "max_tokens": options.max_tokens, "window": options.window}
    path = report.write(options.name, settings, results)
    print(report.describe())
    rows = [
        (
            found["trace"],
            found["requests"],
            *(f"{100 * share:.1f} %" for share in found["coverage"].values()),
            f"{found['tau']['mean']:.3f}" if found["tau"] else "-",
            *(f"{found['microseconds'].get(name, 0.0):.1f}" for name in ("expected", "observe", "kendall_tau")),
        )
        for found in results
    ]
    within = tuple(f"within q {q}" for q in QUANTILES)
    print(report.table(("trace", "requests", *within, "tau", "expected µs", "observe µs", "tau µs"), rows))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
