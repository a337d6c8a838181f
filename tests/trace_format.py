"""What Chrome's trace-event format asks of a file, written from its specification."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any

KINDS = {"M", "X", "C", "b", "e", "n"}


def check_trace(trace: dict[str, Any]) -> None:
    """Fails unless a viewer can place every event: types, slices that nest, pairs that match."""
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    assert trace["displayTimeUnit"] in ("ms", "ns")
    slices = defaultdict(list)
    open_: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    last: dict[tuple[str, str, int], float] = {}
    for event in trace["traceEvents"]:
        kind = event["ph"]
        assert kind in KINDS, kind
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if kind == "M":
            key = {"process_name": "name", "thread_name": "name", "process_sort_index": "sort_index"}[event["name"]]
            assert isinstance(event["args"][key], int if key == "sort_index" else str)
            continue
        assert math.isfinite(event["ts"])
        assert event["ts"] >= 0
        if kind == "X":
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif kind == "C":
            assert event["args"]
            assert all(isinstance(value, int | float) for value in event["args"].values())
        else:  # asynchronous: told apart by category, id and process
            key = event["cat"], event["id2"]["local"], event["pid"]
            assert event["ts"] >= last.get(key, 0.0)
            last[key] = event["ts"]
            if kind == "b":
                open_[key].append(event)
            elif kind == "e":
                assert open_[key].pop()["name"] == event["name"]
            else:
                assert open_[key], "a mark outside of its request"
    assert not any(open_.values())
    for track in slices.values():
        nest(sorted(track, key=lambda one: (one[0], -one[1])))


def nest(track: list[tuple[float, float]]) -> None:
    """Fails where two slices of a thread overlap in part. Times are rounded to a nanosecond."""
    around: list[float] = []
    for begin, end in track:
        while around and around[-1] <= begin + 0.002:
            around.pop()
        assert not around or end <= around[-1] + 0.01, (begin, end, around[-1])
        around.append(end)
