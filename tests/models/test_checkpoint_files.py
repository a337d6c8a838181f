"""What the files of a checkpoint say together: heads, dtype, context, architecture, contradictions."""

from __future__ import annotations

import builtins
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxserve.models import config, params
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.rope import RopeScaling, rope_frequencies
from jaxserve.models.loading import checkpoint
from jaxserve.models.loading.stored import EMBEDDING, HEAD, INDEX_FILE, SINGLE_FILE
from tests.models.checkpoints import BASE, random_tensors, write_safetensors
from tests.models.checkpoints import write_files as write


def load(directory: str) -> Any:
    return checkpoint.load(directory, ModelConfig.from_directory(directory), "float32", params.make_mesh())


# ---- heads


def tied_tensors() -> dict[str, np.ndarray]:
    return random_tensors(BASE | {"tie_word_embeddings": True}, 0)


def test_an_own_head_is_used_though_the_flag_says_tied(tmp_path, caplog):
    tensors = tied_tensors()
    tensors[HEAD] = tensors[EMBEDDING].copy()
    tensors[HEAD][-1, -1] += 1e-3  # only its last element
    directory = write(tmp_path, {"tie_word_embeddings": True}, tensors)
    assert ModelConfig.from_directory(directory).tie_word_embeddings is False
    assert "tie_word_embeddings is true, but lm_head.weight of" in caplog.text
    assert "the stored head is used" in caplog.text
    np.testing.assert_array_equal(load(directory)["head"], tensors[HEAD])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_head_equal_to_the_embedding_is_ignored(tmp_path, dtype, caplog):
    tensors = tied_tensors()
    tensors[EMBEDDING] = tensors[EMBEDDING].astype(np.float16).astype(np.float32)
    tensors[HEAD] = tensors[EMBEDDING].astype(dtype)
    directory = write(tmp_path, {"tie_word_embeddings": True}, tensors)
    assert "head" not in load(directory)
    assert not caplog.messages


def test_a_head_that_is_stored_alone_is_the_tied_embedding(tmp_path):
    tensors = tied_tensors()
    expected = tensors[EMBEDDING]
    tensors[HEAD] = tensors.pop(EMBEDDING)
    loaded = load(write(tmp_path, {"tie_word_embeddings": True}, tensors))
    assert "head" not in loaded
    np.testing.assert_array_equal(loaded["embedding"], expected)


@pytest.mark.parametrize("flag", [None, False])
def test_a_missing_head_is_refused_where_nothing_says_tied(tmp_path, flag):
    directory = write(tmp_path, {"tie_word_embeddings": flag}, tied_tensors())
    with pytest.raises(ValueError, match=r"^config.json does not say tie_word_embeddings, and .* no tensor lm_head"):
        load(directory)


def test_a_head_of_another_shape_or_dtype_is_named(tmp_path):
    tensors = tied_tensors()
    tensors[HEAD] = tensors[EMBEDDING][:-1]
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \[159, 64\]; config.json asks for \[160, 64\]"):
        load(write(tmp_path, {"tie_word_embeddings": True}, tensors))
    tensors[HEAD] = tensors[EMBEDDING].astype(np.int8)
    with pytest.raises(ValueError, match=r"tensor lm_head.weight has dtype I8"):
        load(write(tmp_path, {"tie_word_embeddings": True}, tensors))


def test_a_configuration_that_would_drop_a_head_is_refused_by_loading(tmp_path):
    tensors = random_tensors(BASE, 0)
    write(tmp_path, {"tie_word_embeddings": True}, tensors)
    believed = ModelConfig.from_hf(BASE | {"tie_word_embeddings": True})
    with pytest.raises(ValueError, match=r"tensor lm_head.weight differs from model.embed_tokens.weight"):
        checkpoint.load(tmp_path, believed, "float32", params.make_mesh())


def test_stored_rotary_frequencies_are_compared(tmp_path, caplog):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    tensors = random_tensors(BASE, 0)
    plain = rope_frequencies(16, 10000.0, RopeScaling())
    scaling = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    for fields, stored in (({}, plain), ({}, plain.astype(ml_dtypes.bfloat16)), (scaling, plain), (scaling, plain / 2)):
        tensors[name] = stored
        directory = write(tmp_path, fields, tensors)
        checkpoint.check(directory, ModelConfig.from_directory(directory))
    assert not caplog.messages
    for stored in (rope_frequencies(16, 1e6, RopeScaling()), plain[:4]):
        tensors[name] = stored
        directory = write(tmp_path, {}, tensors)
        caplog.clear()
        checkpoint.check(directory, ModelConfig.from_directory(directory))
        assert "holds 1 tensor (model.layers.1.self_attn.rotary_emb.inv_freq) with other rotary freq" in caplog.text


# ---- dtype


def stored_in(dtype: Any) -> dict[str, np.ndarray]:
    return {name: array.astype(dtype) for name, array in random_tensors(BASE, 0).items()}


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_without_a_dtype_the_weights_tell_it(tmp_path, stored, caplog):
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(stored, stored)
    for fields in ({"dtype": None}, {"dtype": "auto"}):
        assert ModelConfig.from_directory(write(tmp_path, fields, stored_in(kind))).dtype == stored
    assert not caplog.messages


def test_most_of_the_weights_decide(tmp_path):
    tensors = stored_in(ml_dtypes.bfloat16)
    tensors = {name: array.astype(np.float32) if "norm" in name else array for name, array in tensors.items()}
    assert ModelConfig.from_directory(write(tmp_path, {"dtype": None}, tensors)).dtype == "bfloat16"
    assert ModelConfig.from_directory(write(tmp_path, {"dtype": None}, stored_in(np.float64))).dtype == "float32"


def test_the_dtype_of_config_json_counts_and_a_line_says_where_weights_differ(tmp_path, caplog):
    directory = write(tmp_path, {"dtype": None, "torch_dtype": "torch.float32"}, stored_in(np.float16))
    assert ModelConfig.from_directory(directory).dtype == "float32"
    assert "config.json dtype is 'float32', but most weights" in caplog.text
    with pytest.raises(ValueError, match="dtype is 'bfloat16' and torch_dtype is 'float32'; they contradict"):
        ModelConfig.from_directory(write(tmp_path, {"dtype": "bfloat16", "torch_dtype": "float32"}))


# ---- context and rotary settings

LINEAR = {"type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({}, 256),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 1024),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}, 640),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1.0}}, 256),
        (
            {
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "original_max_position_embeddings": 32,
            },
            256,
        ),
        ({"max_sequence_length": 128}, 128),
        ({"max_sequence_length": 1024, "rope_scaling": {"type": "linear", "factor": 4.0}}, 1024),
        ({"max_sequence_length": 512, "rope_scaling": LINEAR}, 512),
        ({"max_sequence_length": 300, "seq_length": 2048, "rope_scaling": {"type": "linear", "factor": 3.0}}, 300),
        ({"max_seq_len": 128, "rope_scaling": LINEAR}, 512),
        ({"max_seq_len": 128, "n_positions": 400, "rope_scaling": LINEAR}, 400),
        ({"original_max_position_embeddings": 64, "rope_scaling": LINEAR}, 256),
        ({"rope_scaling": LINEAR | {"original_max_position_embeddings": 64}}, 256),
        ({"rope_scaling": LINEAR | {"original_max_position_embeddings": 256}}, 1024),
        ({"original_max_position_embeddings": 64, "max_seq_len": 100, "rope_scaling": LINEAR}, 100),
        ({"original_max_position_embeddings": 96, "rope_scaling": {"type": "linear", "factor": 2.6667}}, 256),
    ],
)
def test_the_context_is_what_all_keys_say(tmp_path, fields, context):
    found = ModelConfig.from_directory(write(tmp_path, fields))
    assert found.context_length == context
    assert ModelConfig.from_hf(json.loads(json.dumps(found.to_hf()))) == found


def test_a_line_says_what_a_nested_configuration_tells_otherwise(tmp_path, caplog):
    ModelConfig.from_directory(write(tmp_path, {"text_config": {"vocab_size": 160, "rope_theta": 1e4, "depth": 3}}))
    assert not caplog.messages
    nested = {"vocab_size": 300, "rope_scaling": LINEAR, "rms_norm_eps": None}
    found = ModelConfig.from_directory(write(tmp_path, {"text_config": nested}))
    assert (found.vocab_size, found.rope_scaling.kind) == (160, "default")
    assert len(caplog.messages) == 2
    assert "text_config has vocab_size 300, and 160 stands beside text_config; the latter counts" in caplog.text
    assert "text_config has rope_scaling {'type': 'linear', 'factor': 4.0}, and None stands beside" in caplog.text


def test_a_line_says_what_else_tells_the_context(tmp_path, caplog):
    ModelConfig.from_directory(write(tmp_path, tokenizer_config={"model_max_length": 1e30}))
    ModelConfig.from_directory(write(tmp_path, tokenizer_config={"model_max_length": 256}))
    assert not caplog.messages
    ModelConfig.from_directory(write(tmp_path, tokenizer_config={"model_max_length": 64}))
    assert "model_max_length (of tokenizer_config.json) 64; the context is 256 tokens" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, r"rope_theta is 10000.0, and 500000.0 among"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "llama3"}},
            r"rope_type is 'llama3' and type is 'linear'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"type": "linear", "factor": 4}},
            r"rope_scaling factor is 2 and rope_parameters factor is 4; they contradict",
        ),
        ({"rope_scaling": {"factor": 8.0}}, r"rope_scaling factor is 8.0; kind 'default' has none"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, r"has settings for 'full_attention' alone"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 1e300}},
            r"^model context \(max_position.* at most 2147",
        ),
        (
            {"original_max_position_embeddings": 128, "rope_scaling": LINEAR},
            r"original_max_position_embeddings is 128, max_position_embeddings 256 and the factor of .* 4.0; the sec",
        ),
        (
            {"original_max_position_embeddings": 64, "rope_scaling": LINEAR | {"original_max_position_embeddings": 32}},
            r"original_max_position_embeddings is 64, and 32 among the rotary settings; they contradict",
        ),
        (
            {"rope_scaling": LINEAR | {"original_max_position_embeddings": "64"}},
            r"^config.json original_max_position_embeddings is '64'; it must be a finite number",
        ),
        ({"rope_scaling": {"rope_type": "axial"}}, r"^rope_scaling kind is 'axial'; supported kinds"),
        ({"max_seq_len": "4k"}, r"^config.json max_seq_len is '4k'; it must be a whole number"),
        ({"rope_theta": float("inf")}, r"^model rope_theta is inf; it must be a finite number"),
        ({"rms_norm_eps": float("nan")}, r"^model rms_norm_eps is nan; it must be a finite number"),
        ({"rope_theta": 10**400}, r"^model rope_theta is 10{99}\.\.\.; it must be a finite number"),
        (
            {"hidden_size": 66, "num_attention_heads": 4},
            r"hidden_size is 66; without a head_dim it must be a",
        ),
        ({"num_hidden_layers": 10**9}, r"^config.json num_hidden_layers is 1000000000; it must be at most 1024$"),
        ({"vocab_size": 10**30}, r"^config.json vocab_size is 10{30}; it must be at most 2147483647$"),
        ({"head_dim": 10**9}, r"^model head_dim is 1000000000; it must be at most 65536$"),
        ({"intermediate_size": 96.0}, r"^config.json intermediate_size is 96.0; it must be a whole number"),
        ({"num_key_value_heads": True}, r"^model num_key_value_heads is True; it must be a whole number"),
        (
            {"compression_config": {"quant_method": "compressed-tensors", "config_groups": {"a": 1}}},
            r"^config.json quantization_config config_groups a is 1; it must be an object$",
        ),
    ],
)
def test_fault_37_settings_that_contradict_or_cannot_be_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_directory(write(tmp_path, fields))


# ---- the architecture first


NOTHING = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "rms_norm_eps"))


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["FalconForCausalLM"], **NOTHING},
        {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"hidden_size": 8}, **NOTHING},
        {"architectures": ["DeepseekV3ForCausalLM"], "hidden_act": "gelu", "quantization_config": {"bits": 4}},
        {"architectures": ["GemmaForCausalLM"], "rope_scaling": {"type": "yarn"}, "eos_token_id": 10**6},
        {"architectures": None, "model_type": "bloom", **NOTHING},
        {"architectures": [], **NOTHING},
        {"architectures": ["LlamaForCausalLM", "BloomForCausalLM"]},
        {"architectures": "BloomForCausalLM"},
        {"architectures": [None]},
    ],
)
def test_an_architecture_that_is_not_known_is_named_before_anything_else(tmp_path, fields):
    directory = write(tmp_path, fields)
    for read in (ModelConfig.from_directory, config.check_config_file):
        with pytest.raises(ValueError, match=r"known architectures are .*, LlamaForCausalLM") as refused:
            read(directory)
        for name in fields["architectures"] or [str(fields.get("model_type", "[]"))]:
            assert str(name) in str(refused.value)


def test_the_architecture_of_a_directory_without_config_json_is_not_asked_for(tmp_path):
    config.check_config_file(tmp_path)


def test_settings_of_other_architectures_are_told(tmp_path, caplog):
    ModelConfig.from_directory(
        write(tmp_path, {"sliding_window": 4096, "use_sliding_window": False, "logit_scale": 1.0})
    )
    assert not caplog.messages
    ModelConfig.from_directory(
        write(tmp_path, {"sliding_window": 4096, "logits_scaling": 8.0, "model_type": "mistral"})
    )
    assert "config.json has logits_scaling, sliding_window, which LlamaForCausalLM does not know" in caplog.text
    assert "config.json model_type is 'mistral'; the architecture LlamaForCausalLM counts" in caplog.text


# ---- files


def test_json_that_contradicts_itself_or_cannot_be_read_is_named(tmp_path, monkeypatch):
    file = pathlib.Path(write(tmp_path)) / "config.json"
    sound = file.read_text()
    file.write_text(sound[:-1] + ', "vocab_size": 161}')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON: key 'vocab_size' stands in it twice"):
        ModelConfig.from_directory(tmp_path)
    file.write_text(sound[:-1] + ', "vocab_size": 160}')
    assert ModelConfig.from_directory(tmp_path).vocab_size == 160
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config.json is not valid JSON: it is nested too deeply"):
        ModelConfig.from_directory(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "read_bytes", refuse)
        with pytest.raises(ValueError, match=r"^model file .*config.json cannot be read: Permission denied$"):
            ModelConfig.from_directory(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=r"^model file .*config.json is no regular file$"):
        ModelConfig.from_directory(tmp_path)


def edit_header(path: pathlib.Path, change: Any) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    text = (changed if isinstance(changed, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def test_fault_37_headers_that_contradict_themselves_are_refused(tmp_path, monkeypatch):
    def refused(change: Any) -> str:
        directory = write(tmp_path, {}, random_tensors(BASE, 0))
        edit_header(tmp_path / SINGLE_FILE, change)
        with pytest.raises(ValueError, match=r"^checkpoint file .*model.safetensors is not safetensors: ") as caught:
            ModelConfig.from_directory(directory)
        return str(caught.value)

    norms = [f"model.layers.{number}.input_layernorm.weight" for number in range(2)]
    same = refused(lambda header: header[norms[1]].update(data_offsets=header[norms[0]]["data_offsets"]))
    assert same.endswith(f"tensors {norms[0]} and {norms[1]} overlap")
    end = refused(lambda header: header["model.norm.weight"].update(data_offsets=[512, 256]))
    assert end.endswith("malformed header of tensor model.norm.weight")
    truth = refused(lambda header: header["model.norm.weight"].update(shape=[True, 64]))
    assert truth.endswith("malformed header of tensor model.norm.weight")
    twice = refused(lambda header: json.dumps(header)[:-1] + ', "model.norm.weight": {}}')
    assert "key 'model.norm.weight' stands in it twice" in twice

    directory = write(tmp_path, {}, random_tensors(BASE, 0))

    def unreadable(path: pathlib.Path, *arguments: Any, **options: Any) -> Any:
        if path.name == SINGLE_FILE:
            raise PermissionError(13, "Permission denied")
        return builtins.open(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "open", unreadable)
    with pytest.raises(ValueError, match=r"^checkpoint file .*model.safetensors cannot be read: Permission denied$"):
        ModelConfig.from_directory(directory)


@pytest.mark.parametrize("layers", [1, 3, 1000])
def test_layers_that_are_too_few_or_too_many_are_counted(tmp_path, layers):
    directory = write(tmp_path, {"num_hidden_layers": layers}, random_tensors(BASE, 0))
    found = ModelConfig.from_directory(directory)
    with pytest.raises(ValueError, match=f"num_hidden_layers is {layers}"):
        checkpoint.check(directory, found)


def sharded(directory: pathlib.Path, fields: dict[str, Any], listed: dict[str, str], drop: tuple[str, ...] = ()) -> str:
    """Two shards and an index that lists more, or less."""
    write(directory, fields)
    tensors = {name: array for name, array in random_tensors(BASE, 0).items() if name not in drop}
    names = list(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        write_safetensors(directory / shard, {name: tensors[name] for name in held})
    weight_map = {name: shard for shard, held in shards.items() for name in held} | listed
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return str(directory)


BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize(
    ("fields", "listed", "drop"),
    [
        ({"tie_word_embeddings": True}, {HEAD: "a.safetensors"}, (HEAD,)),
        ({}, {BUFFER: "b.safetensors", "vision_tower.x": "a.safetensors"}, ()),
        ({}, {BUFFER: "missing.safetensors"}, ()),
        ({}, {"model.layers.0.self_attn.k_scale": "torn.safetensors"}, ()),
    ],
)
def test_what_an_index_says_of_unneeded_tensors_does_not_matter(tmp_path, fields, listed, drop):
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    directory = sharded(tmp_path, fields, listed, drop)
    found = ModelConfig.from_directory(directory)
    checkpoint.check(directory, found)
    checkpoint.read_ahead(directory, found)
    load(directory)


@pytest.mark.parametrize(
    ("fields", "listed", "drop", "message"),
    [
        (
            {},
            {"model.norm.weight": "missing.safetensors"},
            (),
            r"missing.safetensors is missing; .* lists it$",
        ),
        ({}, {EMBEDDING: "torn.safetensors"}, (), r"torn.safetensors is truncated: 4 bytes are no safetensors header$"),
        (
            {},
            {"model.norm.weight": "a.safetensors"},
            ("model.norm.weight",),
            r"has no tensor model.norm.weight",
        ),
        # It may differ from the embedding: nobody can tell.
        ({"tie_word_embeddings": True}, {HEAD: "missing.safetensors"}, (HEAD,), r"missing.safetensors is missing;"),
    ],
)
def test_what_an_index_says_of_needed_tensors_is_refused_where_it_is_not_so(tmp_path, fields, listed, drop, message):
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    directory = sharded(tmp_path, fields, listed, drop)
    with pytest.raises(ValueError, match=message):
        checkpoint.check(directory, ModelConfig.from_directory(directory))


def test_a_single_file_beside_an_index_is_read_and_told(tmp_path, caplog):
    directory = sharded(tmp_path, {}, {"model.norm.weight": "missing.safetensors"})
    write_safetensors(tmp_path / SINGLE_FILE, random_tensors(BASE, 0))
    checkpoint.check(directory, ModelConfig.from_directory(directory))
    assert "holds model.safetensors and model.safetensors.index.json; only the former is read" in caplog.text


def test_what_orbax_saved_is_checked_too(tmp_path):
    directory = write(tmp_path / "hf", {}, random_tensors(BASE, 0))
    found = ModelConfig.from_directory(directory)
    checkpoint.save_orbax(load(directory), found, tmp_path / "orbax")
    checkpoint.check(tmp_path / "orbax", ModelConfig.from_directory(tmp_path / "orbax"))
    wide = ModelConfig.from_hf(BASE | {"intermediate_size": 100})
    with pytest.raises(ValueError, match=r"parameter layers.0.mlp.down has shape \[64, 96\]; expected \[64, 100\]$"):
        checkpoint.check(tmp_path / "orbax", wide)


def test_checking_reads_no_weights(tmp_path, monkeypatch):
    directory = write(tmp_path, {"tie_word_embeddings": True}, tied_tensors())
    found = ModelConfig.from_directory(directory)

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("jaxserve.models.loading.safetensors_file.StoredTensor.view", refuse)
    monkeypatch.setattr(jax, "device_put", refuse)
    checkpoint.check(directory, found)


def test_reading_a_configuration_needs_no_jax(tmp_path):
    directory = write(tmp_path, {"tie_word_embeddings": True}, random_tensors(BASE, 0))
    code = (
        "import sys; from jaxserve.models.config import ModelConfig; "
        f"print(ModelConfig.from_directory({directory!r}).tie_word_embeddings, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
