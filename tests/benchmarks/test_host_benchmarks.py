"""What the benchmarks of the host measure: the engines that they run are as full as they say."""

from __future__ import annotations

import pytest

from benchmarks import host_overhead, idle_share
from benchmarks.host_overhead import PARTS, Case, PackingRunner, make_core


@pytest.mark.parametrize(
    ("case", "ends"),
    [
        (Case("steady", (3, 4), (3000, 3001), 0), False),
        (Case("mixed", (3, 30), (3, 9), 0), True),
        (Case("queue", (3, 30), (3, 9), 50), True),
    ],
)
def test_the_engine_stays_full_and_the_parts_add_up(case, ends):
    found = host_overhead.measure(case, running=5, steps=40)
    assert (found["ended_per_step"] > 0) == ends
    assert abs(found["waiting"] - case.queue) <= 5
    spent = found["microseconds"]
    assert all(spent[part]["mean"] > 0 for part in PARTS)
    assert spent["all"]["mean"] == pytest.approx(sum(spent[part]["mean"] for part in PARTS))


def test_the_profile_names_what_a_step_calls():
    lines = host_overhead.profile(Case("mixed", (3, 30), (3, 9), 0), running=5, steps=20, lines=60)
    for function in ("schedule", "pack", "update", "packb"):
        assert any(f"({function})" in line for line in lines), function


@pytest.mark.parametrize("busy", [True, False])
def test_idle_time_is_counted_where_the_device_is_done_before_it_gets_more(monkeypatch, busy):
    """A device that computes for ever is never idle; one that is done at once always is."""
    monkeypatch.setattr(PackingRunner, "done", lambda runner, pending: not busy)
    found = idle_share.measure("none", make_core(5), seconds=0.3)
    assert found["steps"] > 10
    assert found["steps_with_idle"] == (0 if busy else found["steps"])
    idle = found["share_of_wall"]["idle"]
    assert idle == 0 if busy else idle > 0.5
