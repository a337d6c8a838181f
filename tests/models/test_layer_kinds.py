"""Layers that differ from each other, against a decoder written out in numpy."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.layer_specs import LayerSpec, MLPSpec, SelfAttentionSpec
from jaxserve.models.layers.parameter import Source
from jaxserve.pallas_kernels.paged_attention import api
from jaxserve.planning.model_cost import ModelCost
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs import step_programs as programs
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from tests.models import generate
from tests.models.checkpoints import BASE
from tests.runner.drive import drive

PLAIN = ModelConfig.from_hf(BASE | {"num_hidden_layers": 4})
LAYERS = tuple(
    LayerSpec(SelfAttentionSpec(**attention), MLPSpec(wide))
    for attention, wide in (
        ({"sliding_window": 5}, 96),
        ({"soft_cap": 2.0, "qk_norm": True, "qkv_bias": True}, 64),
        ({"sliding_window": 9, "sinks": True, "out_bias": True}, 96),
        ({"rotation": False, "scale": 0.4}, 32),
    )
)
MIXED = dataclasses.replace(PLAIN, layers=LAYERS, sliding_window=9)
TOKENS = np.random.RandomState(3).randint(0, BASE["vocab_size"], 40).astype(np.int32)


def normed(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + MIXED.rms_norm_eps) * scale


def turned(x, positions):
    """x [T, heads, D] rotated by its position."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] / 10000.0 ** (np.arange(half) / half)
    low, high = x[..., :half], x[..., half:]
    return np.concatenate(
        [low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], axis=-1
    )


def attended(spec, weights, x):
    """Attention of one layer over x [T, H], head by head and query by query."""
    positions = np.arange(len(x))
    qkv = np.einsum("th,kgdh->tkgd", x, weights["qkv"])
    if spec.qkv_bias:
        qkv = qkv + weights["qkv_bias"]
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    if spec.qk_norm:
        q, k = normed(q, weights["q_norm"]["scale"]), normed(k, weights["k_norm"]["scale"])
    if spec.rotation:
        q, k = turned(q.reshape(len(x), -1, q.shape[-1]), positions).reshape(q.shape), turned(k, positions)
    out = np.zeros(q.shape)
    for token, head, member in np.ndindex(q.shape[:3]):
        first = 0 if spec.sliding_window is None else max(0, token + 1 - spec.sliding_window)
        score = k[first : token + 1, head] @ q[token, head, member] * (spec.scale or q.shape[-1] ** -0.5)
        if spec.soft_cap:
            score = spec.soft_cap * np.tanh(score / spec.soft_cap)
        weight = np.exp(score)
        total = weight.sum() + (np.exp(weights["sinks"][head, member]) if spec.sinks else 0)
        out[token, head, member] = weight / total @ v[first : token + 1, head]
    y = np.einsum("tkgd,hkgd->th", out, weights["out"])
    return y + weights["out_bias"] if spec.out_bias else y


def by_hand(weights, tokens):
    """float64 logits [T, V]."""
    x = weights["embedding"][tokens]
    for number, spec in enumerate(MIXED.layer_specs):
        layer = weights["layers"][number]
        x = x + attended(spec.attention, layer["attention"], normed(x, layer["attention_norm"]["scale"]))
        gate, up = np.einsum("th,nih->nti", normed(x, layer["mlp_norm"]["scale"]), layer["mlp"]["gate_up"])
        x = x + gate / (1 + np.exp(-gate)) * up @ layer["mlp"]["down"].T
    return normed(x, weights["norm"]["scale"]) @ weights["head"].T


@pytest.fixture(scope="module")
def weights():
    drawn = params.random_params(MIXED, "float32", params.make_mesh(), seed=2)
    for number, path in enumerate(path for path, leaf in params.leaves(drawn) if path[-1] == "scale"):
        leaf = params.get(drawn, path)
        params.put(drawn, path, leaf + 0.2 * np.random.RandomState(number).standard_normal(leaf.shape).astype("f"))
    return drawn


@pytest.fixture(scope="module")
def expected(weights):
    wide = {}
    for path, leaf in params.leaves(weights):
        params.put(wide, path, np.asarray(leaf, np.float64))
    return by_hand(wide, TOKENS)


def test_dense_attention_computes_each_layer_as_its_spec_says(weights, expected):
    logits = generate.dense_logits(MIXED, weights, jnp.asarray(TOKENS))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_pages_compute_each_layer_as_its_spec_says(weights, expected):
    sequence = generate.PagedSequence(MIXED, weights, len(TOKENS), "xla")
    paged = np.concatenate([sequence.extend(part, 16) for part in np.split(TOKENS, [13, 29, 38, 39])])
    np.testing.assert_allclose(paged, expected, rtol=0, atol=1e-4)


def test_an_engine_serves_layers_whose_windows_alternate(monkeypatch):
    """Where steps of decodes have programs of their own; tests/models/test_families.py has the others."""
    patched = {"xla": dataclasses.replace(api.IMPLEMENTATIONS["xla"], decode_programs=True)}
    for module in (api, programs):
        monkeypatch.setattr(module, "IMPLEMENTATIONS", {**api.IMPLEMENTATIONS, **patched})
    model = dataclasses.replace(
        ModelConfig("LlamaForCausalLM", 96, 32, 48, 2, 2, 1, 16, 256),
        layers=tuple(LayerSpec(SelfAttentionSpec(sliding_window=window), MLPSpec(48)) for window in (6, None)),
        sliding_window=6,
    )
    config = EngineConfig(
        architecture=model,
        load_format="dummy",
        attention="xla",
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16),
        cache=CacheConfig(num_pages=16),
        token_buckets=(16,),
        row_buckets=(8,),
        max_model_len=64,
        seed=1,
    )
    prompts = [tuple(np.random.RandomState(number).randint(0, 96, 20 + number).tolist()) for number in range(2)]
    requests = [EngineRequest(f"r{number}", prompt, max_tokens=12) for number, prompt in enumerate(prompts)]
    drawn = params.random_params(model, "float32", params.make_mesh(), config.seed)
    assert "decode" in {key.kind for key in programs.program_keys(resolve_shapes(config, "cpu"))}
    for prompt, tokens in zip(prompts, drive(ModelRunner(config), config, requests).tokens, strict=True):
        greedy = generate.dense_greedy(model, drawn, jnp.asarray(prompt, jnp.int32), 12)
        assert list(tokens) == np.asarray(greedy)[len(prompt) :].tolist()


def test_layers_that_follow_from_the_fields_are_not_kept():
    assert dataclasses.replace(PLAIN, layers=PLAIN.layer_specs) == PLAIN
    assert len(dataclasses.replace(PLAIN, num_hidden_layers=2).layer_specs) == 2
    assert dataclasses.replace(PLAIN, attention_bias=True).layer_specs[3].attention.out_bias
    assert hash(MIXED) != hash(PLAIN)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 3}, r"^model num_hidden_layers is 3; its layers have 4$"),
        ({"attention_bias": True}, r"^model attention_bias is True; its layers have False$"),
        ({"sliding_window": None}, r"^model sliding_window is None; its layers have 9$"),
        ({"layers": None}, r"^model sliding_window is 9; LlamaForCausalLM makes layers with None$"),
    ],
)
def test_fields_that_contradict_the_layers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MIXED, **fields)


def test_layers_that_no_key_describes_are_written_whole_and_read_back():
    assert ModelConfig.from_hf(json.loads(json.dumps(MIXED.to_hf()))) == MIXED
    assert "jaxserve_config" not in PLAIN.to_hf()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfAttentionSpec(sliding_window=0), r"^layer sliding_window is 0; it must be a whole number of at l"),
        (lambda: SelfAttentionSpec(soft_cap=-1.0), r"^layer soft_cap is -1.0; it must be a finite number above 0$"),
        (lambda: SelfAttentionSpec(scale=float("nan")), r"^layer scale is nan; it must be finite$"),
        (lambda: MLPSpec(8, kind="experts"), r"^layer MLP kind is 'experts'; it must be one of swiglu$"),
        (lambda: LayerSpec(SelfAttentionSpec(), MLPSpec(8), norm="layer"), r"^layer norm is 'layer'; it must be"),
        (
            lambda: LayerSpec(SelfAttentionSpec(), MLPSpec(8), norm_place="after"),
            r"^layer norm_place is 'after'; it",
        ),
    ],
)
def test_what_cannot_be_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_costs_count_the_parameters_of_every_layer():
    sizes = [leaf.size for _, leaf in params.leaves(params.abstract_params(MIXED, "float32", params.make_mesh()))]
    assert ModelCost.of(MIXED, "float32", "float32").weight_bytes == 4 * sum(sizes)


def test_a_source_may_be_a_part_of_a_tensor_and_transposed():
    tensor = np.arange(24).reshape(6, 4)
    parameter = np.zeros((2, 3, 4), int)
    for source in (
        Source("fused", (6, 4), 0, 1, 2, rows=(3, 6)),  # the second half of a fused tensor
        Source("turned", (4, 6), 0, 0, 1, rows=None, transposed=True),
    ):
        stored = tensor if source.tensor == "fused" else tensor[:3].T
        target = source.target(parameter)
        target[...] = source.values(stored, target.shape)
    np.testing.assert_array_equal(parameter.reshape(6, 4), tensor)
