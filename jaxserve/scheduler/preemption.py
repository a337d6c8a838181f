"""Selects victims of preemption, how they are preempted, and for which waiting sequences.

Victims are chosen among running sequences only, so a choice takes time proportional to their number, and only when one
is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

from jaxserve.config.scheduling import PreemptionConfig
from jaxserve.kv_cache.page_groups import PageGroups
from jaxserve.scheduler.keyed_queue import KeyedQueue, PriorityKey
from jaxserve.scheduler.policies.policy import Policy
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.scheduler.running import Running
from jaxserve.scheduler.sequence import Sequence


class Preemption:
    """Applies the rules of `PreemptionConfig`. costs: as measured; configured ones take precedence."""

    def __init__(self, config: PreemptionConfig, policy: Policy, groups: PageGroups, costs: PreemptionCosts | None):
        self._config = config
        self._priority_key = policy.priority_key
        self._groups = groups
        self._per_token = config.recompute_seconds_per_token
        self._per_page = config.swap_seconds_per_page
        if costs is not None:
            self._per_token = costs.recompute_seconds_per_token if self._per_token is None else self._per_token
            self._per_page = costs.swap_seconds_per_page if self._per_page is None else self._per_page
        rules: dict[str, Callable[[Sequence], float]] = {
            "policy": lambda sequence: 0.0,
            "lowest_priority": lambda sequence: -sequence.priority,
            "most_pages": self._pages_held,
            "least_progress": lambda sequence: -len(sequence.output_token_ids),
            "cheapest": lambda sequence: -self.cost(sequence.num_known),
        }
        self._rule = rules[config.victim]

    def victim(self, running: Iterable[Sequence]) -> Sequence:
        """Selects the running sequence to preempt when pages run out."""
        return max(running, key=self._order)

    def prefers_swap(self, num_computed: int) -> bool:
        """Tells whether a sequence of `num_computed` tokens is swapped rather than recomputed, if host memory has
        room."""
        if self._config.preemption_mode != "auto":
            return self._config.preemption_mode == "swap"
        if self._per_token is None or self._per_page is None:
            return False
        return self._per_page * self._groups.held(num_computed) < self._per_token * num_computed

    def cost(self, num_computed: int) -> float:
        """Returns the seconds to bring back a sequence of `num_computed` tokens; without known costs, `num_computed`
        itself."""
        if self._per_token is None:
            return float(num_computed)
        recompute = self._per_token * num_computed
        if self._per_page is None or self._config.preemption_mode == "recompute":
            return recompute
        return min(recompute, self._per_page * self._groups.held(num_computed))

    def boosted(self, sequence: Sequence) -> None:
        """Records a preemption, which raises the sequence's priority."""
        sequence.num_preemptions += 1
        sequence.boost = min(sequence.boost + self._config.preemption_boost, self._config.preemption_boost_limit)

    def running_to_preempt(
        self, running: Running, waiting: Sequence, short_of_pages: bool = False, spared: Container[str] = ()
    ) -> Sequence | None:
        """Selects the running sequence to preempt so that `waiting` can be admitted, or None.

        Checked in order: the priority gap, the length ratio (head-of-line), and the policy's order when only pages are
        short. Individual running sequences are examined only when one can qualify.

        Args:
            running: the running sequences.
            waiting: the sequence to admit.
            short_of_pages: a slot is free and only pages are missing.
            spared: ids of sequences that are not preempted.
        """
        if running and self._far_above(waiting, running.lowest_priority):
            lower = [one for one in self._may_lose(running, spared) if self._far_above(waiting, one.priority)]
            if lower:
                return max(lower, key=lambda one: (-one.priority, *self._priority_key(one)))
        if self._config.preempt_length_ratio is not None:
            longest = max(self._may_lose(running, spared), key=lambda one: one.expected_length, default=None)
            if longest is not None and self._far_shorter(waiting, longest):
                return longest
        if short_of_pages and self._config.preempt_for_pages:
            priority_key = self._priority_key(waiting)
            worse = [one for one in self._may_lose(running, spared) if self._priority_key(one) > priority_key]
            return max(worse, key=self._order, default=None)
        return None

    def urgency_queues(self) -> tuple[KeyedQueue, ...]:
        """Returns empty queues for waiting sequences; the best of each is the first for which `far_better` may hold."""
        queues: list[KeyedQueue] = []
        if self._config.preempt_priority_gap is not None:
            queues.append(KeyedQueue(lambda sequence: (-sequence.priority,)))
        if self._config.preempt_length_ratio is not None:
            queues.append(KeyedQueue(lambda sequence: (sequence.expected_length,)))
        return tuple(queues)

    def far_better(self, waiting: Sequence, other: Sequence) -> bool:
        """Tells whether a waiting sequence exceeds another by the priority gap, or is shorter by the length ratio."""
        return self._far_above(waiting, other.priority) or self._far_shorter(waiting, other)

    def preempts_for(self, lowest_priority: int, highest_priority: int) -> bool:
        """Tells whether, among requests of such priorities, a waiting one may ever preempt a running one."""
        gap = self._config.preempt_priority_gap
        return self._config.preempt_length_ratio is not None or (
            gap is not None and highest_priority - lowest_priority > gap
        )

    def _far_above(self, waiting: Sequence, priority: int) -> bool:
        gap = self._config.preempt_priority_gap
        return gap is not None and waiting.priority - priority > gap

    def _far_shorter(self, waiting: Sequence, other: Sequence) -> bool:
        ratio = self._config.preempt_length_ratio
        return ratio is not None and waiting.expected_length * ratio <= other.expected_length

    def _may_lose(self, running: Running, spared: Container[str]) -> list[Sequence]:
        most = self._config.max_preemptions
        return [one for one in running.sequences if one.num_preemptions < most and one.request_id not in spared]

    def _pages_held(self, sequence: Sequence) -> float:
        """Returns the pages of a sequence, or 0 once it was preempted max_preemptions times.

        Otherwise two large sequences could preempt each other forever, since the one with the most computed tokens
        would always be the victim.
        """
        return sequence.num_pages if sequence.num_preemptions < self._config.max_preemptions else 0

    def _order(self, sequence: Sequence) -> PriorityKey:
        return (self._rule(sequence), *self._priority_key(sequence))
