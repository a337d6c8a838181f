"""What is planned for models whose layers have windows: memory, concurrency, costs."""

from __future__ import annotations

import dataclasses

import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.layer_specs import LayerSpec, MLPSpec, SelfAttentionSpec
from jaxserve.models.params import make_mesh
from jaxserve.planning import explanation as explanation_of
from jaxserve.planning.decode_roofline import page_bytes
from jaxserve.planning.explanation import explain
from jaxserve.planning.explanation_report import to_json, to_text
from jaxserve.planning.memory_plan import DeviceMemory, MemoryPlanner, pages_in_use
from jaxserve.planning.model_cost import ModelCost
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.planning.roofline import RooflineCosts, pool_pages
from jaxserve.programs.program_needs import ProgramNeeds
from jaxserve.programs.target_devices import load_target
from jaxserve.scheduler.step_shape import StepShape
from jaxserve.simulator.setup import set_up

WINDOWS = (128, None, 128, None)
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    dtype="bfloat16",
    sliding_window=128,
    layers=tuple(LayerSpec(SelfAttentionSpec(sliding_window=one), MLPSpec(1024)) for one in WINDOWS),
)
WHOLE = dataclasses.replace(MODEL, layers=None, sliding_window=None)
CONFIG = EngineConfig(
    architecture=MODEL,
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=64),
    cache=CacheConfig(swap_space=0.1),
    token_buckets=(64,),
    row_buckets=(64,),
)
PAGE = 2 * 2 * 2 * 64 * 16 * 2
"""Bytes of a page: keys and values of two layers, two heads, 64 numbers of two bytes, 16 tokens."""


def test_a_page_has_the_layers_of_a_group():
    shapes = resolve_shapes(CONFIG, "gpu")
    assert (shapes.groups.size, shapes.groups.windows, shapes.groups.padding) == (2, (None, 128), 0)
    assert page_bytes(shapes) == PAGE
    assert shapes.num_host_pages == int(0.1 * 2**30) // PAGE
    plan = MemoryPlanner(shapes, CONFIG.cache, make_mesh(), DeviceMemory(10**9, 10**9)).plan(100, ProgramNeeds(0, 0))
    assert (plan.page, plan.pages) == (PAGE, 100 * PAGE)


def test_the_pool_holds_what_all_requests_can_use():
    """64 requests of 4,096 tokens: 256 pages each without a window, and with one 9, and the chunks of a step."""
    shapes = resolve_shapes(CONFIG, "gpu")
    assert pages_in_use(shapes) == 1 + 64 * 256 + 64 * 9 + 64 // 16 + 64
    alike = resolve_shapes(dataclasses.replace(CONFIG, architecture=WHOLE), "gpu")
    assert pages_in_use(alike) == 1 + 64 * 256


def test_a_pool_has_a_page_for_each_group():
    shapes = resolve_shapes(CONFIG, "gpu")
    planner = MemoryPlanner(shapes, CacheConfig(num_pages=2), make_mesh(), DeviceMemory(10**9, 10**9))
    with pytest.raises(ValueError, match=r"^num_pages is 2; layers are of 2 groups, each of which needs a page beside"):
        planner.pool(lambda: ProgramNeeds(0, 0))


def test_explain_names_groups_and_counts_windows(monkeypatch):
    nothing = explanation_of._Needs(ProgramNeeds(0, 0), 0.0, "", "")
    monkeypatch.setattr(explanation_of, "_estimate", lambda *_: nothing)  # no program matters here
    few = dataclasses.replace(CONFIG, cache=CacheConfig(num_pages=2651))
    explanation = explain(few, load_target("h200"), compiles=False)
    found = {one.length: one.requests for one in explanation.concurrency}
    assert found == {1024: 2650 / (64 + 9), 4096: 2650 / (256 + 9)}
    text, told = to_text(explanation), to_json(explanation)
    assert "layers are of 2 groups of 2, 1 with all positions and 1 with a window of 128; 0 of their 4 places" in text
    assert "a request of 4,096 tokens fits into the pages" in text
    assert told["memory"]["groups"] == {"layers": 2, "windows": [None, 128], "padding": 0}
    assert told["memory"]["pool_tokens"] == 4096
    plain = to_text(explain(dataclasses.replace(few, architecture=WHOLE), load_target("h200"), compiles=False))
    assert "42,400 tokens fit into the pages" in plain
    assert "groups" not in plain


def test_costs_count_what_windows_reach():
    cost = ModelCost.of(MODEL, "bfloat16", "bfloat16")
    assert cost.seen(8 * 1000.0, 8) == 8 * (128 + 1000) / 2
    assert cost.seen(8 * 100.0, 8) == 800.0
    assert ModelCost.of(WHOLE, "bfloat16", "bfloat16").seen(8 * 1000.0, 8) == 8000.0
    settings = {"dtype": "bfloat16", "pool_dtype": "bfloat16", "page_size": 16}
    target = load_target("h200")
    costs, whole = (RooflineCosts(model, target, **settings) for model in (MODEL, WHOLE))
    decode = StepShape(64, 64, 64, 64 * 4000.0, 0, 0.0, 0.0, 4000.0)
    nothing = decode._replace(decode_context=0.0)
    share = (costs.seconds(decode) - costs.seconds(nothing)) / (whole.seconds(decode) - whole.seconds(nothing))
    assert share == pytest.approx((128 + 4000) / 8000)
    assert costs.stretch_seconds(decode, 3)[0] == pytest.approx(costs.seconds(decode))
    assert costs.preemption.swap_seconds_per_page == pytest.approx(whole.preemption.swap_seconds_per_page / 2)


def test_the_simulator_has_the_groups_of_its_model():
    limits = {"gpu_memory_utilization": 0.9, "max_num_batched_tokens": 64, "max_num_seqs": 64, "max_model_len": 4096}
    target = load_target("h200")
    device = set_up(CONFIG, target=target).device
    assert device.group_windows == (None, 128)
    assert device.pool_tokens(CONFIG) == 4096
    settings = {"dtype": "bfloat16", "pool_dtype": "bfloat16", "page_size": 16}
    assert device.num_pages == pool_pages(MODEL, target, **settings, **limits) == 1 + 64 * 265 + 4 + 64
