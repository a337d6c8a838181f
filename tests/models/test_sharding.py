"""The same logits on meshes of one, two and four devices, through dense attention and through pages."""

import pathlib
import subprocess
import sys
import textwrap

import pytest

from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from tests.models.checkpoints import BASE, SHAPES, tensor_shapes

RUN = textwrap.dedent("""
    import pathlib, sys, tempfile
    import jax, numpy as np
    from jaxserve.models import params
    from jaxserve.models.loading import checkpoint
    from jaxserve.models.config import ModelConfig
    from tests.models import generate
    from tests.models.checkpoints import BASE, Shape, prompt, write_shape
    from tests.models.test_layer_kinds import MIXED

    assert jax.device_count() == 4
    shape = Shape(BASE | {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 138, "attention_bias": True,
                          "mlp_bias": True, "num_hidden_layers": 1}, shards=2, seed=3)
    directory = write_shape(pathlib.Path(tempfile.mkdtemp()), shape)
    config = ModelConfig.from_directory(directory)
    tokens = prompt(shape)
    expected = None
    for count in (1, 2, 4):
        mesh = params.make_mesh(jax.devices()[:count])
        weights = checkpoint.load(directory, config, "float32", mesh)
        qkv = weights["layers"][0]["attention"]["qkv"]
        assert [shard.data.shape[0] for shard in qkv.addressable_shards] == [4 // count] * count
        # 138 tokens split over two devices and not over four, where each holds the whole matrix.
        rows = {shard.data.shape[0] for shard in weights["embedding"].addressable_shards}
        assert rows == {{1: 138, 2: 69, 4: 138}[count]}
        dense = np.asarray(generate.dense_logits(config, weights, tokens))
        made, paged = generate.paged_greedy(config, weights, tokens, 8, mesh=mesh)
        if expected is None:
            expected = dense, made, paged
        np.testing.assert_allclose(dense, expected[0], rtol=0, atol=2e-5)
        np.testing.assert_array_equal(made, expected[1])
        np.testing.assert_allclose(paged, expected[2], rtol=0, atol=2e-5)
        # Pages of int8, with another scale for each head. Sums in another order may round a number to its neighbor.
        scales = np.linspace(0.02, 0.1, 2 * 4, dtype=np.float32).reshape(1, 2, 4)
        quantized = generate.paged_greedy(config, weights, tokens, 8, mesh=mesh, scales=scales)
        if count == 1:
            quantized_of_one = quantized
        assert not np.array_equal(quantized[1], paged)
        np.testing.assert_array_equal(quantized[0], quantized_of_one[0])
        np.testing.assert_allclose(quantized[1], quantized_of_one[1], rtol=0, atol=0.05)
        if count == 2:  # layers that differ, with sinks and without rotation
            mixed = [params.random_params(MIXED, "float32", on, seed=1) for on in (params.make_mesh(), mesh)]
            parts = [np.asarray(generate.dense_logits(MIXED, mixed[0], tokens))]
            parts.append(generate.PagedSequence(MIXED, mixed[1], 16, "xla", mesh).extend(tokens, 16))
            np.testing.assert_allclose(*parts, rtol=0, atol=5e-5)
        if count == 4:
            checkpoint.save_orbax(weights, config, directory / "converted")
            wide = params.make_mesh(jax.devices()[2:])
            restored = checkpoint.load(directory / "converted", config, "float32", wide)
            assert restored["layers"][0]["mlp"]["down"].sharding.mesh == wide
            np.testing.assert_array_equal(restored["embedding"], weights["embedding"])
            one = params.random_params(config, "float32", params.make_mesh(), seed=5)
            four = params.random_params(config, "float32", mesh, seed=5)
            assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), one, four))
    print("agreed")
""")


@pytest.mark.slow(reason="compiles for one, two and four devices")
def test_two_and_four_devices_agree_with_one():
    root = pathlib.Path(__file__).parents[2]
    environment = {
        "PATH": "/usr/bin:/bin",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
        # What is compared lies above the machine code, so that LLVM need not optimize it: half of the time.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
    }
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["agreed"]


class FakeMesh:
    """Stands for a mesh of more devices than this process has."""

    def __init__(self, **shape):
        self.shape = shape


@pytest.mark.parametrize(
    ("fields", "mesh", "message"),
    [
        ({}, {"tensor": 4}, r"^mesh axis tensor has 4 devices; it must divide num_key_value_heads 2$"),
        (
            {"intermediate_size": 97},
            {"tensor": 2},
            r"^mesh axis tensor has 2 devices; it must divide intermediate_size 97$",
        ),
        ({}, {"data": 2}, r"^mesh axes are \('data',\); one of them must be 'tensor'$"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(fields, mesh, message):
    with pytest.raises(ValueError, match=message):
        params.check_mesh(ModelConfig.from_hf(BASE | fields), FakeMesh(**mesh))


@pytest.mark.parametrize("name", SHAPES)
def test_every_parameter_has_a_place_and_a_tensor(name):
    config = ModelConfig.from_hf(SHAPES[name].raw)
    abstract = dict(params.leaves(params.abstract_params(config, "bfloat16", params.make_mesh())))
    declared = params.parameters(config)
    assert abstract.keys() == declared.keys()
    sources = [source for parameter in declared.values() for source in parameter.sources]
    assert {source.tensor: source.shape for source in sources} == tensor_shapes(SHAPES[name].raw)
    for path, leaf in abstract.items():
        assert len(leaf.sharding.spec) == len(leaf.shape), path
