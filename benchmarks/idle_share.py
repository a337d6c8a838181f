"""How long the compute threads wait for the host between steps: `python -m benchmarks.idle_share`.

An engine with as many requests under way as it can run, and more waiting, in a loop that also encodes and frames the
messages as the engine's process does. For every step the recorder has an upper bound of the time in which the device
had nothing to do before it (`StepRecorded.idle_seconds`, see jaxserve/engine/idle.py); the share is their sum over the
wall time. Beside it stands what the host did meanwhile, and how many cores the process kept busy in all.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.host_step import send
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.work import SHAPES
from jaxserve.config import gin_config
from jaxserve.config.settings import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import AddRequest
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.telemetry.recorder import StepRecorded

FULL = 0.03
"""The share that the project promises to stay below."""


def fill(core: EngineCore, rng: np.random.Generator, number: int) -> int:
    """Adds requests until twice as many are unfinished as run at once; returns the number of the next."""
    scheduler, vocab_size = core.scheduler, core.runner.info.vocab_size
    while scheduler.num_running + scheduler.num_waiting < 2 * core.config.scheduler.max_num_seqs:
        prompt = tuple(rng.integers(3, vocab_size, rng.integers(32, 257)).tolist())
        core.handle(AddRequest(EngineRequest(f"request-{number}", prompt, int(rng.integers(32, 257)))))
        number += 1
    return number


def measure(name: str, core: EngineCore, seconds: float) -> dict[str, Any]:
    """Runs the engine full for `seconds` after a warm-up of a quarter as long."""
    rng = np.random.default_rng(0)
    steps: list[StepRecorded] = []
    core.recorder.subscribe(lambda event: steps.append(event) if isinstance(event, StepRecorded) else None)
    number, end = 0, time.perf_counter() + seconds / 4
    while time.perf_counter() < end:
        number = fill(core, rng, number)
        send(core.step())
    steps.clear()
    start, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() < start + seconds:
        number = fill(core, rng, number)
        send(core.step())
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    share = {
        part: sum(getattr(step, f"{part}_seconds") for step in steps) / wall
        for part in ("idle", "schedule", "dispatch", "collect", "update")
    }
    share["between_steps"] = 1 - sum(share[part] for part in ("schedule", "dispatch", "collect", "update"))
    return {
        "model": name,
        "seconds": wall,
        "steps": len(steps),
        "output_tokens_per_second": sum(step.decode_tokens for step in steps) / wall,
        "step_ms": 1e3 * wall / len(steps),
        "steps_with_idle": sum(step.idle_seconds > 0 for step in steps),
        "share_of_wall": share,
        "cores_busy": cpu / wall,
    }


def configs(names: list[str], folder: pathlib.Path) -> dict[str, EngineConfig]:
    """Engines by name: `tiny`, the default model as its configuration has it, or a shape with random weights."""
    found = {}
    for name in names:
        if name == "tiny":
            arguments = ["--config", "tiny.gin"]
            found[name] = gin_config.load_from_command_line(argparse.ArgumentParser(), arguments)[1].engine
        else:
            write_checkpoint(folder / name, SHAPES[name])
            found[name] = EngineConfig.from_options(
                model=str(folder / name), skip_tokenizer_init=True, max_model_len=1024, num_pages=64 * 64 + 1
            )
    return found


def main() -> int:
    """Prints the table and writes the result; returns 1 where a share is above the promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "153m"], choices=["tiny", *SHAPES])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--name", help="name of the result file; default: idle_share_jax<version>")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            measure(name, EngineCore(config, ModelRunner(config)), options.seconds)
            for name, config in configs(options.models, pathlib.Path(folder)).items()
        ]
    name = options.name or f"idle_share_jax{report.versions()['jax']}"
    path = report.write(name, {"models": options.models, "seconds": options.seconds}, results)
    print(report.describe())
    parts = ("idle", "schedule", "dispatch", "collect", "update", "between_steps")
    rows = [
        (result["model"], result["steps"], result["step_ms"], result["output_tokens_per_second"])
        + tuple(100 * result["share_of_wall"][part] for part in parts)
        + (result["cores_busy"],)
        for result in results
    ]
    print(
        "% of wall time: idle is the device's, an upper bound; the others are the host's, collect waits for the device"
    )
    header = ("model", "steps", "step ms", "output tok/s", *parts, "cores busy")
    print(report.table(header, rows))
    print(f"written: {path}")
    worst = max(result["share_of_wall"]["idle"] for result in results)
    return 0 if worst < FULL else report.fail(f"the device is idle for up to {100 * worst:.1f} % of the time")


if __name__ == "__main__":
    raise SystemExit(main())
