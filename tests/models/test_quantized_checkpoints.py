"""Quantized checkpoints: what is loaded, bit for bit, and the logits of the same checkpoint dequantized."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.matmul import Products
from jaxserve.models.layers.parameter import Packing
from jaxserve.models.layers.quantized import Quantized, multiply, packed
from jaxserve.models.loading import checkpoint
from jaxserve.models.loading.quantize import quantized
from jaxserve.models.quantization import KINDS, Quantization, Scheme
from jaxserve.planning.model_cost import ModelCost
from tests.models import generate
from tests.models.make_quantized_references import NAMES, RECORDED
from tests.models.quantized_checkpoints import FORMATS, RAW, example, made, write

MESH = params.make_mesh
TOKENS = np.random.RandomState(5).randint(0, RAW["vocab_size"], 24).astype(np.int32)


def loaded(directory, dtype="float32", wanted=None):
    config = ModelConfig.from_directory(directory)
    if wanted is not None:
        config = dataclasses.replace(config, quantization=Quantization.at_load(wanted))
    return config, checkpoint.load(directory, config, dtype, MESH())


def kernels_of(config, dtype="float32"):
    """The products of CPUs, with packed weights."""
    return params.products_for(
        dtype,
        MESH(),
        packed=params.packed_kernels(config, dtype),
        by_rows=True,
        quantized=params.quantized_kernels(config),
        quantization=config.quantization,
    )


LAYOUTS = ["ct_fp8_channel", "ct_int8", "ct_int4_zeros", "fp8_blocks", "gptq_order"]
"""Formats that differ once they are loaded."""


@pytest.fixture(scope="module", params=FORMATS)
def both(request, tmp_path_factory):
    """(format, quantized config and weights, config and weights of the same one dequantized)."""
    form = FORMATS[request.param]
    stored, plain = made(form)
    folder = tmp_path_factory.mktemp(request.param)
    return form, loaded(write(folder / "quantized", form.config, stored)), loaded(write(folder / "plain", None, plain))


def test_weights_are_those_that_the_format_says_bit_for_bit(both):
    form, (config, weights), (_, plain) = both
    expected = dict(params.leaves(plain))
    found = dict(params.leaves(weights))
    assert found.keys() == expected.keys()
    matrices = 0
    for path, declared in params.parameters(config).items():
        leaf = found[path]
        if declared.packing in (Packing.MATRIX, Packing.GATE_UP) and path[0] == "layers":
            assert isinstance(leaf, Quantized)
            assert leaf.scheme.activations == form.activations
            leaf = leaf.dequantized()
            matrices += 1
        assert np.asarray(leaf).tobytes() == np.asarray(expected[path]).tobytes(), path
    assert matrices == 4 * config.num_hidden_layers


@pytest.mark.parametrize("name", NAMES)
def test_what_a_format_means_is_what_its_library_makes_of_it(name):
    """compressed-tensors computes in the dtype of the scales: one rounding of ours, which are exact."""
    tensors, weights = example(name)
    with np.load(RECORDED) as file:
        recorded = file[name]
    assert recorded.tobytes() == weights.astype(tensors["weight_scale"].dtype).astype(np.float32).tobytes()


@pytest.mark.parametrize("both", LAYOUTS, indirect=True)
def test_logits_are_those_of_the_dequantized_checkpoint(both):
    """Within float32's rounding; where activations are rounded, within theirs: 1/254 of the largest of a token, or
    2^-4 of each number of fp8."""
    form, (config, weights), (plain, dense) = both
    expected = generate.dense_logits(plain, dense, jnp.asarray(TOKENS))
    bound = {"": 2e-4, "int8": 0.5, "fp8": 2.0}[form.activations]
    by_xla = generate.dense_logits(config, weights, jnp.asarray(TOKENS))
    np.testing.assert_allclose(by_xla, expected, rtol=0, atol=bound)
    products = kernels_of(config)
    products.prepare()
    reordered = params.pack_for(config, weights, products)
    by_kernels = generate.dense_logits(config, reordered, jnp.asarray(TOKENS), products)
    np.testing.assert_allclose(by_kernels, expected, rtol=0, atol=bound)
    np.testing.assert_allclose(by_kernels, by_xla, rtol=0, atol=2e-4 if not form.activations else bound / 4)


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_a_plain_checkpoint_is_quantized_while_it_loads(kind, tmp_path):
    """To the nearest number: no weight is farther from its own than half a step (of fp8, 2^-4 of it)."""
    _, plain = made(FORMATS["ct_int8"])
    directory = write(tmp_path, None, plain)
    _, dense = loaded(directory)
    config, weights = loaded(directory, wanted=kind)
    expected = dict(params.leaves(dense))
    count = 0
    for path, leaf in params.leaves(weights):
        if not isinstance(leaf, Quantized):
            assert np.asarray(leaf).tobytes() == np.asarray(expected[path]).tobytes()
            continue
        count += 1
        n, k, groups = leaf.lengths
        weight = np.asarray(expected[path]).reshape(n, groups, -1)
        scales = np.asarray(leaf.scales).reshape(n, groups, 1)
        largest = {"fp8": 448, "int8": 127, "int4": 7}[kind]
        assert np.allclose(scales[..., 0] * largest, np.abs(weight).max(axis=2), rtol=1e-6)
        assert groups == (k // 128 if kind == "int4" else 1)
        error = np.abs(np.asarray(leaf.dequantized()).reshape(weight.shape) - weight)
        step = np.maximum(np.abs(weight) * 2**-4, scales * 2**-10) if kind == "fp8" else scales * 0.5
        assert (error <= step * 1.0001).all()
    assert count == 4 * config.num_hidden_layers


def test_numbers_of_a_constant_and_of_an_empty_row():
    numbers, scales = quantized(np.array([[0.0, 0.0], [-3.0, 3.0]], np.float32), Scheme("int8"))
    np.testing.assert_array_equal(numbers, [[0, 0], [-127, 127]])
    np.testing.assert_allclose(scales, [[1], [3 / 127]])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_activations_are_rounded_as_compressed_tensors_does(kind):
    """Its formulas in numpy: scale = max |x| / (range / 2) of a token, number = clamp(round(x / scale))."""
    random = np.random.RandomState(0)
    x = random.standard_normal((7, 96)).astype(np.float32)
    x[3] = 0
    numbers = random.randint(-127, 128, (64, 96)).astype(np.int8)
    scales = random.uniform(0.01, 0.1, (64, 1)).astype(np.float32)
    values = numbers if kind == "int8" else (numbers / 32).astype(ml_dtypes.float8_e4m3fn)
    half = np.float32(255 / 2) if kind == "int8" else np.float32(448)
    factors = np.abs(x).max(axis=1, keepdims=True) / half
    factors[factors == 0] = np.finfo(np.float32).eps
    if kind == "int8":
        entering = np.clip(np.rint(x / factors), -128, 127)
    else:
        entering = np.clip(x / factors, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    weights = values.astype(np.float64) * scales
    expected = (entering * factors).astype(np.float64) @ weights.T
    leaf = Quantized(jnp.asarray(values), jnp.asarray(scales), None, None, (64, 96), 1, Scheme(kind, activations=kind))
    by_xla = multiply(jnp.asarray(x), leaf, jnp.float32)
    np.testing.assert_allclose(by_xla, expected, rtol=1e-5, atol=1e-4)
    products = Products(rows="float32", quantized="quantized", schemes=(leaf.scheme,))
    by_kernels = products.contract(jnp.asarray(x), packed(leaf))
    np.testing.assert_allclose(by_kernels, expected, rtol=1e-5, atol=1e-4)


def test_matrices_of_other_shapes_are_multiplied_row_by_row():
    """Ones that no packed kernel reads: 40 outputs."""
    random = np.random.RandomState(1)
    weights = random.standard_normal((40, 64)).astype(np.float32)
    numbers, scales = quantized(weights, Scheme("int4", 16))
    leaf = Quantized(jnp.asarray(numbers), jnp.asarray(scales), None, None, (40, 64), 1, Scheme("int4", 16))
    assert not leaf.packs
    x = random.standard_normal((5, 64)).astype(np.float32)
    products = Products(rows="float32", quantized="quantized")
    y = np.asarray(products.contract(jnp.asarray(x), leaf))
    expected = x.astype(np.float64) @ np.asarray(leaf.dequantized()).astype(np.float64).T
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    assert np.asarray(products.contract(jnp.asarray(x[2:3]), leaf)).tobytes() == y[2:3].tobytes()


def test_a_mesh_holds_parts_of_quantized_weights():
    config = ModelConfig.from_hf(RAW)
    config = dataclasses.replace(config, quantization=Quantization.at_load("int4"))
    abstract = params.abstract_params(config, "bfloat16", MESH())
    qkv = abstract["layers"][0]["attention"]["qkv"]
    assert isinstance(qkv, Quantized)
    assert qkv.values.shape == (2, 4, 32, 64)
    assert qkv.scales.shape == (2, 4, 32, 1)
    assert qkv.values.sharding.spec[0] == qkv.scales.sharding.spec[0] == "tensor"
    assert qkv.values.size + 4 * qkv.scales.size == 2 * 4 * 32 * (64 + 4)


@pytest.mark.parametrize("name", [*FORMATS, *KINDS])
def test_plans_count_the_bytes_of_the_form(name):
    """The roofline's, which are counted by hand, and the arrays'."""
    config = ModelConfig.from_hf(RAW | ({"quantization_config": FORMATS[name].config} if name in FORMATS else {}))
    if name in KINDS:
        config = dataclasses.replace(config, quantization=Quantization.at_load(name))
    abstract = params.abstract_params(config, "bfloat16", MESH())
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    cost = ModelCost.of(config, "bfloat16", "bfloat16")
    assert cost.weight_bytes == size
    assert cost.layer_bytes(1) == size - 2 * cost.norms - 2 * 2 * 160 * 128  # embedding and head
    assert params.num_parameters(config) == params.num_parameters(dataclasses.replace(config, quantization=None))
    again = ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert again.decisive == config.decisive
