"""Scheduler and pool as a state machine, for every mode, policy and formation."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import Phase, given
from hypothesis import strategies as st

from jaxserve.config.scheduling import FORMATIONS, MODES
from jaxserve.scheduler.policies.named import POLICIES
from tests.budgets import ALL, budget
from tests.scheduler.history import run_history

STEPS = 20_000 if ALL else 4_500
"""In each mode, at least."""

ENDS = ("aborted waiting", "aborted running", "expired", "refused", "ended stop", "ended length")
EVERYWHERE = (*ENDS, "chunked", "hit")
MEMORY = ("several chunks", "recomputed", "swapped out", "swapped in")
EVENTS = {
    "none": (),
    "static": (*MEMORY, "slept", "aborted ending"),
    "dynamic": (*MEMORY, "slept", "aborted ending"),
    "continuous": (*MEMORY, "mixed", "gap exceeded", "displaced", "aborted preempted", "aborted swapped"),
    "separated": (*MEMORY, "gap exceeded", "displaced", "aborted preempted", "aborted swapped"),
}
OFTEN = 10


@pytest.mark.parametrize("mode", MODES)
def test_histories(mode: str):
    """Every request ends once with the tokens that it has alone, pages are accounted for after every step, nobody is
    passed over for longer than policy and formation allow; and all kinds of events did happen."""
    formations = FORMATIONS if mode != "dynamic" else ("greedy",)
    cases = [(policy, formation) for policy in POLICIES for formation in formations]
    examples = 4 if mode != "dynamic" else 16
    steps = 4 * STEPS // (5 * len(cases) * examples)  # and those that each history takes to end
    events: Counter[str] = Counter()

    def histories(policy: str, formation: str) -> None:
        @budget(examples, phases=[Phase.generate])  # a smaller seed is not a simpler history
        @given(st.integers(0, 2**32))
        def run(seed: int) -> None:
            events.update(run_history(seed, mode, formation, policy, steps))

        run()

    for policy, formation in cases:
        histories(policy, formation)
    assert events["steps"] >= STEPS
    departs = () if mode == "dynamic" else ("passed over",)
    for kind in (*EVERYWHERE, *EVENTS[mode], *departs):
        assert events[kind] >= OFTEN, f"{kind}: {events}"
