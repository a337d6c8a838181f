"""Scales of quantized keys and values: read from checkpoints of several tools, else measured."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.attention_backends import dense_attend, rotated
from jaxserve.models.loading import checkpoint, kv_scales
from jaxserve.models.loading.kv_scales import KVScales
from tests.models.checkpoints import BASE, random_tensors, write_checkpoint

LAYERS, HEADS = 2, 2


def scale_tensors(*names: str, value=0.5) -> dict[str, np.ndarray]:
    """Tensors of these names below self_attn of every layer, of other values in each."""
    return {
        f"model.layers.{layer}.self_attn.{name}": np.float32(value) * (1 + layer + 10 * number)
        for layer in range(LAYERS)
        for number, name in enumerate(names)
    }


def directory_with(tmp_path, tensors: dict[str, np.ndarray], quantization=None):
    raw = BASE | {"quantization_config": quantization}
    directory = write_checkpoint(tmp_path, raw, random_tensors(raw, 0) | tensors)
    return directory, ModelConfig.from_directory(directory)


@pytest.mark.parametrize(
    "names",
    [
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
    ],
)
def test_names_that_tools_write(names, tmp_path):
    directory, config = directory_with(tmp_path, scale_tensors(*names))
    found = checkpoint.load_kv_scales(directory, config)
    assert found.dtype == "float8_e4m3fn"
    np.testing.assert_array_equal(found.values, [[[0.5] * 2, [5.5] * 2], [[1.0] * 2, [6.0] * 2]])
    # The weights are read as if the scales were not there.
    loaded = checkpoint.load(directory, config, "float32", params.make_mesh())
    assert loaded.keys() == params.abstract_params(config, "float32", params.make_mesh()).keys()


def test_one_scale_of_both_and_one_a_head(tmp_path):
    tensors = scale_tensors("kv_scale") | {
        "model.layers.1.self_attn.k_scale": np.array([[2.0], [3.0]], np.float32),
    }
    directory, config = directory_with(tmp_path, tensors)
    found = checkpoint.load_kv_scales(directory, config)
    np.testing.assert_array_equal(found.values, [[[0.5] * 2, [0.5] * 2], [[2.0, 3.0], [1.0] * 2]])


def test_a_checkpoint_without_scales_has_none(tmp_path):
    directory, config = directory_with(tmp_path, {})
    assert checkpoint.load_kv_scales(directory, config) is None


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.0.self_attn.k_scale": np.float32(1)}, "kv scales, but none for the values of layer 0"),
        (scale_tensors("k_scale", "v_scale", value=-1), "keys, head 0 is -1.0; it must be a finite number above 0"),
        (scale_tensors("k_scale", "v_scale", value=np.nan), "keys, head 0 is nan; it must be a finite number above 0"),
        (scale_tensors("k_scale", "attn.k_scale"), r"kv scales .*self_attn.attn.k_scale and .*; only one may stay"),
        ({"model.layers.0.self_attn.kv_scale": np.ones(3, np.float32)}, r"shape \[3\]; a kv scale is one .* 2 heads"),
        ({"model.layers.7.self_attn.kv_scale": np.float32(1)}, "of one of 2 layers"),
    ],
)
def test_malformed_scales_are_named(tensors, message, tmp_path):
    directory, config = directory_with(tmp_path, tensors)
    with pytest.raises(ValueError, match=message):
        checkpoint.load_kv_scales(directory, config)


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"type": "int", "num_bits": 8}}, "int8"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"type": "float"}}, "float8_e4m3fn"),
        ({"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}, "float8_e4m3fn"),
        ({"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "INT8"}, "int8"),
    ],
)
def test_the_configuration_says_what_scales_are_for(quantization, dtype, tmp_path):
    directory, config = directory_with(tmp_path, scale_tensors("kv_scale"), quantization)
    assert checkpoint.load_kv_scales(directory, config).dtype == dtype


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "fp8",
    ],
)
def test_weights_that_are_quantized_in_another_way_are_refused(quantization):
    with pytest.raises(
        ValueError, match=r"quantization_config (is 'fp8'|quant_method is|config_groups group_0 has no)"
    ):
        ModelConfig.from_hf(BASE | {"quantization_config": quantization})


def test_the_other_dtype_saturates_at_the_same_magnitude():
    scales = KVScales("float8_e4m3fn", np.array([[[0.5, 1.0], [2.0, 4.0]]], np.float32))
    assert scales.of("float8_e4m3fn") is scales.values
    np.testing.assert_allclose(scales.of("int8") * 127, scales.values * 448, rtol=1e-6)
    assert scales.of("int8").dtype == np.float32


def test_orbax_keeps_scales(tmp_path):
    directory, config = directory_with(tmp_path / "source", scale_tensors("k_scale", "v_scale", value=0.1))
    scales = checkpoint.load_kv_scales(directory, config)
    loaded = checkpoint.load(directory, config, "float32", params.make_mesh())
    checkpoint.save_orbax(loaded, config, tmp_path / "with", scales)
    found = checkpoint.load_kv_scales(tmp_path / "with", config)
    assert found.dtype == scales.dtype
    np.testing.assert_array_equal(found.values, scales.values)
    path = tmp_path / "with" / checkpoint.KV_SCALES_FILE
    for content in ("{}", '{"dtype": "int4", "scales": [[[1, 1], [1, 1]], [[1, 1], [1, 1]]]}', '{"dtype": "int8"'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"kv_scales.json is invalid"):
            checkpoint.load_kv_scales(tmp_path / "with", config)
    path.write_text(json.dumps({"dtype": "int8", "scales": [[[1, 1], [1, 1]]]}))
    with pytest.raises(ValueError, match=r"shape \[1, 2, 2\]; expected \[2, 2, 2\]"):
        checkpoint.load_kv_scales(tmp_path / "with", config)
    path.unlink()
    assert checkpoint.load_kv_scales(tmp_path / "with", config) is None


@pytest.mark.slow(reason="measures as the command does, in a process of its own")
def test_measured_scales_are_the_greatest_magnitudes_with_their_margin():
    config = ModelConfig.from_hf(BASE | {"bos_token_id": 1})
    mesh = params.make_mesh()
    weights = params.random_params(config, "float32", mesh, seed=3)
    tokens = kv_scales.calibration_tokens(config)
    assert tokens.shape == (8, 128)
    assert (tokens[:, 0] == 1).all()
    np.testing.assert_array_equal(tokens, kv_scales.calibration_tokens(config))

    attend = dense_attend()
    greatest = np.zeros((LAYERS, 2, HEADS))
    for sequence in tokens:
        seen = []

        def remember(qkv, rotation, cache, spec, sinks, dtype, seen=seen):
            _, k, v = rotated(qkv, rotation, dtype)
            seen.append([np.abs(np.asarray(x)).max(axis=(0, 2)) for x in (k, v)])
            return attend(qkv, rotation, cache, spec, sinks, dtype)

        params.bind(config, weights)(jnp.asarray(sequence), jnp.arange(128), [None] * LAYERS, remember)
        greatest = np.maximum(greatest, seen)
    for dtype, limit, margin in (("float8_e4m3fn", 448, 2.0), ("int8", 127, 1.25)):
        measured = kv_scales.calibrate(config, weights, dtype, mesh)
        np.testing.assert_allclose(measured, greatest * margin / limit, rtol=1e-4)
    placed = kv_scales.placed(measured, mesh)
    np.testing.assert_array_equal(np.array(placed), measured)


def test_heads_of_zeros_have_a_scale():
    config = ModelConfig.from_hf(BASE)
    weights = jax.tree.map(jnp.zeros_like, params.random_params(config, "float32", params.make_mesh(), seed=3))
    np.testing.assert_array_equal(kv_scales.calibrate(config, weights, "int8", params.make_mesh()), 1.0)


def test_keys_that_are_not_finite_are_told():
    config = ModelConfig.from_hf(BASE)
    weights = jax.tree.map(lambda x: x * jnp.nan, params.random_params(config, "float32", params.make_mesh(), seed=3))
    with pytest.raises(
        ValueError, match="scale of the keys of layer 0, head 0, was measured as inf; scales are finite"
    ):
        kv_scales.calibrate(config, weights, "int8", params.make_mesh())
