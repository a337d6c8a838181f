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
    """Orders sequences. Subclasses define `priority_key`; the other methods serve policies that count service or use
    the clock.

    counts_tokens: `decoded` must be called. timeless: the order of waiting sequences changes only with arrivals and
    departures. clocked: it also changes with time (`due`). matches_prefixes: it depends on the tokens that a waiting
    sequence would find in the prefix cache (`Sequence.num_found`).
    """

    counts_tokens = False
    timeless = True
    clocked = False
    matches_prefixes = False

    def __init__(self, config: PolicyConfig, step_times: StepTimeEstimator):
        self.config = config
        self.step_times = step_times

    def priority_key(self, sequence: Sequence) -> PriorityKey:
        """Returns the priority key, fixed while the sequence waits and recomputed for each comparison among running
        ones."""
        raise NotImplementedError

    def queue(self) -> Queue:
        """Returns an empty queue in the order of this policy."""
        return KeyedQueue(self.priority_key)

    def queued(self, sequence: Sequence) -> None:
        """Records that a new request waits."""

    def dequeued(self, sequence: Sequence) -> None:
        """Records that a request no longer waits: it is admitted, or has ended."""

    def admitted(self, sequence: Sequence) -> None:
        """Records that a request is admitted for the first time; it computes all but `num_computed` tokens of its
        prompt."""

    def decoded(self, tenants: np.ndarray, times: int = 1) -> None:
        """Records `times` output tokens of each row; tenants: int32 [R], as of `tenant_number`."""

    def ended(self, sequence: Sequence) -> None:
        """Records that a request's final output is sent."""

    def tenant_number(self, tenant: str) -> int:
        """Returns the number of a tenant for `decoded`; 0 when the policy does not distinguish tenants."""
        return 0

    def due(self, sequence: Sequence) -> float:
        """Returns the time after which a waiting sequence can no longer meet its targets, for clocked policies."""
        return math.inf

    def demote(self, sequence: Sequence) -> None:
        """Assigns a late sequence, which is in no queue now, another priority key."""
