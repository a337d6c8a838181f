"""Scheduling policies. A policy maps a sequence to a priority key; lower keys are scheduled first and preempted last.

A key that improves with waiting does so by the same amount for every sequence, so it is written without the clock:
    score of now = value + ageing * (now - arrival)    orders as    value - ageing * arrival
and a queue never has to be sorted again.

A new policy is a class, its line in `named.POLICIES` and its name in `config.scheduling.POLICIES`, which settings are
checked against.
"""

from __future__ import annotations

import math

import numpy as np

from jaxserve.config.scheduling import PolicyConfig
from jaxserve.scheduler.keyed_queue import KeyedQueue, PriorityKey, Queue
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.step_time_estimator import StepTimeEstimator


class Policy:
    """A subclass gives `priority_key`; the rest is for policies that count service or look at the clock.

    counts_tokens: `decoded` is to be called. timeless: the order of those that wait changes with arrivals and
    departures alone. clocked: it also changes with time (`due`).
    """

    counts_tokens = False
    timeless = True
    clocked = False

    def __init__(self, config: PolicyConfig, step_times: StepTimeEstimator):
        self.config = config
        self.step_times = step_times

    def priority_key(self, sequence: Sequence) -> PriorityKey:
        """Fixed while the sequence waits, and compared anew each time among running ones."""
        raise NotImplementedError

    def queue(self) -> Queue:
        """An empty queue in the order of this policy."""
        return KeyedQueue(self.priority_key)

    def queued(self, sequence: Sequence) -> None:
        """A new request waits."""

    def dequeued(self, sequence: Sequence) -> None:
        """It waits no more: it is admitted, or has ended."""

    def admitted(self, sequence: Sequence) -> None:
        """A request is served for the first time."""

    def decoded(self, tenants: np.ndarray, times: int = 1) -> None:
        """So many output tokens of each row: int32 [R], numbers of their tenants as of `tenant_number`."""

    def ended(self, sequence: Sequence) -> None:
        """A request has its final answer."""

    def tenant_number(self, tenant: str) -> int:
        """What stands for a tenant in `decoded`; 0 where the policy does not care."""
        return 0

    def due(self, sequence: Sequence) -> float:
        """The moment after which a waiting sequence can no longer meet its targets, for clocked policies."""
        return math.inf

    def demote(self, sequence: Sequence) -> None:
        """Gives a late sequence, which is in no queue now, another priority key."""
