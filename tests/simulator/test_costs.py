"""Costs of steps: counted from shapes, fitted to measured times, read from files."""

import json
import math

import jax
import numpy as np
import pytest

from jaxserve.config.targets import load_target
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import abstract_params, leaves, make_mesh
from jaxserve.planning.model_cost import ModelCost
from jaxserve.planning.roofline import Efficiency, RooflineCosts, pool_pages
from jaxserve.planning.step_cost_models import FittedCosts, HostCosts, StepTime, read_costs, write_costs
from jaxserve.scheduler.step_shape import StepShape

MODEL = ModelConfig("LlamaForCausalLM", 1000, 64, 160, 3, 4, 2, 16, 512)
H200 = {"dtype": "bfloat16", "pool_dtype": "bfloat16", "page_size": 16}
LLAMA_8B = ModelConfig("LlamaForCausalLM", 128256, 4096, 14336, 32, 32, 8, 128, 131072)


def decode_shape(bucket: int, rows: int, context: int) -> StepShape:
    return StepShape(bucket, bucket, rows, rows * context, 0, 0.0, 0.0, context)


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_the_counts_are_those_of_the_parameters(options):
    model = ModelConfig("LlamaForCausalLM", 1000, 64, 160, 3, 4, 2, 16, 512, **options)
    sizes = [
        math.prod(leaf.shape) for _, leaf in leaves(abstract_params(model, "bfloat16", make_mesh(jax.devices()[:1])))
    ]
    assert ModelCost.of(model, "bfloat16", "int8").weight_bytes == 2 * sum(sizes)
    assert ModelCost.of(model, "bfloat16", "int8").token_bytes == 2 * 2 * 16 * 3


def test_a_decode_step_of_8b_reads_its_weights_and_context_at_the_bandwidth():
    exact = Efficiency(memory=1.0, compute=1.0, decode_attention=1.0, launch_seconds=0.0)
    costs = RooflineCosts(LLAMA_8B, load_target("h200"), **H200, efficiency=exact)
    # 3.16 ms with one row of 1,024 and 4.92 ms with 64 (docs/explain.md); logits come on top here.
    assert costs.seconds(decode_shape(8, 1, 1024)) == pytest.approx(3.16e-3, rel=0.01)
    assert costs.seconds(decode_shape(64, 64, 1024)) == pytest.approx(4.92e-3, rel=0.01)


def test_a_prompt_costs_its_operations_and_attention_grows_with_its_square():
    costs = RooflineCosts(LLAMA_8B, load_target("h200"), **H200)
    whole = costs.seconds(StepShape(8192, 8, 0, 0.0, 8192, 8192 * 8193 / 2, 8192, 8192))
    chunk = costs.seconds(StepShape(512, 0, 0, 0.0, 512, 512 * 513 / 2, 512, 512))
    late = costs.seconds(StepShape(512, 0, 0, 0.0, 512, 512 * 7680 + 512 * 513 / 2, 8192, 8192))
    flops = 2 * ModelCost.of(LLAMA_8B, "bfloat16", "bfloat16").layers * 8192
    assert whole > flops / 989.5e12
    assert chunk < late < whole < 16 * late


@pytest.mark.parametrize("costs_of", ["roofline", "fitted"])
def test_a_stretch_costs_what_its_steps_cost_bit_by_bit(costs_of):
    if costs_of == "roofline":
        costs = RooflineCosts(LLAMA_8B, load_target("h200"), **H200)
    else:
        costs = FittedCosts.fit(measured(), name="made up")
    first = decode_shape(64, 37, 1013)
    steps = [
        first._replace(decode_context=first.decode_context + 37 * later, longest=first.longest + later)
        for later in range(100)
    ]
    assert costs.stretch_seconds(first, 100).tolist() == [costs.seconds(step) for step in steps]


def measured() -> list[StepTime]:
    """Steps whose times follow a law that the fit can find."""
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(400):
        bucket, rows = int(rng.choice([8, 16, 64])), int(rng.integers(1, 9))
        context = float(rows * rng.integers(10, 400))
        tokens = int(rng.integers(0, bucket - rows + 1))
        pairs = tokens * float(rng.integers(1, 300))
        seconds = 1e-3 * bucket / 8 + 2e-4 + 3e-7 * context + 2e-8 * pairs
        steps.append(StepTime((StepShape(bucket, 8, rows, context, tokens, pairs, 0.0, 0),), seconds))
    return steps


def test_the_fit_finds_the_law_of_the_steps():
    costs = FittedCosts.fit(measured(), name="made up")
    assert costs.error < 1e-6
    assert costs.rates["decode_context"] == pytest.approx(3e-7)
    assert costs.rates["prefill_pairs"] == pytest.approx(2e-8)
    # Between buckets along a line, beyond the largest in proportion.
    base = costs.seconds(StepShape(16, 8, 0, 0, 0, 0, 0, 0)), costs.seconds(StepShape(64, 8, 0, 0, 0, 0, 0, 0))
    assert costs.seconds(StepShape(40, 8, 0, 0, 0, 0, 0, 0)) == pytest.approx(sum(base) / 2)
    assert costs.seconds(StepShape(128, 8, 0, 0, 0, 0, 0, 0)) > 1.8 * base[1]


def test_steps_that_were_only_timed_together_are_told_apart():
    steps = measured()
    joined = [
        StepTime(a.shapes + b.shapes, a.seconds + b.seconds) for a, b in zip(steps[::2], steps[1::2], strict=True)
    ]
    alone, together = FittedCosts.fit(steps, name="alone"), FittedCosts.fit(joined, name="together")
    for step in steps[:20]:
        assert together.seconds(step.shapes[0]) == pytest.approx(alone.seconds(step.shapes[0]), rel=1e-6)


def test_noise_leaves_the_sum_of_all_steps():
    rng = np.random.default_rng(2)
    noisy = [StepTime(step.shapes, step.seconds * rng.exponential(1.0)) for step in measured()]
    costs = FittedCosts.fit(noisy, name="noisy")
    told = sum(costs.seconds(shape) for step in noisy for shape in step.shapes)
    assert told == pytest.approx(sum(step.seconds for step in noisy), rel=0.03)


def test_no_part_of_a_fit_is_negative():
    rng = np.random.default_rng(1)
    noisy = [StepTime(step.shapes, step.seconds * rng.uniform(0.2, 3)) for step in measured()[:40]]
    costs = FittedCosts.fit(noisy, name="noise")
    values = [*dict(costs.token_seconds).values(), *dict(costs.row_seconds).values(), *costs.rates.values()]
    assert min(values) >= 0 < max(values)


def test_a_file_of_steps_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "costs.json"
    steps = measured()
    write_costs(path, steps, name="made up", host=HostCosts(1e-3, 0, 2e-3, 0), swap_seconds_per_page=1e-4)
    read = read_costs(path)
    fitted = FittedCosts.fit(steps, name="made up", host=HostCosts(1e-3, 0, 2e-3, 0), swap_seconds_per_page=1e-4)
    assert read == fitted
    assert read.preemption.swap_seconds_per_page == 1e-4
    swapping = decode_shape(8, 3, 100)._replace(swapped_pages=4)
    assert read.seconds(swapping) == pytest.approx(read.seconds(decode_shape(8, 3, 100)) + 4 * 0.5e-4)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"name": "x", "host": {"before": -1}, "steps": {}})])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(ValueError, match=r"costs\.json is not a file of measured steps"):
        read_costs(tmp_path / "costs.json")


def test_a_report_replaces_the_counts(tmp_path):
    cost = ModelCost.of(LLAMA_8B, "bfloat16", "bfloat16")
    program = {
        "kind": "decode",
        "size": 8,
        "bytes_read": 10**11 + 8 * 1024 * cost.token_bytes,
        "bytes_written": 0,
        "flops": {"bfloat16": 0},
    }
    report = {"target": {"name": "h200"}, "decode_steps": [{"context": 1024}], "programs": [program]}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    exact = Efficiency(memory=1.0, decode_attention=1.0, launch_seconds=0.0)
    costs = RooflineCosts(LLAMA_8B, load_target("h200"), **H200, efficiency=exact, report=path)
    shape = StepShape(8, 0, 8, 8 * 1024.0, 0, 0, 0, 1024)
    assert costs.seconds(shape) == pytest.approx(program["bytes_read"] / 4.8e12)
    with pytest.raises(ValueError, match=r"is for the target h200; the target is h100"):
        RooflineCosts(LLAMA_8B, load_target("h100"), **H200, report=path)


def test_a_target_without_rates_is_refused():
    with pytest.raises(ValueError, match="target cpu has no memory bandwidth"):
        RooflineCosts(MODEL, load_target("cpu"), **H200)


def test_pages_that_fit_beside_8b_on_an_h200():
    limits = {
        "gpu_memory_utilization": 0.92,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 256,
        "max_model_len": 131072,
    }
    # 14,411 by the compiler's own memory analysis (docs/explain.md).
    assert pool_pages(LLAMA_8B, load_target("h200"), **H200 | {"page_size": 64}, **limits) == pytest.approx(
        14411, rel=0.01
    )
    with pytest.raises(ValueError, match="leave no room for pages"):
        pool_pages(LLAMA_8B, load_target("l4"), **H200, **limits | {"gpu_memory_utilization": 0.5})
