"""Tokens of a quantized model: the same alone, batched, in chunks, after preemption, swaps and prefix hits."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest

from jaxserve.config.settings import EngineConfig
from jaxserve.planning.explanation import explain, local_target
from jaxserve.planning.explanation_report import to_text
from jaxserve.planning.model_cost import ModelCost
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from tests.models.quantized_checkpoints import FORMATS, made, write
from tests.runner.drive import drive
from tests.runner.test_prefix_hits import CONFIG as PREFIX_CONFIG
from tests.runner.test_prefix_hits import Engine, ask, undisturbed

REQUESTS = [
    EngineRequest(f"r{number}", tuple(np.random.RandomState(number).randint(0, 96, length).tolist()), max_tokens=24)
    for number, length in enumerate((53, 9, 30, 41, 17))
]


def mixed(directory: pathlib.Path) -> pathlib.Path:
    """A checkpoint whose attention is in int4, and whose MLPs are in int8 with activations of int8."""
    integers, halves = FORMATS["ct_int8"], FORMATS["ct_int4_zeros"]
    groups = {
        "group_0": integers.config["config_groups"]["group_0"] | {"targets": ["re:.*mlp.*"], "format": "int-quantized"},
        "group_1": halves.config["config_groups"]["group_0"] | {"format": "pack-quantized"},
    }
    stored = {name: array for name, array in made(halves)[0].items() if ".mlp." not in name}
    stored |= {name: array for name, array in made(integers)[0].items() if ".mlp." in name}
    return write(directory, halves.config | {"config_groups": groups, "format": "mixed-precision"}, stored)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> tuple[EngineConfig, ModelRunner]:
    directory = mixed(tmp_path_factory.mktemp("mixed"))
    config = dataclasses.replace(
        PREFIX_CONFIG,
        architecture=None,
        model=str(directory),
        load_format="auto",
        dtype="bfloat16",
        token_buckets=(16, 64),
    )
    return config, ModelRunner(config)


def test_tokens_do_not_depend_on_companions_chunks_or_preemption(running) -> None:
    config, runner = running
    alone = [drive(runner, config, [request]).tokens[0] for request in REQUESTS]
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    assert drive(runner, config, REQUESTS).tokens == alone
    chunked = drive(runner, config, REQUESTS, max_num_batched_tokens=16, long_prefill_token_threshold=0)
    assert chunked.tokens == alone
    few = drive(runner, config, REQUESTS, num_pages=9)
    assert few.num_preemptions
    assert few.tokens == alone


def test_log_probabilities_do_not_depend_on_hits_or_swaps(running) -> None:
    _, runner = running
    requests = [ask(f"r{number}", request.prompt_token_ids, 20) for number, request in enumerate(REQUESTS)]
    expected = undisturbed(runner, *requests)
    engine = Engine(runner)
    again = [dataclasses.replace(request, request_id=f"{request.request_id}-again") for request in requests]
    assert engine.serve(*requests) == expected
    assert engine.serve(*again) == expected
    swapping = Engine(runner, caching=False, num_pages=9)
    assert swapping.serve(*requests) == expected
    assert swapping.core.stats().num_preemptions_swap


def test_plan_and_explanation_count_the_form(running) -> None:
    config, runner = running
    model = resolve_shapes(config, "cpu").model
    weights = dict(runner.info.memory)["weights"]
    assert weights == ModelCost.of(model, "bfloat16", "bfloat16").weight_bytes
    assert weights < 2 * runner.info.num_parameters
    assert model.quantization is not None
    explanation = explain(config, local_target(), compiles=False)
    assert explanation.num_parameters == runner.info.num_parameters
    assert f"matrices: {model.quantization.text}" in to_text(explanation)
