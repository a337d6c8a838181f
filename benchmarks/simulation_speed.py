"""How fast a trace is simulated: `python -m jaxserve.simulate` on one core, without its progress bar.

    python -m benchmarks.simulation_speed --trace azure_2023_conv.csv

A round is a process of its own. `seconds` are those of the simulation, as the program says them; `process_seconds` are
from the start of the process to its end, with imports, the trace read and the figures calculated.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import report

_SAID = re.compile(r"([\d,]+) steps simulated in ([\d.]+) s")


def measure(trace: pathlib.Path, config: str, target: str, limit: int | None = None) -> dict[str, Any]:
    """One round: what was simulated, and the seconds and the peak of memory (MiB) that it took."""
    with tempfile.TemporaryDirectory() as directory:
        figures = pathlib.Path(directory) / "figures.json"
        command = ["-m", "jaxserve.simulate", "--config", config, "--target", target, "--trace", str(trace)]
        command += ["--json", str(figures)] + ([] if limit is None else ["--limit", str(limit)])
        text, seconds, peak_mib = _on_one_core([sys.executable, *command])
        document = json.loads(figures.read_text(encoding="utf-8"))
    (run,) = document["runs"].values()
    said = _SAID.search(text)
    assert said is not None, "the program does not say how long it simulated"
    return {
        "trace": document["trace"],
        "requests": run["requests"],
        "steps": run["steps"],
        "simulated_seconds": run["seconds"],
        "seconds": float(said[2]),
        "process_seconds": seconds,
        "peak_rss_mib": peak_mib,
    }


def _on_one_core(command: Sequence[str]) -> tuple[str, float, float]:
    """What a command prints, its seconds and its peak of memory in MiB (Linux)."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(mine)})  # the process inherits it
    try:
        begin = time.perf_counter()
        environment = os.environ | {"TQDM_DISABLE": "1"}
        process = subprocess.Popen(command, cwd=report.ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    finally:
        os.sched_setaffinity(0, mine)
    assert process.stdout is not None
    with process.stdout:
        text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return text, seconds, usage.ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes the file; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulation_speed", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--trace", type=pathlib.Path, required=True, metavar="FILE", help="CSV or JSONL")
    parser.add_argument("--limit", type=int, default=None, help="requests of the trace at most")
    parser.add_argument("--config", default="llama.gin", help="%(default)s")
    parser.add_argument("--target", default="h200", help="%(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="the results are those of the median one (%(default)s)")
    options = parser.parse_args(arguments)
    trace = options.trace.resolve()
    rounds = [measure(trace, options.config, options.target, options.limit) for _ in range(options.rounds)]
    found = dict(rounds[0])
    for name in ("seconds", "process_seconds", "peak_rss_mib"):
        found[name] = statistics.median(each[name] for each in rounds)
    found["rounds"] = [each["seconds"] for each in rounds]
    settings = {"config": options.config, "target": options.target, "limit": options.limit, "cores": 1}
    path = report.write("simulation_speed", settings, found)
    print(report.describe())
    head = ("trace", "requests", "steps", "simulated s", "took s", "process s", "peak MiB")
    names = ("trace", "requests", "steps", "simulated_seconds", "seconds", "process_seconds", "peak_rss_mib")
    print(report.table(head, [[found[name] for name in names]]))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
