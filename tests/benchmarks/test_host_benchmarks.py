"""What the benchmarks of the host measure: the engines that they run are as full as they say."""

from __future__ import annotations

import itertools

import pytest

from benchmarks import host_overhead, host_step, idle_share
from benchmarks.host_overhead import Case, PackingRunner, make_core
from benchmarks.host_step import PARTS, HostMeter
from jaxserve.scheduler import Scheduler


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


def test_a_part_is_timed_without_what_it_calls_and_the_engine_is_left_as_it_was(monkeypatch):
    """A clock that goes on by a second whenever it is read: what lies between two reads is known."""
    before = Scheduler.__dict__["schedule"]
    core = make_core(5)
    with HostMeter() as meter:
        clock = itertools.count()
        monkeypatch.setattr(host_step.time, "perf_counter", lambda: float(next(clock)))
        spent, _ = meter.step(core)
        monkeypatch.undo()
    # Nothing to do: expire and schedule read it twice each, one right after the other.
    assert spent == {"schedule": 2.0, "pack": 0, "dispatch": 0, "collect": 0, "update": 0, "outputs": spent["outputs"]}
    assert spent["outputs"] == next(clock) - 1 - spent["schedule"]
    assert Scheduler.__dict__["schedule"] is before


def test_the_profile_names_what_a_step_calls():
    lines = host_overhead.profile(Case("mixed", (3, 30), (3, 9), 0), running=5, steps=20, lines=300)
    for function in ("(schedule)", "(pack)", "(update)", "'encode'"):
        assert any(function in line for line in lines), function


@pytest.mark.parametrize("busy", [True, False])
def test_idle_time_is_counted_where_the_device_is_done_before_it_gets_more(monkeypatch, busy):
    """A device that computes for ever is never idle; one that is done at once always is."""
    monkeypatch.setattr(PackingRunner, "done", lambda runner, pending: not busy)
    found = idle_share.measure("none", make_core(5), seconds=0.3)
    assert found["steps"] > 10
    assert found["steps_with_idle"] == (0 if busy else found["steps"])
    idle = found["share_of_wall"]["idle"]
    assert idle == 0 if busy else idle > 0.5
