"""Step times of the real engine for the simulator: `python -m benchmarks.step_costs --config tiny.gin --output FILE`.

Drives `EngineCore` over `ModelRunner` through batches that visit every bucket, with short and long contexts, prompts
alone and prompts beside decodes; notes of every step what decides its cost and how long it took; and writes a file that
`python -m jaxserve.simulate --model-cost FILE` fits (jaxserve/planning/step_cost_models.py).

A step's time is that from when the results of the step before were there until its own are: with one step in flight
the device goes from one to the next. Where the host takes longer than the device, that is the host's time.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Sequence

import numpy as np

from benchmarks import report
from jaxserve.config import gin_config
from jaxserve.config.settings import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import AddRequest
from jaxserve.planning.step_cost_models import FittedCosts, HostCosts, StepTime, write_costs
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.protocol import Pending, Runner, RunnerInfo
from jaxserve.runner.wrapper import RunnerWrapper
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.step_shape import StepShape, shape_of
from jaxserve.telemetry.recorder import Recorder, StepRecorded

FIRST_ORDINARY_ID = 3
_PAUSE = 2e-3
"""Seconds between two turns of the loop, beyond which the engine was idle."""


class MeteredRunner(RunnerWrapper):
    """A runner that notes the shape of every step."""

    def __init__(self, runner: Runner):
        super().__init__(runner)
        self.shapes: list[StepShape] = []

    def dispatch_forward(self, plan: StepPlan) -> Pending:
        self.shapes.append(shape_of(plan))
        return self._runner.dispatch_forward(plan)


class StepMeter:
    """Pairs the shapes of an engine's steps with their times, as its recorder has them."""

    def __init__(self, recorder: Recorder, runner: MeteredRunner):
        self._shapes = runner.shapes
        self._records: list[StepRecorded] = []
        recorder.subscribe(lambda event: self._records.append(event) if isinstance(event, StepRecorded) else None)

    def steps(self) -> list[StepTime]:
        """The times of steps, as far as something waited for them."""
        found: list[StepTime] = []
        shapes: list[StepShape] = []
        since: float | None = None  # when the device had nothing before the first of `shapes`
        records = self._records
        for place, (shape, record) in enumerate(zip(self._shapes, records, strict=True)):
            if since is None:
                since = _dispatched(record)
            shapes.append(shape)
            following = records[place + 1] if place + 1 < len(records) else None
            if following is None or following.time - _end(record) > _PAUSE or following.step != record.step + 1:
                shapes, since = [], None  # its end is not recorded
            elif shape.row_bucket:
                end = _collected(following)
                found.append(StepTime(tuple(shapes), end - since))
                shapes, since = [], end
        return found

    def host(self) -> HostCosts:
        """Means of the loop's own work. Dispatching waits where the device's queue is full, so that the median is taken
        of it."""
        records = self._records
        return HostCosts(
            before=float(np.median([record.schedule_seconds + record.dispatch_seconds for record in records])),
            after=float(np.mean([record.update_seconds for record in records])),
        )


def _dispatched(record: StepRecorded) -> float:
    return record.time + record.schedule_seconds + record.dispatch_seconds


def _collected(record: StepRecorded) -> float:
    return _dispatched(record) + record.collect_seconds


def _end(record: StepRecorded) -> float:
    return _collected(record) + record.update_seconds


@dataclasses.dataclass(frozen=True)
class Batch:
    """Requests that are added at once. prompts, outputs: tokens of each."""

    prompts: Sequence[int]
    outputs: Sequence[int]


def sweep(config: EngineConfig, max_model_len: int, steps: int, seed: int) -> list[Batch]:
    """Batches that visit every token bucket and row bucket with several contexts.

    steps: of each batch that only decodes.
    """
    rng = np.random.default_rng(seed)
    limits = config.scheduler
    sizes = sorted(
        {1, 4, *(size for size in (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256) if size <= limits.max_num_seqs)}
    )
    longest = max_model_len - steps - 1
    batches = []
    for context in (longest // 32, longest // 6, longest // 2):
        batches += [Batch([context] * size, [steps] * size) for size in sizes if size * context <= 40_000]
    most = limits.max_num_batched_tokens
    lengths = [size for size in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024) if size <= most]
    for length in (*lengths, longest // 2, longest):
        batches += [Batch([min(length, longest)], [2])] * 3
    # Prompts of mixed lengths and outputs, so that they join and leave while others decode.
    for _ in range(6):
        count = 3 * limits.max_num_seqs // 2
        prompts = rng.integers(8, max(9, longest // 4), count).tolist()
        batches.append(Batch(prompts, rng.integers(2, 2 * steps, count).tolist()))
    return batches


def drive(core: EngineCore, batches: Sequence[Batch], seed: int, name: str = "sweep") -> None:
    """Runs the batches one after another to their ends."""
    rng = np.random.default_rng(seed)
    for number, batch in enumerate(batches):
        for place, (prompt, output) in enumerate(zip(batch.prompts, batch.outputs, strict=True)):
            ids = tuple(rng.integers(FIRST_ORDINARY_ID, core.runner.info.vocab_size, prompt).tolist())
            core.handle(AddRequest(EngineRequest(f"{name}-{number}-{place}", ids, output, arrival_time=time.time())))
        while core.busy:
            core.step()


def measure(
    config: EngineConfig, runner: Runner, *, steps: int = 24, rounds: int = 1, seed: int = 0
) -> tuple[list[StepTime], HostCosts]:
    """Times of the steps of `rounds` sweeps after one that warms up, and the host's."""
    metered = MeteredRunner(runner)
    core = EngineCore(config, metered)
    batches = sweep(config, runner.info.max_model_len, steps, seed)
    drive(core, batches[:: max(1, len(batches) // 8)], seed, "warm-up")
    metered.shapes.clear()
    meter = StepMeter(core.recorder, metered)
    for turn in range(rounds):
        drive(core, batches, seed + turn, f"round-{turn}")
    return meter.steps(), meter.host()


def describe(info: RunnerInfo) -> str:
    """The model and its device in one line."""
    return f"{info.architecture}, {info.num_parameters / 1e6:.1f}M parameters in {info.dtype} on {info.platform}"


def main() -> int:
    """Writes the costs, prints what was fitted; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="FILE", help="where the costs go")
    parser.add_argument("--steps", type=int, default=24, help="decode steps of each batch (default 24)")
    parser.add_argument("--rounds", type=int, default=2, help="sweeps that are measured (default 2)")
    parser.add_argument("--seed", type=int, default=0)
    options, server, _ = gin_config.load_from_command_line(parser)
    runner = ModelRunner(server.engine)
    steps, host = measure(server.engine, runner, steps=options.steps, rounds=options.rounds, seed=options.seed)
    name = describe(runner.info)
    about = {"machine": report.machine(), "versions": report.versions(), "config": options.config}
    write_costs(options.output, steps, name=name, host=host, about=about)
    fitted = FittedCosts.fit(steps, name=name, host=host)
    print(report.describe())
    print(f"{len(steps)} steps of {name}; mean error of the fit {100 * fitted.error:.1f} % of the mean step")
    print(report.table(("token bucket", "ms"), [(size, 1e3 * each) for size, each in fitted.token_seconds]))
    print(report.table(("row bucket", "ms"), [(size, 1e3 * each) for size, each in fitted.row_seconds]))
    print(report.table(("per unit", "ns"), [(term, 1e9 * each) for term, each in fitted.rates.items()]))
    print(f"host: {1e3 * host.before:.3f} ms before a step, {1e3 * host.after:.3f} ms after")
    print(f"written: {options.output.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
