"""Loading: layouts, dtypes, orbax, and every message a broken checkpoint gets."""

import contextlib
import json
import pathlib
import re
import shutil
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import checkpoint
from jaxserve.models.loading.safetensors_file import read_header
from tests.models.checkpoints import (
    BASE,
    SHAPES,
    random_tensors,
    write_checkpoint,
    write_safetensors,
    write_shape,
)
from tests.models.scripts import run_script

SINGLE, SHARDED = SHAPES["mlp_bias"], SHAPES["attention_bias"]


def load(directory, dtype="float32"):
    return checkpoint.load(directory, ModelConfig.from_directory(directory), dtype, params.make_mesh())


def equal(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), left, right))


@pytest.fixture
def single(tmp_path):
    return write_shape(tmp_path / "single", SINGLE)


@pytest.fixture
def sharded(tmp_path):
    return write_shape(tmp_path / "sharded", SHARDED)


# ---- what is loaded


def test_fused_parameters_hold_each_head_and_each_half_where_the_dot_wants_it(tmp_path):
    shape = SHAPES["everything"]
    tensors = random_tensors(shape.raw, shape.seed)
    directory = write_shape(tmp_path / "model", shape)
    config, weights = ModelConfig.from_directory(directory), load(directory)
    attention, mlp, group, dim = weights["layers"][1]["attention"], weights["layers"][1]["mlp"], config.group_size, 16
    prefix = "model.layers.1."
    for head in range(config.num_attention_heads):
        rows = slice(head * dim, (head + 1) * dim)
        place = (head // group, head % group)
        np.testing.assert_array_equal(attention["qkv"][place], tensors[prefix + "self_attn.q_proj.weight"][rows])
        np.testing.assert_array_equal(attention["qkv_bias"][place], tensors[prefix + "self_attn.q_proj.bias"][rows])
        taken = tensors[prefix + "self_attn.o_proj.weight"][:, rows]
        np.testing.assert_array_equal(attention["out"][:, head // group, head % group], taken)
    for head in range(config.num_key_value_heads):
        rows = slice(head * dim, (head + 1) * dim)
        for offset, name in ((group, "k_proj"), (group + 1, "v_proj")):
            stored = tensors[f"{prefix}self_attn.{name}.weight"][rows]
            np.testing.assert_array_equal(attention["qkv"][head, offset], stored)
            stored = tensors[f"{prefix}self_attn.{name}.bias"][rows]
            np.testing.assert_array_equal(attention["qkv_bias"][head, offset], stored)
    np.testing.assert_array_equal(mlp["gate_up"][0], tensors[prefix + "mlp.gate_proj.weight"])
    np.testing.assert_array_equal(mlp["gate_up_bias"][1], tensors[prefix + "mlp.up_proj.bias"])
    assert "head" not in weights


def test_single_and_sharded_files_give_the_same_parameters(tmp_path):
    tensors = random_tensors(SINGLE.raw, 0)
    one = load(write_checkpoint(tmp_path / "one", SINGLE.raw, tensors))
    assert equal(one, load(write_checkpoint(tmp_path / "many", SINGLE.raw, tensors, shards=5)))
    assert not equal(one, load(write_checkpoint(tmp_path / "other", SINGLE.raw, random_tensors(SINGLE.raw, 1))))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_the_file_dtype_is_converted_to_the_asked_one(tmp_path, stored, target):
    tensors = random_tensors(BASE, 0)
    directory = write_checkpoint(tmp_path / "model", BASE, tensors, dtype=stored)
    weights = load(directory, target)
    dtypes = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    expected = tensors["model.layers.0.mlp.up_proj.weight"].astype(dtypes[stored]).astype(dtypes[target])
    assert all(leaf.dtype == target for leaf in jax.tree.leaves(weights))
    np.testing.assert_array_equal(np.asarray(weights["layers"][0]["mlp"]["gate_up"][1]), expected)


def test_files_written_by_the_safetensors_package_are_read(tmp_path):
    directory = write_checkpoint(tmp_path / "model", BASE, random_tensors(BASE, 0))
    expected = load(directory)
    tensors = random_tensors(BASE, 0)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert equal(expected, load(directory))
    assert {name: found.shape for name, found in read_header(directory / "model.safetensors").items()} == {
        name: array.shape for name, array in tensors.items()
    }


def test_known_buffers_and_the_duplicate_of_a_tied_embedding_are_ignored(tmp_path):
    raw = BASE | {"tie_word_embeddings": True}
    tensors = random_tensors(raw, 0)
    expected = load(write_checkpoint(tmp_path / "plain", raw, tensors))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    assert equal(expected, load(write_checkpoint(tmp_path / "extra", raw, tensors)))


def test_loaded_parameters_are_the_abstract_ones_filled(single):
    config = ModelConfig.from_directory(single)
    mesh = params.make_mesh()

    def describe(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)

    abstract = describe(params.abstract_params(config, "bfloat16", mesh))
    assert abstract == describe(load(single, "bfloat16"))
    assert abstract == describe(params.random_params(config, "bfloat16", mesh, seed=0))


# ---- orbax


@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_orbax_restores_what_was_converted(tmp_path, sharded, target):
    config, weights = ModelConfig.from_directory(sharded), load(sharded)
    checkpoint.save_orbax(weights, config, tmp_path / "converted")
    restored_config = ModelConfig.from_directory(tmp_path / "converted")
    assert restored_config == config
    restored = load(tmp_path / "converted", target)
    assert equal(restored, jax.tree.map(lambda leaf: leaf.astype(target), weights))
    abstract = params.abstract_params(config, target, params.make_mesh())
    assert jax.tree.structure(restored) == jax.tree.structure(abstract)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, abstract))


def test_orbax_errors(tmp_path, sharded):
    config, weights, mesh = ModelConfig.from_directory(sharded), load(sharded), params.make_mesh()
    saved = tmp_path / "converted"
    checkpoint.save_orbax(weights, config, saved)
    raw = config.to_hf()
    with pytest.raises(ValueError, match=r"^checkpoint .* holds weights already; choose another directory$"):
        checkpoint.save_orbax(weights, config, saved)
    with pytest.raises(ValueError, match=r"^checkpoint .* holds weights already; choose another directory$"):
        checkpoint.save_orbax(weights, config, sharded)
    with pytest.raises(ValueError, match=r"^checkpoint folder .*/orbax is missing$"):
        checkpoint.restore_orbax(sharded, config, "float32", mesh)
    deeper = ModelConfig.from_hf(raw | {"num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"cannot be read: parameter layers\.2\.attention\.out is not in it$"):
        checkpoint.load(saved, deeper, "float32", mesh)
    shallow = ModelConfig.from_hf(raw | {"num_hidden_layers": 1})
    with pytest.raises(ValueError, match=r"cannot be read: it holds 8 tensors \(layers\.1.*\) that the model does not"):
        checkpoint.load(saved, shallow, "float32", mesh)
    wide = ModelConfig.from_hf(raw | {"vocab_size": 161})
    with pytest.raises(ValueError, match=r"parameter embedding has shape \[160, 64\]; expected \[161, 64\]$"):
        checkpoint.load(saved, wide, "float32", mesh)
    shutil.copy(write_shape(tmp_path / "other", SINGLE) / "model.safetensors", saved)
    with pytest.raises(ValueError, match=r"holds safetensors and orbax/; only one may stay$"):
        checkpoint.load(saved, config, "float32", mesh)
    (tmp_path / "empty" / "orbax").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^checkpoint folder .*/empty/orbax cannot be read: it is no orbax"):
        checkpoint.load(tmp_path / "empty", config, "float32", mesh)


RESTORE = textwrap.dedent("""
    import sys
    from jaxserve.models import params
    from jaxserve.models.loading import checkpoint
    from jaxserve.models.config import ModelConfig

    config = ModelConfig.from_directory(sys.argv[1])
    try:
        checkpoint.load(sys.argv[1], config, "float32", params.make_mesh())
    except ValueError as error:
        print(error)
""")


def test_damaged_orbax_data_is_an_error_of_one_line(tmp_path, sharded):
    config = ModelConfig.from_directory(sharded)
    checkpoint.save_orbax(load(sharded), config, tmp_path / "converted")
    assert run_script(RESTORE, tmp_path / "converted") == ""
    for file in (tmp_path / "converted" / "orbax").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    # In a process of its own: after the first failed read orbax closes its event loop under the others, whose threads
    # then complain at some later time.
    printed = run_script(RESTORE, tmp_path / "converted")
    assert re.fullmatch(r"checkpoint folder \S*/orbax cannot be read: [^\n]+\n", printed)


# ---- broken checkpoints


def rewrite_header(path: pathlib.Path, change) -> None:
    """Lets `change` edit the header of a safetensors file; the data stay."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def edit_config(**fields):
    def edit(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def edit_tensors(change):
    """Rewrites the single file with the tensors that `change` has edited."""

    def edit(directory):
        tensors = random_tensors(SINGLE.raw, SINGLE.seed)
        change(tensors)
        write_safetensors(directory / "model.safetensors", tensors)

    return edit


def edit_file(change):
    def edit(directory):
        path = directory / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


def edit_header(change):
    return lambda directory: rewrite_header(directory / "model.safetensors", change)


UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"

SINGLE_FAULTS = {
    "directory": (shutil.rmtree, r"^model is '.*single'; there is no such directory$"),
    "config missing": (lambda d: (d / "config.json").unlink(), r"^model file .*single/config.json is missing$"),
    "config not json": (lambda d: (d / "config.json").write_text("{"), r"config.json is not valid JSON: Expecting .*$"),
    "config a list": (
        lambda d: (d / "config.json").write_text("[]"),
        r"config.json holds a list; it must hold an object$",
    ),
    "config empty": (
        lambda d: (d / "config.json").write_text("{}"),
        r"^config.json architectures is \[\]; exactly one",
    ),
    "architecture": (
        edit_config(architectures=["FalconForCausalLM"]),
        r"^model architecture is 'FalconForCausalLM'; .*known architectures are .*LlamaForCausalLM",
    ),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        r"^checkpoint .*single has neither model.safetensors nor model.safetensors.index.json$",
    ),
    "empty file": (edit_file(lambda b: b""), r"model.safetensors is truncated: 0 bytes are no safetensors header$"),
    "cut in the header": (edit_file(lambda b: b[:100]), r"is truncated: 100 bytes, its header needs \d+$"),
    "cut in the data": (edit_file(lambda b: b[:-1]), r"is truncated: \d+ bytes, tensor lm_head.weight ends at \d+$"),
    "another format": (
        edit_file(lambda b: b"PK\x03\x04" + b"\xff" * 99),
        r"not safetensors: its header would be \d+ bytes",
    ),
    "header not json": (edit_file(lambda b: b[:8] + b"!" + b[9:]), r"not safetensors: header is not JSON: .*$"),
    "header a list": (edit_file(lambda b: b"\2" + bytes(7) + b"[]"), r"not safetensors: its header is not an object$"),
    "entry malformed": (
        edit_header(lambda h: h[UP].pop("shape")),
        rf"model.safetensors is not safetensors: malformed header of tensor {UP}$",
    ),
    "entry of wrong types": (edit_header(lambda h: h[UP].update(shape=[1.5])), rf"malformed header of tensor {UP}$"),
    "bytes and shape": (
        edit_header(lambda h: h[UP].update(shape=[96, 63])),
        rf"tensor {UP} has 24576 bytes, which dtype F32 and shape \[96, 63\] do not fill$",
    ),
    "missing tensor": (
        edit_tensors(lambda t: t.pop(UP)),
        rf"^checkpoint .*single has no tensor {UP}, which layers.1.mlp.gate_up needs$",
    ),
    "shape": (
        edit_tensors(lambda t: t.update({UP: t[UP][:-1]})),
        rf"^checkpoint file .*model.safetensors: tensor {UP} has shape \[95, 64\]; config.json asks for \[96, 64\]$",
    ),
    "transposed": (
        edit_tensors(lambda t: t.update({UP: t[UP].T})),
        rf"tensor {UP} has shape \[64, 96\]; config.json asks for \[96, 64\]$",
    ),
    "dtype": (
        edit_tensors(lambda t: t.update({NORM: t[NORM].astype(np.int8)})),
        rf"^checkpoint file .*: tensor {NORM} has dtype I8; supported dtypes are F64, F32, F16, BF16$",
    ),
    "unused": (
        edit_tensors(lambda t: t.update({"a.b": t[NORM], "c": t[NORM]})),
        r"^checkpoint .*single holds 2 tensors \(a.b, c\) that LlamaForCausalLM does not use as configured$",
    ),
    "bias that config.json denies": (edit_config(mlp_bias=False), r"holds 6 tensors \(model.layers.0.*, \.\.\.\) that"),
    "head of a model said to be untied": (
        edit_tensors(lambda t: t.pop("lm_head.weight")),
        r"has no tensor lm_head.weight, which head needs$",
    ),
}


@pytest.mark.parametrize("fault", SINGLE_FAULTS)
def test_fault_25_a_broken_checkpoint_gets_one_clear_line(single, fault):
    load(single)  # sound before
    damage, message = SINGLE_FAULTS[fault]
    damage(single)
    with pytest.raises(ValueError, match=message) as caught:
        load(single)
    assert "\n" not in str(caught.value)


def edit_index(change):
    def edit(directory):
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return edit


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

SHARDED_FAULTS = {
    "shard missing": (
        lambda d: (d / SECOND).unlink(),
        rf"^checkpoint file .*{SECOND} is missing; model.safetensors.index.json lists it$",
    ),
    "index not json": (
        lambda d: (d / "model.safetensors.index.json").write_text("["),
        r"index.json is invalid: it needs a weight_map of tensor to file$",
    ),
    "index without map": (edit_index(lambda i: i.pop("weight_map")), r"is invalid: it needs a weight_map of tensor"),
    "shard outside": (
        edit_index(lambda i: i["weight_map"].update({NORM: "../x.safetensors"})),
        r"is invalid: '../x.safetensors' is no name of a file beside it$",
    ),
    "wrong shard": (
        edit_index(lambda i: i["weight_map"].update({"model.embed_tokens.weight": SECOND})),
        rf"{SECOND} has no tensor model.embed_tokens.weight; model.safetensors.index.json says it does$",
    ),
    "tensor twice": (
        lambda d: shutil.copy(d / FIRST, d / SECOND),
        rf"^checkpoint files .*{FIRST} and .*{SECOND} both hold tensor \S+$",
    ),
    "shard cut": (
        lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-4]),
        rf"{SECOND} is truncated: \d+ bytes, tensor \S+ ends at \d+$",
    ),
}


@pytest.mark.parametrize("fault", SHARDED_FAULTS)
def test_a_broken_sharded_checkpoint_gets_one_clear_line(sharded, fault):
    load(sharded)
    damage, message = SHARDED_FAULTS[fault]
    damage(sharded)
    with pytest.raises(ValueError, match=message) as caught:
        load(sharded)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float64", "int8", "fp8", None])
def test_an_unsupported_target_dtype_is_named(single, dtype):
    with pytest.raises(ValueError, match=r"^model dtype is .*; supported dtypes are float32, bfloat16, float16$"):
        load(single, dtype)


# ---- reading ahead


def outcome(function, *arguments):
    """The message of the ValueError that a call ends with; None where it returns."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return None


def read_outcomes(directory, config):
    """What `read_ahead` and `load` say of a directory with the configuration in it, or with `config` if it has none."""
    with contextlib.suppress(ValueError):
        config = ModelConfig.from_directory(directory)
    read = outcome(checkpoint.read_ahead, directory, config)
    return read, outcome(checkpoint.load, directory, config, "float32", params.make_mesh())


@pytest.mark.parametrize("shape", [SINGLE, SHARDED], ids=["single", "sharded"])
def test_sound_checkpoints_are_read_ahead(tmp_path, shape):
    directory = write_shape(tmp_path / "sound", shape)
    config = ModelConfig.from_directory(directory)
    assert read_outcomes(directory, config) == (None, None)
    checkpoint.save_orbax(load(directory), config, tmp_path / "converted")
    assert read_outcomes(tmp_path / "converted", config) == (None, None)


@pytest.mark.parametrize("fault", SINGLE_FAULTS)
def test_reading_a_broken_checkpoint_ahead_says_what_loading_says(single, fault):
    compare_outcomes(single, *SINGLE_FAULTS[fault])


@pytest.mark.parametrize("fault", SHARDED_FAULTS)
def test_reading_a_broken_sharded_checkpoint_ahead_says_what_loading_says(sharded, fault):
    compare_outcomes(sharded, *SHARDED_FAULTS[fault])


def compare_outcomes(directory, damage, message):
    config = ModelConfig.from_directory(directory)
    damage(directory)
    read, loaded = read_outcomes(directory, config)
    assert read == loaded
    if loaded is None:  # the weights are sound: it is the configuration that is not
        assert re.search(message, outcome(ModelConfig.from_directory, directory) or "")
    else:
        assert re.search(message, loaded)
        assert "\n" not in loaded


def test_both_kinds_of_weights_in_a_directory_are_refused_before_reading(tmp_path, single):
    config = ModelConfig.from_directory(single)
    checkpoint.save_orbax(load(single), config, tmp_path / "both")
    shutil.copy(single / "model.safetensors", tmp_path / "both")
    read, loaded = read_outcomes(tmp_path / "both", config)
    assert read == loaded
    assert str(read).endswith("holds safetensors and orbax/; only one may stay")
