"""Defines the interface between the engine and its runner. Imports no jax, so that an engine over a fake runner needs
no device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from jaxserve.config.logprobs_config import MAX_LOGPROBS
from jaxserve.kv_cache.page_copy import PageCopy
from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.scheduler.step_shape import StepShape
from jaxserve.telemetry.startup_spans import StartupSpan

Pending = Any
"""The handle of a step in flight: `dispatch_forward` returns it and `collect` takes it."""


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """Predicts the seconds that steps take on a runner's device: `seconds` of a plan's shape, and `largest_seconds` of
    a step that no plan exceeds."""

    seconds: Callable[[StepShape], float]
    largest_seconds: float


@dataclasses.dataclass(frozen=True)
class RunnerInfo:
    """Describes a started runner in plain values, which the engine passes on to the front end.

    num_pages: pages of the pool, the null page included. attention: the attention implementation in use.
    num_executables: programs of the closed set; num_missing_executables of them join while the engine serves.
    compile_seconds: wall time of compiling, or loading, them. kv_cache: dtype of keys and values in pages, and the
    source of the scales if it is quantized.
    bundle: the directory that the programs were loaded from; None where they were compiled. num_cached_executables:
    those that were taken from the compilation cache.
    phases: name, begin and seconds of each part of the start, where the process began at 0; some run side by side.
    memory: bytes of the device by purpose; they sum to all of its memory. num_host_pages: pages of host
    memory for swapped sequences. preemption_costs: measured at warm-up; None when swapping is impossible.
    page_bytes: of a page of all layers of a group, on all devices. pages_in_transit: most pages that are on their way
    between device and host memory before the host waits; None for any number.
    tokens_per_step: maximum tokens of a decoding row in one step (`DecodeRows.counts`).
    max_logprobs: likeliest ids of one position that a request may ask for. logprobs_mode: as in `LogprobsConfig`.
    hidden_size: numbers of a hidden state, which pooling returns. group_windows: for each group of layers, which has a
    page table of its own, the positions that its layers attend to; None for all.
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
    max_logprobs: int = MAX_LOGPROBS
    logprobs_mode: str = "raw_logprobs"
    hidden_size: int = 0
    group_windows: tuple[int | None, ...] = (None,)
    page_bytes: int = 0
    pages_in_transit: int | None = None

    @property
    def usable_pages(self) -> int:
        """Returns the number of pages that requests can have: all but the null page."""
        return self.num_pages - 1


@dataclasses.dataclass(frozen=True)
class PageCopies:
    """Counts copies one way between device and host memory since the start. seconds: from when the device could begin
    with them to when they were there, added up step by step."""

    pages: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class DiskEvent:
    """Tells of a page in the directory of the cache: the read of this number has ended, having `found` it or not; or,
    without a number, it is not there any more."""

    key: bytes
    number: int | None = None
    found: bool = False


@dataclasses.dataclass(frozen=True)
class DiskCounts:
    """Counts pages of the directory of the cache: those there and their bytes; and since the start those written, read,
    refused since they were not what they should be, and dropped since they could not be written, or not soon enough."""

    pages: int = 0
    num_bytes: int = 0
    written: int = 0
    read: int = 0
    refused: int = 0
    dropped: int = 0


class DiskTier(Protocol):
    """Keeps pages in a directory. Copies to and from there are those of plans; the others are calls from the engine's
    loop, which wait for nothing."""

    @property
    def keys(self) -> tuple[bytes, ...]:
        """Returns the content keys of the pages that were there at the start, least recently used first."""
        ...

    @property
    def page_seconds(self) -> float:
        """Returns the seconds that reading a page takes, as measured lately."""
        ...

    def counts(self) -> DiskCounts: ...

    def events(self) -> list[DiskEvent]:
        """Returns what has happened since the last call, in order."""
        ...

    def accept(self, number: int, host_page: int | None) -> None:
        """Makes what the read of this number has found a host page; None discards it."""
        ...

    def forget(self) -> None:
        """Deletes all pages."""
        ...


class StepNotStartedError(RuntimeError):
    """Signals that a step was not started: packing failed, a program is missing, or memory was refused.

    The device's state is unchanged, so the step, or a part of it, may be retried.

    copied: the plan's page copies were made and must not be made again.
    """

    def __init__(self, message: str, *, copied: bool = False):
        super().__init__(message)
        self.copied = copied


class Runner(Protocol):
    """Executes steps in the order of dispatch, each in two halves: forward, then sample."""

    @property
    def info(self) -> RunnerInfo: ...

    @property
    def step_costs(self) -> StepCosts | None:
        """Predicts the seconds of a step; returns None when nothing is known about the device."""
        ...

    @property
    def num_compilations(self) -> int:
        """Counts the programs that the backend has compiled so far in this process, for any caller."""
        ...

    @property
    def compile_misses(self) -> int:
        """Counts the steps that asked for a program outside the compiled set."""
        ...

    @property
    def num_executables(self) -> int:
        """Counts the programs that are available now."""
        ...

    @property
    def pack_seconds(self) -> float:
        """Returns the host's time for packing the step whose forward program was dispatched last; 0 where it is not
        measured."""
        ...

    @property
    def disk(self) -> DiskTier | None:
        """Returns the directory of the cache; None where there is none."""
        ...

    def close(self, copies: Sequence[PageCopy] = ()) -> None:
        """Makes the last copies, as far as there is time, and ends threads; nothing may be called afterwards."""
        ...

    def page_copies(self) -> dict[str, PageCopies]:
        """Returns the copies to host memory ("out") and from there ("in") so far."""
        ...

    def shared_reads(self) -> dict[str, int]:
        """Returns how often rows that share pages read them together, or not, where that is decided by cost and counted
        (`attend_plan.shared_read_counts`); else nothing."""
        ...

    def fitted(self, plan: StepPlan) -> StepPlan:
        """Returns the plan with the buckets it will be padded to: larger ones replace those whose programs are not
        available yet."""
        ...

    def dispatch_forward(self, plan: StepPlan) -> Pending:
        """Starts a step's page copies, page-table writes, forward program and the scoring of prompt tokens, and returns
        without waiting for them.

        Rows may refer to ids of steps not collected yet.

        Raises:
            StepNotStartedError: the step may be retried.

        After any other error, here, in `dispatch_sample` or in `collect`, pages and slots are lost and `reset` must
        come before the next step.
        """
        ...

    def dispatch_sample(self, plan: StepPlan, masks: np.ndarray | None = None) -> None:
        """Starts sampling of the step whose forward program was dispatched last, and returns without waiting for it.

        It must be called before the next step and before this one is collected, even if the step samples nothing.

        Args:
            plan: the plan that `dispatch_forward` was given.
            masks: uint32 [M, ceil(vocab_size / 32)], one for each of `plan.samples.masked`: bit v % 32 of word v // 32
                allows token v. None when no sample wants one.

        Raises:
            StepNotStartedError: the step may be retried, from its forward program on.
            ValueError: masks has another shape.
        """
        ...

    def done(self, pending: Pending) -> bool:
        """Tells whether the device has finished a step; never waits. A step whose results were donated to the next is
        done."""
        ...

    def collect(self, pending: Pending) -> StepResult:
        """Waits for a step and returns its sampled ids, and the log-probabilities that it wants; this is the only place
        where the host waits for the device."""
        ...

    def reset(self) -> None:
        """Recreates the device's pages and slots, empty, after a step has failed; pages in host memory stay.

        Steps that were dispatched before must not be collected any more.
        """
        ...
