"""What the watchdog takes for a hung engine, and what not."""

from __future__ import annotations

import pytest

from jaxserve.engine.messages import Progress
from jaxserve.engine.watchdog import LARGEST_STEPS, SHORTEST_LIMIT, Watchdog


class Engine:
    """Answers as told: `alive` says whether at all, `in_turn` and `turns` what."""

    def __init__(self) -> None:
        self.alive, self.in_turn, self.largest = True, False, 0.0
        self.turns = self._beat = 0
        self._said = Progress(0, 0, False)

    def progress(self) -> Progress:
        if self.alive:
            self._beat += 1
            self._said = Progress(self._beat, self.turns, self.in_turn, self.largest)
        return self._said


def watch(watchdog: Watchdog, engine: Engine, begin: float, seconds: float) -> tuple[float, str | None]:
    """Looks for so many seconds; when a problem was found, and which."""
    now = begin
    while now <= begin + seconds:
        problem = watchdog.look(now, engine.progress())
        if problem is not None:
            return now, problem
        now += watchdog.interval
    return now, None


def test_an_idle_engine_is_healthy_for_ever():
    assert watch(Watchdog(5.0), Engine(), 0.0, 1000.0)[1] is None


def test_steps_that_end_are_healthy_however_many():
    engine, watchdog = Engine(), Watchdog(5.0)
    engine.in_turn = True
    now = 0.0
    for _ in range(100):
        engine.turns += 1
        now, problem = watch(watchdog, engine, now, 4.0)
        assert problem is None


def test_a_step_that_does_not_end():
    engine, watchdog = Engine(), Watchdog(5.0)
    now, _ = watch(watchdog, engine, 0.0, 100.0)
    engine.in_turn, engine.turns = True, 1
    found, problem = watch(watchdog, engine, now, 100.0)
    assert 5.0 < found - now <= 5.0 + 3 * watchdog.interval
    assert problem == f"a step has not ended for {5.625:.1f} s (step_timeout 5 s)"


def test_an_engine_that_is_stopped():
    engine, watchdog = Engine(), Watchdog(5.0)
    now, _ = watch(watchdog, engine, 0.0, 10.0)
    engine.alive = False
    found, problem = watch(watchdog, engine, now, 100.0)
    assert 5.0 <= found - now <= 5.0 + 3 * watchdog.interval
    assert problem is not None
    assert "has not answered for" in problem


def test_one_that_is_continued_in_time_is_healthy():
    engine, watchdog = Engine(), Watchdog(5.0)
    now = 0.0
    for _ in range(20):
        engine.alive = False
        now, problem = watch(watchdog, engine, now, 4.0)
        assert problem is None
        engine.alive = True
        now, problem = watch(watchdog, engine, now, 1.0)
        assert problem is None


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_stop_of_the_front_end_does_not_count(in_turn):
    """Also where the engine was stopped with it, as all processes of a container are."""
    engine, watchdog = Engine(), Watchdog(5.0)
    engine.in_turn = in_turn
    now, _ = watch(watchdog, engine, 0.0, 1.0)
    for _ in range(3):
        engine.alive = False
        assert watchdog.look(now + 10_000.0, engine.progress()) is None
        engine.alive = True
        engine.turns += 1
        now, problem = watch(watchdog, engine, now + 10_000.0 + watchdog.interval, 4.0)
        assert problem is None


def test_the_limit_that_is_not_configured():
    engine, watchdog = Engine(), Watchdog()
    watchdog.look(0.0, engine.progress())
    assert watchdog.limit == SHORTEST_LIMIT
    engine.largest = 7.0
    watchdog.look(1.0, engine.progress())
    assert watchdog.limit == LARGEST_STEPS * 7.0
    engine.in_turn = True
    found, problem = watch(watchdog, engine, 2.0, 1000.0)
    assert LARGEST_STEPS * 7.0 < found - 2.0 <= LARGEST_STEPS * 7.0 + 3
    assert problem is not None
    assert "(step_timeout 140 s)" in problem
