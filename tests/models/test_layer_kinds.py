"""Layers that differ from each other, against a decoder written out in numpy."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.layer_specs import GateClamp, LayerSpec, MLPSpec, QueryGrowth, RouterSpec, SelfAttentionSpec
from jaxserve.models.layers.parameter import Source
from jaxserve.models.layers.rope import Rope, head_order
from jaxserve.pallas_kernels.paged_attention import api
from jaxserve.planning.model_cost import ModelCost
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs import step_programs as programs
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from tests.models import generate
from tests.models.checkpoints import BASE
from tests.runner.drive import drive

PLAIN = ModelConfig.from_hf(BASE | {"num_hidden_layers": 5})
LAYERS = (
    LayerSpec(SelfAttentionSpec(sliding_window=5, rope=Rope(500.0)), MLPSpec(96)),
    LayerSpec(
        SelfAttentionSpec(soft_cap=2.0, qk_norm=True, qkv_bias=True),
        MLPSpec(64, activation="gelu_tanh"),
        norm="rms_offset",
        norm_place="both",
        residual_multiplier=0.5,
    ),
    LayerSpec(
        SelfAttentionSpec(sliding_window=9, sinks=True, out_bias=True, whole_qk_norm=True),
        MLPSpec(96, kind="plain", activation="relu", bias=True),
        norm="layer",
        norm_place="sum",
    ),
    LayerSpec(
        SelfAttentionSpec(rotation=False, scale=0.4, query_growth=QueryGrowth(0.5, 8)),
        MLPSpec(32, activation="gelu", bias=True),
        norm_place="after",
    ),
    LayerSpec(
        SelfAttentionSpec(),
        MLPSpec(
            32,
            kind="experts",
            bias=True,
            router=RouterSpec(6, 2, softmax="chosen", bias=True, shared_size=48),
            clamp=GateClamp(0.5, 1.5),
        ),
    ),
)
MIXED = dataclasses.replace(
    PLAIN,
    layers=LAYERS,
    sliding_window=9,
    rotary_size=12,
    embedding_size=48,
    embedding_multiplier=3.0,
    learned_positions=True,
    logits_scaling=0.5,
    final_logit_softcapping=4.0,
)
TOKENS = np.random.RandomState(3).randint(0, BASE["vocab_size"], 40).astype(np.int32)
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


def normed(x, weights, kind="rms", axes=(-1,)):
    scale = weights["scale"] + (kind == "rms_offset")
    x = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    bias = weights["bias"] if kind == "layer" else 0
    return x / np.sqrt((x * x).mean(axes, keepdims=True) + MIXED.rms_norm_eps) * scale + bias


def turned(x, positions, theta):
    """x [T, heads, D], of which 12 elements are rotated by their positions: the first 6, each with that 8 places on."""
    half = x.shape[-1] // 2
    frequencies = np.where(np.arange(half) < 6, theta ** (-np.arange(half) / 6), 0)
    angle = positions[:, None, None] * frequencies
    low, high = x[..., :half], x[..., half:]
    return np.concatenate(
        [low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], axis=-1
    )


def attended(spec, weights, x, norm):
    """Attention of one layer over x [T, H], head by head and query by query."""
    positions = np.arange(len(x))
    qkv = np.einsum("th,kgdh->tkgd", x, weights["qkv"])
    if spec.qkv_bias:
        qkv = qkv + weights["qkv_bias"]
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    if spec.qk_norm:
        q, k = normed(q, weights["q_norm"], norm), normed(k, weights["k_norm"], norm)
    if spec.whole_qk_norm:
        q = normed(q, weights["q_norm"], axes=(1, 2, 3))
        k = normed(k, {"scale": weights["k_norm"]["scale"][:, 0]}, axes=(1, 2))
    if spec.rotation:
        theta = spec.rope.theta if spec.rope else MIXED.rope_theta
        q = turned(q.reshape(len(x), -1, q.shape[-1]), positions, theta).reshape(q.shape)
        k = turned(k, positions, theta)
    if spec.query_growth:
        q = q * (1 + 0.5 * np.log(1 + positions // 8))[:, None, None, None]
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


def multiplied(spec, weights, x):
    """The MLP of one layer over x [T, H]."""
    if spec.kind == "experts":
        return np.stack([through_experts(spec, weights, token) for token in x])
    activation = ACTIVATIONS[spec.activation]
    if spec.kind == "plain":
        y = activation(x @ weights["up"].T + weights["up_bias"])
    else:
        gate, up = np.einsum("th,nih->nti", x, weights["gate_up"])
        if spec.bias:
            gate, up = gate + weights["gate_up_bias"][0], up + weights["gate_up_bias"][1]
        y = activation(gate) * up
    return y @ weights["down"].T + (weights["down_bias"] if spec.bias else 0)


def through_experts(spec, weights, x):
    """The experts of one layer and the shared one, for one token [H]."""
    scores = weights["router"] @ x + weights["router_bias"]
    chosen = np.argsort(-scores)[: spec.router.per_token]
    power = np.exp(scores[chosen])
    gated = ACTIVATIONS["silu"](x @ weights["shared"]["gate_up"][0].T) * (x @ weights["shared"]["gate_up"][1].T)
    y = gated @ weights["shared"]["down"].T / (1 + np.exp(-weights["shared_gate"][0] @ x))
    for expert, share in zip(chosen, power / power.sum(), strict=True):
        gate = np.minimum(weights["gate"][expert] @ x + weights["gate_bias"][expert], 0.5)
        up = np.clip(weights["up"][expert] @ x + weights["up_bias"][expert], -0.5, 0.5)
        inner = (up + 1) * gate / (1 + np.exp(-1.5 * gate))
        y = y + share * (weights["down"][expert] @ inner + weights["down_bias"][expert])
    return y


def by_hand(weights, tokens):
    """float64 logits [T, V]."""
    x = weights["embedding"][tokens] * 3.0 @ weights["project_in"].T + weights["positions"][: len(tokens)]
    for number, spec in enumerate(MIXED.layer_specs):
        layer = weights["layers"][number]
        for name, computed in (
            ("attention", lambda x, layer=layer, spec=spec: attended(spec.attention, layer["attention"], x, spec.norm)),
            ("mlp", lambda x, layer=layer, spec=spec: multiplied(spec.mlp, layer["mlp"], x)),
        ):
            before = spec.norm_place in ("before", "both")
            y = computed(normed(x, layer[f"{name}_norm"], spec.norm) if before else x)
            if spec.norm_place in ("after", "both"):
                y = normed(y, layer[f"{name}_out_norm"], spec.norm)
            x = x + y * spec.residual_multiplier
            if spec.norm_place == "sum":
                x = normed(x, layer[f"{name}_norm"], spec.norm)
    logits = normed(x, weights["norm"]) @ weights["project_out"].T @ weights["head"].T / 0.5
    return 4.0 * np.tanh(logits / 4.0)


@pytest.fixture(scope="module")
def weights():
    drawn = params.random_params(MIXED, "float32", params.make_mesh(), seed=2)
    for number, path in enumerate(path for path, leaf in params.leaves(drawn) if path[-1] in ("scale", "bias")):
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
        ({"num_hidden_layers": 3}, r"^model num_hidden_layers is 3; its layers have 5$"),
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
    with pytest.raises(ValueError, match=r"^config.json jaxserve_config is malformed: Expected `object`, got `int`"):
        ModelConfig.from_hf(MIXED.to_hf() | {"jaxserve_config": 1})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfAttentionSpec(sliding_window=0), r"^layer sliding_window is 0; it must be a whole number of at l"),
        (lambda: SelfAttentionSpec(soft_cap=-1.0), r"^layer soft_cap is -1.0; it must be a finite number above 0$"),
        (lambda: SelfAttentionSpec(scale=float("nan")), r"^layer scale is nan; it must be finite$"),
        (lambda: MLPSpec(8, kind="dense"), r"^layer MLP kind is 'dense'; it must be one of gated, plain, experts$"),
        (lambda: MLPSpec(8, kind="experts"), r"^layer router is None and MLP kind 'experts'; experts alone have one$"),
        (lambda: MLPSpec(8, clamp=GateClamp(7.0, 1.7)), r"^layer clamp is set for MLP kind 'gated' with silu; it is f"),
        (lambda: GateClamp(0.0, 1.7), r"^layer swiglu limit is 0.0; it must be a finite number above 0$"),
        (lambda: RouterSpec(4, 5), r"^layer experts per token is 5; it must be at most 4$"),
        (lambda: RouterSpec(4, 2, softmax="none"), r"^layer router softmax is 'none'; it must be one of all, chosen$"),
        (lambda: MLPSpec(8, activation="tanh"), r"^layer MLP activation is 'tanh'; it must be one of silu, gelu, gelu"),
        (
            lambda: SelfAttentionSpec(qk_norm=True, whole_qk_norm=True),
            r"^layer qk_norm and whole_qk_norm are True; onl",
        ),
        (lambda: dataclasses.replace(PLAIN, rotary_size=16), r"^model rotary_size is 16; it must be None for all elem"),
        (lambda: dataclasses.replace(PLAIN, logits_scaling=0.0), r"^model logits_scaling is 0.0; it must be a finite "),
        (lambda: LayerSpec(SelfAttentionSpec(), MLPSpec(8), norm="batch"), r"^layer norm is 'batch'; it must be"),
        (
            lambda: LayerSpec(SelfAttentionSpec(), MLPSpec(8), norm_place="within"),
            r"^layer norm_place is 'within'; it",
        ),
    ],
)
def test_what_cannot_be_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_costs_count_the_parameters_of_every_layer():
    sizes = [leaf.size for _, leaf in params.leaves(params.abstract_params(MIXED, "float32", params.make_mesh()))]
    assert ModelCost.of(MIXED, "float32", "float32").weight_bytes == 4 * sum(sizes)


def test_a_step_reads_the_experts_that_its_tokens_would_choose():
    cost = ModelCost.of(MIXED, "float32", "float32")
    expert = 3 * BASE["hidden_size"] * 32 + 2 * 32 + BASE["hidden_size"]  # two of six for each token
    assert cost.layers - cost.multiplied == 4 * expert
    assert cost.read(1) == pytest.approx(cost.multiplied)
    assert cost.layers - cost.read(3) == pytest.approx(6 * expert * (2 / 3) ** 3)
    dense = ModelCost.of(PLAIN, "float32", "float32")
    assert dense.read(1) == dense.multiplied == dense.layers


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


def test_rotated_elements_come_first_in_the_order_of_a_checkpoint():
    assert head_order(8, 8) is None
    # Pairs of a checkpoint: (0, 3), (1, 4), (2, 5) turn; 6 and 7 do not.
    assert head_order(8, 6) == (0, 1, 2, 6, 3, 4, 5, 7)
    parameter = np.zeros((1, 1, 8, 2), int)
    tensor = np.arange(16).reshape(8, 2)
    taken = Source("q", (8, 2), 1, 0, 1, order=head_order(8, 6)).values(tensor, parameter.shape)
    assert taken[0, 0, :, 0].tolist() == [0, 2, 4, 12, 6, 8, 10, 14]
