"""What steps consist of over time: of a simulation the same from its events and from its columns."""

import json

import pytest

from jaxserve.planning.step_cost_models import HostCosts
from jaxserve.simulator import simulation_plots as plots
from jaxserve.simulator.fleet import FleetConfig, simulate_fleet
from jaxserve.simulator.setup import Setup
from jaxserve.simulator.simulation import SimulationResult, simulate
from jaxserve.simulator.traces import make_trace
from jaxserve.telemetry.batch_timeline import SUMMED, BatchTimelineTracker
from jaxserve.telemetry.recorder import Recorder
from tests.simulator.helpers import SimpleCosts, make_config, make_device

HOST = HostCosts(0.001, 0.0, 0.001, 0.0)


def simulated(recorder: Recorder | None = None) -> SimulationResult:
    trace = make_trace("t", [0.0, 0.0, 0.5, 60.0], [10, 40, 20, 30], [30, 12, 20, 9])
    return simulate(make_config(), trace, SimpleCosts(step=0.1, host=HOST), make_device(), recorder=recorder)


def test_events_and_columns_give_the_same(tmp_path):
    recorder, tracker = Recorder(), BatchTimelineTracker()
    recorder.subscribe(tracker)
    result = simulated(recorder)
    assert plots.compositions(result, 64, tmp_path) == [tmp_path / "composition.png"]
    written = json.loads((tmp_path / "composition.json").read_text())
    found = tracker.to_dict()
    assert written["pages"] == found["pages"] == 64
    for name in SUMMED:
        if name not in ("seconds", "idle_seconds"):  # on the host's clock and on the device's
            assert written["points"][name] == found["points"][name], name


@pytest.mark.parametrize("preemption_mode", ["recompute", "swap"])
def test_preemptions_are_in_the_columns_too(tmp_path, preemption_mode):
    recorder, tracker = Recorder(), BatchTimelineTracker()
    recorder.subscribe(tracker)
    trace = make_trace("t", [0.0] * 6, 40, 60)
    config = make_config(preemption_mode=preemption_mode)
    device = make_device(num_pages=20, num_host_pages=20)
    result = simulate(config, trace, SimpleCosts(step=0.1), device, recorder=recorder)
    plots.compositions(result, 19, tmp_path)
    written = json.loads((tmp_path / "composition.json").read_text())["points"]
    found = tracker.to_dict()["points"]
    for name in ("swapped", "pages_swapped", "pages_cached", "preempted_recompute", "preempted_swap"):
        assert written[name] == found[name], name
    assert sum(written[f"preempted_{preemption_mode}"]) == result.preemptions.sum() > 0


def test_steps_take_the_host_until_the_next_begins():
    """Else a plot would show a pause after every step."""
    tracker = BatchTimelineTracker()
    recorder = Recorder()
    recorder.subscribe(tracker)
    simulated(recorder)
    points = tracker.to_dict()["points"]
    ends = [begin + seconds for begin, seconds in zip(points["begin"], points["seconds"], strict=True)]
    gaps = [begin - end for begin, end in zip(points["begin"][1:], ends, strict=False)]
    assert sum(gap > 0.01 for gap in gaps) == 1  # before the request at 60 s
    assert sum(points["seconds"]) == pytest.approx(points["begin"][-1] + points["seconds"][-1] - max(gaps), abs=0.5)


def test_every_replica_has_its_own(tmp_path):
    trace = make_trace("t", [0.0, 0.0, 0.5], [10, 40, 20], [3, 2, 2])
    setup = Setup(make_config(), make_device(), SimpleCosts())
    fleet = simulate_fleet(setup, trace, FleetConfig(replicas=2))
    plots.compositions(fleet.result, 64, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"composition_1.json", "composition_1.png", "composition_2.json", "composition_2.png"}
