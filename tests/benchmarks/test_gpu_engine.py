"""The benchmark of the whole engine on a GPU: its arithmetic, and what it leaves out."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from benchmarks import gpu_engine
from jaxserve.config import gin_config
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.simulator import HostCosts, SimulatedDevice, StepShape, StepTime


@dataclasses.dataclass(frozen=True)
class ByTokens:
    """A cost model: so many seconds for each token of the bucket."""

    per_token: float
    name: str = "by tokens"
    host: HostCosts = HostCosts()
    preemption: PreemptionCosts = PreemptionCosts(0.0, 0.0)

    def seconds(self, shape):
        return self.per_token * shape.token_bucket

    def stretch_seconds(self, shape, steps):
        raise AssertionError("steps are compared one by one")


def decode(bucket, rows, context, seconds):
    return StepTime((StepShape(bucket, bucket, rows, rows * context, 0, 0.0, 0.0, context),), seconds)


def prefill(bucket, tokens, seconds, rows=0):
    return StepTime((StepShape(bucket, 8, rows, rows * 64.0, tokens, tokens**2 / 2, 0.0, tokens),), seconds)


def test_steps_are_grouped_by_kind_bucket_and_context_and_compared_with_each_model():
    steps = [
        decode(8, 8, 100, 0.001),
        decode(8, 5, 140, 0.002),  # of about 128 positions too
        decode(8, 8, 150, 0.005),
        decode(8, 8, 200, 0.004),  # nearer to 256
        decode(16, 12, 128, 0.004),
        prefill(64, 60, 0.016),
        prefill(64, 40, 0.016, rows=3),
        StepTime((prefill(64, 64, 0.0).shapes[0],) * 2, 0.5),  # two steps that no one waited for between them
    ]
    rows = gpu_engine.by_bucket(steps, {"slow": ByTokens(0.001), "right": ByTokens(0.00025)})
    assert [(row["kind"], row["bucket"], row["context"], row["steps"]) for row in rows] == [
        ("decode", 8, 128, 3),
        ("decode", 8, 256, 1),
        ("decode", 16, 128, 1),
        ("mixed", 64, 0, 1),
        ("prefill", 64, 0, 1),
    ]
    assert [row["ms"] for row in rows] == pytest.approx([2.0, 4.0, 4.0, 16.0, 16.0])
    assert [row["slow"] for row in rows] == pytest.approx([4.0, 2.0, 4.0, 4.0, 4.0])
    assert [row["right"] for row in rows] == pytest.approx([1.0, 0.5, 1.0, 1.0, 1.0])
    assert gpu_engine.by_bucket([], {}) == []


def test_workloads_none_of_whose_requests_fits_are_left_out_with_the_reason(monkeypatch, capsys):
    bench = object.__new__(gpu_engine.Bench)
    bench.options = argparse.Namespace(requests=3)
    bench.config = gin_config.load("tiny.gin")[0].engine
    bench.device = SimulatedDevice(100, 256, "gpu")
    monkeypatch.setattr(gpu_engine.Bench, "fitted", lambda bench: ByTokens(1.0))
    monkeypatch.setattr(gpu_engine.Bench, "roofline", lambda bench: ByTokens(1.0))
    monkeypatch.setattr(gpu_engine, "replay", lambda *_, **__: pytest.fail("nothing is there to serve"))
    reason = "none of its requests fits: max_model_len 256"
    assert bench.check() == [{"workload": name, "left_out": reason} for name in gpu_engine.WORKLOADS]
    assert capsys.readouterr().out.splitlines()[0] == f"chat, Poisson: left out, {reason}"
