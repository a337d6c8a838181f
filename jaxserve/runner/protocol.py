"""What the engine asks of a runner. Imports no jax, so that an engine over a fake runner needs no device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.telemetry.startup_spans import StartupSpan

Pending = Any
"""What `dispatch_forward` returns and `collect` takes: a step under way."""


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """Seconds that steps are predicted to take on a runner's device: `seconds` of a plan, and `largest_seconds` of a
    step that no plan exceeds."""

    seconds: Callable[[StepPlan], float]
    largest_seconds: float


@dataclasses.dataclass(frozen=True)
class RunnerInfo:
    """What a runner turned out to be: plain values, which the engine passes on to the front end.

    num_pages: of the pool, the null page included. attention: the implementation in use. num_executables: programs of
    the closed set; num_missing_executables of them join while it serves. compile_seconds: wall time of compiling, or
    loading, them. kv_cache: dtype of keys and values in pages, and where the scales of a quantised one are from.
    bundle: the directory that the programs were loaded from; None where they were compiled. num_cached_executables:
    those that were taken from the compilation cache.
    phases: name, begin and seconds of each part of the start, where the process began at 0; some run side by side.
    memory: bytes of the device, by what they are planned for; the sum is all of them. num_host_pages: pages of host
    memory for swapped sequences. preemption_costs: measured at warm-up; None where nothing can be swapped.
    tokens_per_step: that a row which decodes may have in a step (`DecodeRows.counts`).
    """

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    page_size: int
    num_pages: int
    num_parameters: int
    architecture: str
    dtype: str
    platform: str
    attention: str
    num_executables: int
    compile_seconds: float
    kv_cache: str
    bundle: str | None = None
    num_cached_executables: int = 0
    num_missing_executables: int = 0
    phases: tuple[StartupSpan, ...] = ()
    memory: tuple[tuple[str, int], ...] = ()
    num_host_pages: int = 0
    preemption_costs: PreemptionCosts | None = None
    tokens_per_step: int = 1

    @property
    def usable_pages(self) -> int:
        """Pages that requests can have: all but the null page."""
        return self.num_pages - 1


class StepNotStartedError(RuntimeError):
    """A step was not started: packing failed, a program is missing, memory was refused. The device holds what it held
    before, so the step, or a part of it, may be tried again.

    copied: the plan's copies of pages were made, and must not be made again.
    """

    def __init__(self, message: str, *, copied: bool = False):
        super().__init__(message)
        self.copied = copied


class Runner(Protocol):
    """Carries out steps in the order of dispatch, each in two halves: forward, then sample."""

    @property
    def info(self) -> RunnerInfo: ...

    @property
    def step_costs(self) -> StepCosts | None:
        """Predicts the seconds of a step; None where nothing is known of the device."""
        ...

    @property
    def num_compilations(self) -> int:
        """Programs that the backend has compiled so far, whoever asked for them."""
        ...

    @property
    def compile_misses(self) -> int:
        """Steps that asked for a program outside the compiled set."""
        ...

    @property
    def num_executables(self) -> int:
        """Programs that are there now."""
        ...

    def fitted(self, plan: StepPlan) -> StepPlan:
        """The plan with the buckets that it will be padded to: larger ones stand in for programs that are not there
        yet."""
        ...

    def dispatch_forward(self, plan: StepPlan) -> Pending:
        """Starts a step's copies of pages, its writes to page tables and its forward program, and returns without
        waiting for them. Rows may refer to ids of steps not collected yet.

        Raises StepNotStartedError where the step may be tried again. After any other error, here, in `dispatch_sample`
        or in `collect`, pages and slots are lost and `reset` must come before the next step.
        """
        ...

    def dispatch_sample(self, plan: StepPlan, masks: np.ndarray | None = None) -> None:
        """Starts to sample the step whose forward program was dispatched last, and returns without waiting for it. It
        must come before the next step and before this one is collected, also where the step samples nothing.

        masks: uint32 [M, ceil(vocab_size / 32)], one for each of `plan.samples.masked`: bit v % 32 of word v // 32
            allows token v. None where no sample wants one.

        Raises StepNotStartedError where the step may be tried again, from its forward program on; ValueError for masks
        of another shape.
        """
        ...

    def done(self, pending: Pending) -> bool:
        """Whether the device has finished a step; never waits. A step whose results have gone to the next is done."""
        ...

    def collect(self, pending: Pending) -> StepResult:
        """Waits for a step and returns its sampled ids: the one place where the host waits for the device."""
        ...

    def reset(self) -> None:
        """Makes pages and slots of the device anew, empty, after a step has failed; pages in host memory stay.

        Steps that were dispatched before must not be collected any more.
        """
        ...
