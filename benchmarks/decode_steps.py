"""Times the decode steps of 64 rows, each with sampling parameters of its own."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxserve.config.settings import EngineConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.frontend.frontend import FrontEnd
from jaxserve.frontend.tokenizer import load_tokenizer
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.sampling_params import SamplingParams
from jaxserve.telemetry.recorder import StepRecorded

ROWS = 64
PROGRAMS: dict[str, Any] = {
    "max_num_seqs": ROWS,
    "max_num_batched_tokens": 2 * ROWS,
    "token_buckets": (ROWS, 2 * ROWS),
    "row_buckets": (ROWS,),
}
"""Few programs: compiling takes longer than the measurements."""


class LockWatch:
    """Wakes up in a thread as often as it can, and keeps how long it had to wait beyond that."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> LockWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._ends.is_set():
            time.sleep(0.0005)
            now = time.perf_counter()
            self.gaps.append(now - last - 0.0005)
            last = now


@dataclasses.dataclass
class Round:
    """What the steps of one round took, in seconds."""

    steps: list[float]
    masks: list[float]
    gaps: list[float]


class Stepper:
    """Decodes 64 rows at once."""

    def __init__(self, config: EngineConfig):
        self.runner = ModelRunner(config, progress=True)
        self._engine = InlineEngine(config, self.runner)
        self._front_end = FrontEnd(self._engine, load_tokenizer(config), seed=0)
        self._steps: list[StepRecorded] = []
        self._engine.core.recorder.subscribe(self._keep)

    def _keep(self, event: Any) -> None:
        if type(event) is StepRecorded:
            self._steps.append(event)

    def round(
        self, rows: Sequence[SamplingParams], steps: int, before_step: Callable[[int], None] | None = None
    ) -> Round:
        """Runs requests with these parameters to their first tokens, then `steps` steps of all, and aborts them.

        before_step: is called with the number of each step, from 0.
        """
        names = [self._front_end.submit([3 + number] * 4, params) for number, params in enumerate(rows)]
        while self._engine.core.scheduler.num_running < ROWS or len(self._steps) < 8:
            self._turn()
        for _ in range(4):
            self._turn()
        self._steps.clear()
        before = _mask_sum(self._engine)
        gc.collect()
        times = []
        with LockWatch() as watch:
            for number in range(steps):
                if before_step is not None:
                    before_step(number)
                begin = time.perf_counter()
                self._turn()
                times.append(time.perf_counter() - begin)
        masks = (_mask_sum(self._engine) - before) / steps
        for name in names:
            self._front_end.abort(name)
        while self._engine.core.busy:
            self._turn()
        self._steps.clear()
        return Round(times, [masks], watch.gaps)

    def _turn(self) -> None:
        for message in self._engine.receive():
            self._front_end.handle(message)


def _mask_sum(engine: InlineEngine) -> float:
    return engine.core.stats().step_histograms["mask_seconds"].total
