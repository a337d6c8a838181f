"""StartupSpans of a start: what is measured, in which order it is told, and how."""

import json
import threading

import pytest

from jaxserve.telemetry.startup_spans import StartupSpans, phase_lines, phases_json


def test_phases_are_told_in_the_order_of_their_beginnings():
    phases = StartupSpans()
    inside, leave = threading.Event(), threading.Event()

    def beside() -> None:
        with phases.phase("beside"):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=beside)
    with phases.phase("outer"):
        thread.start()
        inside.wait()
        with phases.phase("inner"):
            pass
    leave.set()
    thread.join()
    phases.until_now("before all")
    found = {name: (begin, seconds) for name, begin, seconds in phases.all()}
    assert list(found) == ["before all", "outer", "beside", "inner"]
    assert found["before all"][0] == 0
    assert found["outer"][0] + found["outer"][1] <= found["beside"][0] + found["beside"][1]
    with phases.phase("after"):
        pass
    *before, (_, after, _) = phases.all()
    assert all(0 <= begin <= after for _, begin, _ in before)


def test_a_phase_that_fails_is_not_told():
    phases = StartupSpans()
    with pytest.raises(ZeroDivisionError), phases.phase("failing"):
        _ = 1 // 0
    assert phases.all() == ()


def test_phases_in_a_log():
    phases = (("imports", 0.0, 1.25), ("serve", 1.25, 0.004))
    assert phase_lines("start", phases) == [
        "start, seconds (begin, duration):",
        "  imports    0.00    1.25",
        "  serve      1.25    0.00",
    ]
    told = json.loads(phases_json(server=phases, engine=()))
    assert told["engine"] == []
    assert told["server"][1] == {"name": "serve", "begin": 1.25, "seconds": 0.004}
