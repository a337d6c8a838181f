"""Quantized checkpoints that cannot be served: one line each, which names the field or the tensor."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

from jaxserve.config.settings import EngineConfig
from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.quantized import Quantized
from jaxserve.models.loading import checkpoint, quantization_config
from jaxserve.models.quantization import Quantization, Scheme
from jaxserve.planning.resolve import resolve_shapes
from tests.models.quantized_checkpoints import FORMATS, RAW, made, write


def changed(name: str, *path: str, to: Any) -> dict[str, Any]:
    """A format's quantization_config with one value changed."""
    config = copy.deepcopy(FORMATS[name].config)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return config


GROUP = ("config_groups", "group_0")
CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes'"),
    ({"bits": 4}, "quant_method is None"),
    (changed("awq", "version", to="gemv"), "version is 'gemv'"),
    (changed("awq", "bits", to=3), "bits is 3"),
    (changed("awq", "rotation", to="hadamard"), "rotation is 'hadamard'"),
    (changed("awq", "modules_to_not_convert", to="lm_head"), "modules_to_not_convert is 'lm_head'"),
    (changed("gptq", "checkpoint_format", to="marlin"), "format is 'marlin'"),
    (changed("gptq", "group_size", to=0), "group_size is 0"),
    (changed("gptq", "desc_act", to=1), "desc_act is 1"),
    (changed("gptq", "dynamic", to={"-:.*down": {}}), "dynamic is"),
    (changed("gptq", "lm_head", to=True), "lm_head is True"),
    (changed("fp8_blocks", "weight_block_size", to=[128]), r"weight_block_size is \[128\]"),
    (changed("fp8_blocks", "scale_fmt", to="ue8m0"), "scale_fmt is 'ue8m0'"),
    (changed("fp8_blocks", "fmt", to="e5m2"), "fmt is 'e5m2'"),
    (changed("ct_int4", "quantization_status", to="frozen"), "quantization_status is 'frozen'"),
    (changed("ct_int4", "format", to="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'"),
    (changed("ct_int4", "format", to="int-quantized"), "do not go together"),
    (changed("ct_int4", "sparsity_config", to={"format": "sparse-24-bitmask"}), "sparsity_config"),
    (changed("ct_int4", "transform_config", to={"a": 1}), "transform_config"),
    (changed("ct_int4", *GROUP, "targets", to=[]), "no targets"),
    (changed("ct_int4", *GROUP, "output_activations", to={"num_bits": 8}), "output_activations"),
    (changed("ct_int4", *GROUP, "weights", "num_bits", to=3), "num_bits is 3"),
    (changed("ct_int4", *GROUP, "weights", "dynamic", to=True), "dynamic is True"),
    (changed("ct_int4", *GROUP, "weights", "strategy", to="channel"), "strategy is 'channel'"),
    (changed("ct_int8", *GROUP, "input_activations", "symmetric", to=False), "symmetric is False"),
    (changed("ct_int8", *GROUP, "input_activations", "type", to="float"), "type is 'float'"),
    (changed("ct_int8", *GROUP, "input_activations", "num_bits", to=4), "num_bits is 4"),
]


@pytest.mark.parametrize(("config", "told"), CONFIGS)
def test_a_config_that_is_not_known_whole_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        ModelConfig.from_hf(RAW | {"quantization_config": config})
    assert "\n" not in str(error.value)
    assert "quantization_config" in str(error.value)


def test_fields_that_change_no_number_are_accepted() -> None:
    config = FORMATS["awq"].config | {"do_fuse": False, "modules_to_not_convert": None, "fuse_max_seq_len": None}
    read, lines = quantization_config.read(config)
    assert read is not None
    assert not lines
    assert read.targets[0].scheme == Scheme("int4", 64, zeros=True)
    read, lines = quantization_config.read(FORMATS["fp8_blocks"].config)
    assert read is not None
    assert "activations, which keep their dtype" in lines[0]


Q = "model.layers.1.self_attn.q_proj"
TENSORS: list[tuple[str, str, np.ndarray | None, str]] = [
    ("ct_fp8_channel", f"{Q}.weight_scale", None, f"no tensor {Q}.weight_scale; quantization_config says"),
    ("ct_fp8_channel", f"{Q}.weight_scale", np.ones((7, 1), np.float32), r"shape \[7, 1\].*\[128, 1\]"),
    ("ct_fp8_channel", f"{Q}.weight", np.ones((128, 128), np.float32), "dtype F32 .*asks for F8_E4M3"),
    ("ct_int4", f"{Q}.weight_packed", None, f"no tensor {Q}.weight_packed"),
    ("ct_int4", f"{Q}.weight_packed", np.ones((128, 128), np.int32), r"shape \[128, 128\].*\[128, 16\]"),
    ("ct_int4_zeros", f"{Q}.weight_zero_point", None, "no tensor .*weight_zero_point"),
    ("fp8_blocks", f"{Q}.weight_scale_inv", np.ones((2, 1), np.float32), r"shape \[2, 1\].*\[1, 1\]"),
    ("awq", f"{Q}.qzeros", np.ones((1, 16), np.int32), r"shape \[1, 16\].*\[2, 16\]"),
    ("gptq", f"{Q}.scales", np.ones((2, 128), np.int32), "dtype I32"),
    ("gptq_order", f"{Q}.g_idx", np.zeros(128, np.int32), "must name each of 2 groups 64 times"),
    ("gptq_order", f"{Q}.g_idx", np.repeat([0, 1], 64).astype(np.int32), "different g_idx"),
    ("ct_int8", "model.layers.0.mlp.extra_scale", np.ones(1, np.float32), "does not use"),
]


@pytest.mark.parametrize(("name", "tensor", "value", "told"), TENSORS)
def test_tensors_that_contradict_the_config_are_refused_before_a_weight_is_read(
    name: str, tensor: str, value: np.ndarray | None, told: str, tmp_path: pathlib.Path
) -> None:
    stored, _ = made(FORMATS[name])
    stored.pop(tensor, None)
    if value is not None:
        stored[tensor] = value
    directory = write(tmp_path, FORMATS[name].config, stored)
    with pytest.raises(ValueError, match=told) as error:
        checkpoint.check(directory, ModelConfig.from_directory(directory))
    assert "\n" not in str(error.value)


def test_numbers_that_are_none_are_refused(tmp_path: pathlib.Path) -> None:
    stored, _ = made(FORMATS["ct_fp8_tensor"])
    stored[f"{Q}.weight"].view(np.uint8)[0, 0] = 0x7F
    directory = write(tmp_path, FORMATS["ct_fp8_tensor"].config, stored)
    config = ModelConfig.from_directory(directory)
    with pytest.raises(ValueError, match="not finite"):
        checkpoint.load(directory, config, "float32", params.make_mesh())


def test_groups_divide_rows(tmp_path: pathlib.Path) -> None:
    stored, _ = made(FORMATS["awq"])
    directory = write(tmp_path, FORMATS["awq"].config | {"group_size": 96}, stored)
    config = ModelConfig.from_directory(directory)
    with pytest.raises(ValueError, match=r"layers.0.attention.out have 128 numbers in a row.*groups of 96"):
        checkpoint.check(directory, config)


def engine(directory: pathlib.Path, wanted: str | None) -> EngineConfig:
    return EngineConfig(model=str(directory), skip_tokenizer_init=True, quantization=wanted, max_model_len=64)


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: pathlib.Path) -> None:
    stored, plain = made(FORMATS["ct_int8"])
    directory = write(tmp_path / "quantized", FORMATS["ct_int8"].config, stored)
    with pytest.raises(ValueError, match=r"quantization is 'int4'; the checkpoint is quantized already.*int8"):
        resolve_shapes(engine(directory, "int4"), "cpu")
    same = resolve_shapes(engine(directory, "int8"), "cpu").model
    assert same.quantization is not None
    assert same.quantization.method == "compressed-tensors"
    directory = write(tmp_path / "plain", None, plain)
    assert resolve_shapes(engine(directory, "int4"), "cpu").model.quantization == Quantization.at_load("int4")
    assert resolve_shapes(engine(directory, None), "cpu").model.quantization is None
    with pytest.raises(ValueError, match="quantization is 'int2'; it must be one of"):
        engine(directory, "int2")
    uneven = write(tmp_path / "uneven", None, {}, intermediate_size=192)
    with pytest.raises(ValueError, match=r"mlp.down have 192 numbers in a row; quantization in groups of 128"):
        resolve_shapes(
            dataclasses.replace(
                engine(uneven, "int4"),
                architecture=ModelConfig.from_hf(RAW | {"intermediate_size": 192}),
                model=None,
                load_format="dummy",
            ),
            "cpu",
        )


def test_ignored_modules_stay_as_they_are(tmp_path: pathlib.Path) -> None:
    """Names, patterns, and patterns of transformers; a parameter of several tensors is quantized only as a whole."""
    skipped = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj")
    for name, ignored in (
        ("ct_int4", {"ignore": ["lm_head", skipped[0], r"re:.*layers\.1\.self_attn\.k_proj$"]}),
        ("awq", {"modules_to_not_convert": ["0.mlp.down_proj", r"model\.layers\.1\.self_attn\.k_proj"]}),
    ):
        stored, plain = made(FORMATS[name], skipped=skipped)
        directory = write(tmp_path / name, FORMATS[name].config | ignored, stored)
        config = ModelConfig.from_directory(directory)
        found = dict(params.leaves(checkpoint.load(directory, config, "float32", params.make_mesh())))
        dense = {path for path, leaf in found.items() if not isinstance(leaf, Quantized) and "layers" in path}
        matrices = {path for path in dense if path[-1] in ("down", "qkv", "out", "gate_up")}
        assert matrices == {("layers", 0, "mlp", "down"), ("layers", 1, "attention", "qkv")}
        np.testing.assert_array_equal(found["layers", 0, "mlp", "down"], plain[f"{skipped[0]}.weight"])
        # The queries, quantized, are dequantized as they are loaded.
        reference = write(tmp_path / f"{name}-plain", None, plain)
        expected = checkpoint.load(reference, ModelConfig.from_directory(reference), "float32", params.make_mesh())
        np.testing.assert_array_equal(found["layers", 1, "attention", "qkv"], expected["layers"][1]["attention"]["qkv"])


def test_a_module_that_should_be_ignored_but_is_quantized_is_named(tmp_path: pathlib.Path) -> None:
    stored, _ = made(FORMATS["ct_fp8_tensor"])
    config = FORMATS["ct_fp8_tensor"].config | {"ignore": ["lm_head", Q]}
    directory = write(tmp_path, config, stored)
    with pytest.raises(ValueError, match=f"tensor {Q}.weight has dtype F8_E4M3"):
        checkpoint.check(directory, ModelConfig.from_directory(directory))
