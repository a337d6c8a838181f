"""Implements the batching modes: which work a step may hold, whether waiting requests may join, and what padding it
computes.

none         one request at a time
static       a batch of requests from first token to last; nothing joins until the longest ends
dynamic      as static, of prompts of about one length
continuous   in every step finished requests leave and waiting ones join
separated    as continuous, but a step either computes prompts or decodes

Static and dynamic batches are those of engines without iteration-level scheduling: prompts are padded to the longest,
finished rows are computed until the longest ends, and only then are the final outputs released. The padding consists of
tokens of the step's bucket, which cost as much as real tokens in everything but attention.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.scheduler.admission_order import FORMATIONS, AdmissionOrder, LengthBuckets
from jaxserve.scheduler.policies.policy import Policy
from jaxserve.scheduler.step_in_progress import StepInProgress
from jaxserve.scheduler.waiting import Waiting


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts running sequences by phase.

    decoding: those that decode. prefilling: those whose prompts are in progress. preempted: those swapped out or
    preempted, which have run and will run again.
    """

    decoding: int
    prefilling: int
    preempted: int

    @property
    def idle(self) -> bool:
        return not (self.decoding or self.prefilling or self.preempted)


@dataclasses.dataclass(frozen=True)
class StepLimits:
    """Limits what a step may hold.

    decode, prefill: whether it may hold rows of that kind. admit: maximum number of new requests. prompts: maximum
    number of prompts in progress, returning ones included. chunk: maximum tokens of one prompt; None follows the
    settings.
    """

    decode: bool = True
    prefill: bool = True
    admit: float = math.inf
    prompts: float = math.inf
    chunk: int | None = None


class Mode:
    """Implements continuous batching; subclasses implement the other modes.

    holds: final outputs wait for the end of the batch. closed: no request joins while another runs. steady: a
    decode-only step is followed by another while no request joins or ends.
    """

    holds = False
    closed = False
    steady = True

    def __init__(self, config: SchedulerConfig, policy: Policy):
        self.config = config
        self.formation = self.make_formation(policy)

    def make_formation(self, policy: Policy) -> AdmissionOrder:
        return FORMATIONS[self.config.formation](policy, self.config)

    @property
    def max_running(self) -> float:
        """Limits the number of running sequences, beside max_num_seqs."""
        return math.inf

    def step_limits(self, running: Counts, waiting: Waiting, now: float) -> StepLimits:
        return StepLimits()

    def wake_at(self, waiting: Waiting) -> float | None:
        """Returns the time at which a request may join that may not join now, while nothing runs; None means that an
        event will trigger it."""
        return None

    def admitted(self, count: int) -> None:
        """Records that `count` new requests joined the step."""

    def padded(self, step: StepInProgress) -> tuple[int, int]:
        """Returns the minimum numbers of tokens and rows that a step computes."""
        return 0, 0


class OneAtATime(Mode):
    closed = True

    def step_limits(self, running: Counts, waiting: Waiting, now: float) -> StepLimits:
        return StepLimits(admit=1 if running.idle else 0)


class Separated(Mode):
    """Runs either prefill or decode in a step. A phase that has nothing to do, or finds no room, leaves the step to the
    other."""

    steady = False

    def __init__(self, config: SchedulerConfig, policy: Policy):
        super().__init__(config, policy)
        self._decoded_last = False

    @property
    def max_running(self) -> float:
        return self.config.batching.max_decode_seqs

    def step_limits(self, running: Counts, waiting: Waiting, now: float) -> StepLimits:
        prompts = bool(running.prefilling or running.preempted or len(waiting))
        order = self.config.batching.phase_order
        prefill = prompts and (
            not running.decoding
            or order == "prefill_first"
            or (order == "alternating" and self._decoded_last)  # decode_first: only when no sequence decodes
        )
        self._decoded_last = not prefill
        return StepLimits(decode=not prefill, prefill=prefill, prompts=self.config.batching.max_prefill_seqs)


class Static(Mode):
    """Runs one batch at a time: its prompts are computed together, then its rows decode together until the longest
    ends."""

    holds = True
    closed = True

    def __init__(self, config: SchedulerConfig, policy: Policy):
        super().__init__(config, policy)
        self._size = 0  # of the batch that runs

    def step_limits(self, running: Counts, waiting: Waiting, now: float) -> StepLimits:
        if running.idle:
            self._size = self._next_size(waiting, now)
            chunk = max(1, self.config.max_num_batched_tokens // max(self._size, 1))
            return StepLimits(decode=False, admit=self._size, chunk=chunk)
        # Rows whose last tokens were lost with the device's pages come back when their batch seemed to have ended.
        self._size = max(self._size, running.decoding + running.prefilling + running.preempted)
        prompts = running.prefilling or running.preempted
        chunk = max(1, self.config.max_num_batched_tokens // self._size)
        return StepLimits(decode=not prompts, prefill=bool(prompts), admit=0, chunk=chunk)

    def wake_at(self, waiting: Waiting) -> float | None:
        oldest = waiting.oldest()
        return None if oldest is None else oldest + self.config.batching.max_wait_seconds

    def padded(self, step: StepInProgress) -> tuple[int, int]:
        if not step.chunks:
            return self._size, self._size
        longest = max(chunk.count for chunk in step.chunks.values())
        return min(longest * self._size, self.config.max_num_batched_tokens), 0

    def admitted(self, count: int) -> None:
        self._size = count  # memory may have been short for some

    def _next_size(self, waiting: Waiting, now: float) -> int:
        limit = min(self.config.batching.batch_size, self.config.max_num_seqs)
        ready_at = self.wake_at(waiting)
        ready = len(waiting) >= limit or (ready_at is not None and now >= ready_at)
        return min(limit, len(waiting)) if ready else 0


class Dynamic(Static):
    def make_formation(self, policy: Policy) -> AdmissionOrder:
        self._buckets = LengthBuckets(policy, self.config)
        return self._buckets

    def wake_at(self, waiting: Waiting) -> float | None:
        return self._buckets.ready_at()

    def _next_size(self, waiting: Waiting, now: float) -> int:
        return self._buckets.ready_size(now)


MODES: dict[str, Callable[[SchedulerConfig, Policy], Mode]] = {
    "none": OneAtATime,
    "static": Static,
    "dynamic": Dynamic,
    "continuous": Mode,
    "separated": Separated,
}
