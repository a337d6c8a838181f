"""The parts of the benchmarks that decide what a number means: work, checks, scores, and what a result file says."""

from __future__ import annotations

import dataclasses
import json

import jax
import ml_dtypes
import pytest

from benchmarks import exact_match, identity, report
from benchmarks.random_checkpoint import LLAMA_153M, write_checkpoint
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading.checkpoint import load
from jaxserve.models.params import make_mesh
from jaxserve.request import FinishReason
from jaxserve.runner.fake import FakeRunner, FakeStep
from jaxserve.scheduler.plan import StepPlan
from jaxserve.serving.clients.grpc_client import Completion, Usage

ARCHITECTURE = ModelConfig("LlamaForCausalLM", 101, 8, 8, 1, 1, 1, 8, 2048)
CONFIG = EngineConfig(
    architecture=ARCHITECTURE,
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=128),
    cache=CacheConfig(page_size=16),
)


def engine(runner: FakeRunner | None = None) -> InlineEngine:
    return InlineEngine(CONFIG, runner or FakeRunner(max_model_len=600, page_size=16, num_pages=400))


def test_a_random_checkpoint_loads(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    write_checkpoint(tmp_path, LLAMA_153M | sizes | {"num_attention_heads": 4, "num_key_value_heads": 2})
    config = ModelConfig.from_directory(tmp_path)
    leaves = jax.tree.leaves(load(tmp_path, config, "bfloat16", make_mesh()))
    assert all(leaf.dtype == ml_dtypes.bfloat16 for leaf in leaves)


def test_identity_runs_every_request_to_its_end():
    prompts = identity.random_prompts(101, 6, 0)
    requests = identity.make_requests(prompts, "request", sampled=True, seed=0)
    alone = identity.run(engine(), requests, alone=True)
    assert alone == identity.run(engine(), requests)
    assert [len(alone[request.request_id]) for request in requests] == [request.max_tokens for request in requests]


def test_cancels_leave_the_pool_whole():
    result = identity.check_cancels(engine(), 40, 0)
    assert result["whole"]
    assert result["cancelled"] > 20
    assert result["cancelled"] + result["finished_first"] == 40


class Compiling(FakeRunner):
    """A runner that compiles something in its fifth step."""

    steps = 0

    def dispatch_forward(self, plan: StepPlan) -> FakeStep:
        self.steps += 1
        self.num_compilations += self.steps == 5
        return super().dispatch_forward(plan)


def test_a_late_compilation_is_noticed():
    runner = Compiling(max_model_len=600, page_size=16, num_pages=400)
    assert not identity.check_compilations(engine(runner), 20, 0)["unchanged"]
    assert identity.check_compilations(engine(), 20, 0)["unchanged"]


def test_an_answer_counts_only_whole_and_ended_by_itself():
    example = exact_match.Example("copy", "copy: ab\n", "ab")
    right = Completion("1", (1, 2), "ab", FinishReason.STOP, Usage(9, 3, 0))
    cut = dataclasses.replace(right, finish_reason=FinishReason.LENGTH)
    wrong = dataclasses.replace(right, text="abc")
    (row,) = exact_match.score([example] * 3, [right, cut, wrong])
    assert (row["kind"], row["examples"], row["exact"]) == ("copy", 3, 1)
    assert row["mean_output_tokens"] == 3


def test_a_result_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    path = tmp_path / report.write("trial", {"seed": 0}, [1, 2])
    document = json.loads(path.read_text())
    assert document["results"] == [1, 2]
    assert document["machine"]["cores"] >= 1
    assert document["versions"]["jax"] == jax.__version__
    assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234.5"), (2.0, "2"), (7, "7"), (0.0, "0")])
def test_cells_of_a_table(value, text):
    assert report.table(("a", "b"), [("x", value)]).split()[-1] == text
