"""The default model's training: legs that resume, the export, and the schedule."""

import json

import numpy as np
import pytest

from jaxserve.models.config import ModelConfig
from jaxserve.models.loading.checkpoint import load
from jaxserve.models.params import make_mesh, params_of
from jaxserve.models.tiny import export, train
from jaxserve.models.tiny.tasks import KINDS
from jaxserve.models.tiny.training_step import CONFIG, initial_params


def leg(out, *more: str) -> None:
    train.train(train.parse(["--out", str(out), "--length", "64", "--rows", "2", "--held-out", "1", *more]))


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.01), (99, 1.0), (500, 1.0), (900, 1.0), (950, 0.5), (1000, 0.0)],
)
def test_the_rate_warms_up_stays_and_falls(step, rate):
    assert train.learning_rate(step, 1.0, 100, 1000, 100) == pytest.approx(rate)


def test_without_decay_the_rate_stays():
    assert train.learning_rate(5000, 0.5, 100, 1000, 0) == 0.5


def test_what_is_unsolved_gets_a_larger_share():
    accuracy = dict.fromkeys(KINDS, 1.0) | {"add": 0.5}
    shares = train.task_shares(accuracy, dict(train.MAX_SIZE), {})
    assert shares["add"] > 3 * shares["copy"] > 0


def test_sizes_grow_only_where_solved():
    progress = train.Progress()
    train.grow(progress, dict.fromkeys(KINDS, 0.0) | {"copy": 1.0, "add": 1.0})
    assert progress.caps == train.FIRST_CAPS | {"copy": 18}


@pytest.mark.slow(reason="compiles training, and trains")
def test_a_leg_resumes_and_the_export_holds_its_weights(tmp_path):
    leg(tmp_path / "run", "--steps", "2", "--every", "1")
    leg(tmp_path / "run", "--steps", "3", "--every", "1", "--decay-steps", "1")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["2", "3"]
    progress = export.export(tmp_path / "run", tmp_path / "hf", "muon")
    assert (progress.step, len(progress.history)) == (3, 3)

    config = ModelConfig.from_directory(tmp_path / "hf")
    assert config == CONFIG
    exported = load(tmp_path / "hf", config, "float32", make_mesh())
    graph, params = initial_params(0)
    manager = train.checkpoints(tmp_path / "run")
    _, params, _ = train.restore(manager, params, train.make_optimizer("muon").init(params))
    manager.close()
    trained = params_of(export.nnx.merge(graph, params))
    np.testing.assert_array_equal(exported["embedding"], trained["embedding"])
    for got, wanted in zip(
        export.jax.tree.leaves(exported["layers"]), export.jax.tree.leaves(trained["layers"]), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
