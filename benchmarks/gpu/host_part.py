"""The engine itself over random weights: seconds of its start, and where the host's time in a decode step goes.

Schedule, pack and dispatch are timed apart (benchmarks/host_step.py), while the device computes: `collect` is what the
host waits for it, so a step whose `collect` is nearly 0 is bound by the host.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from benchmarks.gpu import device
from benchmarks.gpu import llama_shape as llama
from benchmarks.gpu.bundle_part import usable
from benchmarks.gpu.record import Record, Settings
from benchmarks.host_step import PARTS, HostMeter, by_part
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import AbortRequest, AddRequest, outputs
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner

FIRST_ORDINARY_ID = 3
SETTLE = 5


def run(settings: Settings, record: Record) -> None:
    """The start, then one case a number of rows."""
    device.prepare(settings, record)
    directory = usable(settings, record)
    record.summary["note"] = "Started " + ("from a bundle." if directory else "without a bundle.")
    held: list[EngineCore] = []

    def core() -> EngineCore:
        if not held:
            config = llama.engine_config(settings.gpu, bundle=directory)
            held.append(EngineCore(config, ModelRunner(config)))
        return held[0]

    record.case("start", lambda: start(core))
    context, steps = (1024, 100) if settings.gpu else (32, 20)
    for rows in (64, 1, 256) if settings.gpu else (4, 1, 8):
        record.case(f"{rows} rows", lambda rows=rows: measure(core(), rows, context, steps), rows=rows, context=context)


def start(core: Any) -> dict[str, Any]:
    """Seconds of the engine's start and of its phases."""
    begin = time.perf_counter()
    info = core().runner.info
    seconds = time.perf_counter() - begin
    return {
        "start_seconds": seconds,
        "phases": {name: spent for name, _, spent in info.phases},
        "programs": info.num_executables,
        "compile_seconds": info.compile_seconds,
    }


def measure(core: EngineCore, rows: int, context: int, steps: int) -> dict[str, Any]:
    """Microseconds of each part of the host's time, median, and the step's time, while `rows` requests decode."""
    rng = np.random.default_rng(rows)
    names = [f"{rows}-{number}" for number in range(rows)]
    for name in names:
        ids = tuple(rng.integers(FIRST_ORDINARY_ID, core.runner.info.vocab_size, context).tolist())
        # Those whose prompts come first decode while the others' are computed.
        core.handle(AddRequest(EngineRequest(name, ids, max_tokens=rows + 2 * SETTLE + steps + 2)))
    waiting = set(names)
    while waiting:
        waiting -= {one.request_id for message in core.step() for one in outputs(message) if one.token_ids}
    for _ in range(SETTLE):
        core.step()
    spent, wall = [], []
    with HostMeter() as meter:
        for _ in range(steps):
            begin = time.perf_counter()
            spent.append(meter.step(core)[0])
            wall.append(time.perf_counter() - begin)
    for name in names:
        core.handle(AbortRequest(name))
    while core.busy:
        core.step()
    parts = by_part(spent)
    medians = {part: parts[part]["p50"] for part in PARTS}
    step = statistics.median(wall)
    return {
        "step_ms": step * 1e3,
        **{f"{part}_us": value for part, value in medians.items()},
        "host_us": sum(value for part, value in medians.items() if part != "collect"),
        "tokens_per_s": rows / step,
        "parts": parts,
    }
