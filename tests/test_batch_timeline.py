"""The composition tracker: sums, joined points, what the engine writes."""

import contextlib
import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.settings import EngineConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.engine.messages import AddRequest, EngineOutput
from jaxserve.request import EngineRequest
from jaxserve.runner.fake import FakeRunner
from jaxserve.telemetry.batch_timeline import SUMMED, BatchTimelineFile, BatchTimelineTracker, of_steps
from jaxserve.telemetry.recorder import Recorder, RequestPreempted, StepRecorded


def step(time: float, rows: int = 1, seconds: float = 1.0, **fields) -> StepRecorded:
    names = (field.name for field in dataclasses.fields(StepRecorded))
    values = dict.fromkeys(names, 0) | {"time": time, "rows": rows, "collect_seconds": seconds, "pages_free": 10}
    return StepRecorded(**(values | fields))  # pyright: ignore[reportArgumentType]


def test_one_point_a_step():
    tracker = BatchTimelineTracker()
    tracker(step(5.0, rows=3, prefill_tokens=7, padding=1, pages_used=4, pages_free=6))
    tracker(RequestPreempted(6.0, "a", kind="swap"))
    tracker(RequestPreempted(6.0, "b", kind="swap"))
    tracker(step(6.5, rows=2, decode_tokens=2, swapped=2))
    found = tracker.to_dict()
    points = found["points"]
    assert found["pages"] == 10
    assert (points["begin"], points["seconds"]) == ([0.0, 1.5], [1.0, 1.0])
    assert (points["rows"], points["prefill_tokens"], points["decode_tokens"]) == ([3, 2], [7, 0], [0, 2])
    assert (points["preempted_swap"], points["preempted_recompute"], points["swapped"]) == ([0, 2], [0, 0], [0, 2])


def test_many_equal_steps_at_once_equal_one_by_one():
    one, all_at_once = BatchTimelineTracker(max_points=4), BatchTimelineTracker(max_points=4)
    for number in range(16):
        one.add(step(float(number), rows=5, decode_tokens=5))
    all_at_once.add(step(0.0, rows=5, decode_tokens=5), count=16, seconds=16.0)
    for name in SUMMED:
        assert sum(one.to_dict()["points"][name]) == sum(all_at_once.to_dict()["points"][name])


@given(st.lists(st.integers(0, 9), max_size=70), st.integers(2, 9))
def test_points_are_bounded_and_lose_nothing(rows: list[int], max_points: int):
    tracker = BatchTimelineTracker(max_points)
    for number, count in enumerate(rows):
        tracker.add(step(float(number), rows=count, waiting=count * 2))
    points = tracker.to_dict()["points"]
    assert len(points["begin"]) <= max_points
    assert {len(values) for values in points.values()} == {len(points["begin"])}
    assert sum(points["steps"]) == len(rows)
    assert (sum(points["rows"]), sum(points["waiting"])) == (sum(rows), 2 * sum(rows))
    assert points["begin"] == sorted(points["begin"])
    first = 0
    for point, (steps, total) in enumerate(zip(points["steps"], points["rows"], strict=True)):
        assert total == sum(rows[first : first + steps])
        assert points["begin"][point] == first == sum(points["seconds"][:point])  # every step takes a second
        first += steps


@given(st.lists(st.integers(0, 9), max_size=70), st.integers(1, 9))
def test_columns_are_joined_without_loss(rows: list[int], max_points: int):
    begin, values = np.arange(len(rows)) + 5.0, np.array(rows, np.float64)
    found = of_steps(10, begin, np.ones(len(rows)), {"rows": values}, max_points)["points"]
    assert len(found["begin"]) <= max_points
    assert {len(column) for column in found.values()} == {len(found["begin"])}
    assert (sum(found["rows"]), sum(found["steps"]), sum(found["waiting"])) == (sum(rows), len(rows), 0)
    assert found["begin"] == [sum(found["steps"][:point]) for point in range(len(found["begin"]))]


@pytest.mark.parametrize("max_points", [0, 1])
def test_one_point_cannot_be_joined(max_points: int):
    with pytest.raises(ValueError, match=f"max_points is {max_points}; it must be at least 2"):
        BatchTimelineTracker(max_points)


def engine(directory: pathlib.Path | None) -> InlineEngine:
    config = EngineConfig.from_options(
        model="unused", max_num_seqs=8, max_num_batched_tokens=64, composition_dir=directory and str(directory)
    )
    return InlineEngine(config, FakeRunner(num_pages=64, page_size=4))


def run(client: InlineEngine, count: int) -> None:
    for number in range(count):
        client.send(AddRequest(EngineRequest(f"r{number}", (1, 2, 3), max_tokens=5 + number)))
    ended = 0
    while ended < count:
        ended += sum(
            isinstance(message, EngineOutput) and message.finish_reason is not None for message in client.receive()
        )
    client.close()


def test_an_engine_writes_its_composition(tmp_path):
    run(engine(tmp_path / "new" / "place"), count=12)
    found = json.loads((tmp_path / "new" / "place" / "composition.json").read_text())
    assert sum(found["points"]["prefill_tokens"]) == 36
    assert sum(found["points"]["decode_tokens"]) == sum(4 + number for number in range(12))
    assert max(found["points"]["waiting"]) == 4
    assert (tmp_path / "new" / "place" / "composition.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_directory_nobody_listens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorder = Recorder()
    BatchTimelineFile(recorder, None).close()
    run(engine(None), count=2)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made_stops_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        engine(tmp_path / "file" / "below")


def test_without_matplotlib_the_figures_are_written_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    recorder = Recorder()
    with contextlib.closing(BatchTimelineFile(recorder, tmp_path)):
        recorder.record(step(1.0))
    assert [path.name for path in tmp_path.iterdir()] == ["composition.json"]
    assert "pip install 'jaxserve[plot]'" in caplog.text


def test_a_run_without_steps_has_no_plot(tmp_path):
    BatchTimelineFile(Recorder(), tmp_path).close()
    assert json.loads((tmp_path / "composition.json").read_text())["points"]["begin"] == []
    assert not (tmp_path / "composition.png").exists()
