"""Describes what each layer of a model computes, as plain data: the list of layers of a model's configuration.

A family (models/families/) maps a `config.json` to these specs, and models/layers/ builds modules from them. What all
layers share (sizes, heads, rotary frequencies, the epsilon of norms) is in `jaxserve.models.config.ModelConfig`. A new
kind of layer is one more field or choice here and its code in models/layers/. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxserve.models.layers.rope import Rope
from jaxserve.models.value_checks import brief, check_count, check_number

MLP_KINDS = ("gated", "plain", "experts")
"""Kinds of MLP: with a gate, without, and several with a gate of which each token goes through a few."""

SOFTMAXES = ("all", "chosen")
"""Scores of experts that a softmax turns into weights: those of all, before some are chosen, or those of the chosen."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
"""Activations of an MLP; "gelu_tanh" is the approximation of "gelu" by tanh."""

NORM_KINDS = ("rms", "rms_offset", "layer")
"""Kinds of norms: by the root mean square, the same with 1 added to the scale, and LayerNorm, which has biases."""

NORM_PLACES = ("before", "after", "both", "sum")
"""Positions of a layer's norms: the inputs of attention and MLP, their outputs, both, or the sums of the residual
stream and their outputs."""


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"layer {name} is {brief(value)}; it must be one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class QueryGrowth:
    """Describes how queries grow with their position: by the factor 1 + beta * log(1 + position // length).

    Attributes:
        beta: see above.
        length: positions up to which queries stay as they are.
    """

    beta: float
    length: int

    def __post_init__(self) -> None:
        check_number("layer query growth beta", self.beta)
        check_count("layer query growth length", self.length)


@dataclasses.dataclass(frozen=True)
class SelfAttentionSpec:
    """Describes the attention of one layer; heads are the model's.

    Attributes:
        sliding_window: positions a token attends to, itself included; None for all before it.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for no cap.
        scale: multiplies the scores; None for head_dim ** -0.5.
        sinks: each query head has a learned score without a value in its softmax (as in gpt-oss).
        rotation: queries and keys are rotated by their positions.
        rope: the rotation of the layer; None for the model's.
        query_growth: queries grow with their positions; None where they do not.
        qk_norm: each head's query and key is normed (RMS over head_dim, learned scale) before the rotation.
        whole_qk_norm: the queries of all heads are normed together, and the keys of all heads.
        qkv_bias: the projections of queries, keys and values have biases.
        out_bias: the output projection has a bias.
    """

    sliding_window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    sinks: bool = False
    rotation: bool = True
    rope: Rope | None = None
    query_growth: QueryGrowth | None = None
    qk_norm: bool = False
    whole_qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        if self.sliding_window is not None:
            check_count("layer sliding_window", self.sliding_window)
        if self.soft_cap is not None:
            check_number("layer soft_cap", self.soft_cap)
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"layer scale is {self.scale}; it must be finite")
        if self.qk_norm and self.whole_qk_norm:
            raise ValueError("layer qk_norm and whole_qk_norm are True; only one of them may be")


@dataclasses.dataclass(frozen=True)
class RouterSpec:
    """Describes how tokens choose experts: the highest scores win, of equal ones the expert with the lower number.

    Attributes:
        num_experts: number of experts.
        per_token: experts that a token goes through; their outputs are summed by weights.
        softmax: of which scores it makes the weights, of `SOFTMAXES`.
        renormalized: the weights of the chosen are divided by their sum.
        bias: the scores have biases.
        shared_size: width of an expert that every token goes through besides; None without one.
    """

    num_experts: int
    per_token: int
    softmax: str = "all"
    renormalized: bool = False
    bias: bool = False
    shared_size: int | None = None

    def __post_init__(self) -> None:
        check_count("layer num_experts", self.num_experts)
        check_count("layer experts per token", self.per_token, self.num_experts)
        _check_choice("router softmax", self.softmax, SOFTMAXES)
        if self.shared_size is not None:
            check_count("layer shared expert size", self.shared_size)


@dataclasses.dataclass(frozen=True)
class GateClamp:
    """Describes experts that compute down((up + 1) * gate * sigmoid(alpha * gate)) of clamped numbers.

    Attributes:
        limit: the gate is at most this, and up between minus this and this.
        alpha: see above.
    """

    limit: float
    alpha: float

    def __post_init__(self) -> None:
        check_number("layer swiglu limit", self.limit)
        check_number("layer swiglu alpha", self.alpha)


@dataclasses.dataclass(frozen=True)
class MLPSpec:
    """Describes the MLP of one layer.

    Attributes:
        intermediate_size: width of its hidden layer, or of that of each expert.
        bias: its matrices have biases.
        kind: of `MLP_KINDS`; "gated" is down(activation(gate(x)) * up(x)), "plain" is down(activation(up(x))), and
            "experts" is a weighted sum of several that are gated.
        activation: of `ACTIVATIONS`.
        router: how tokens choose experts; None for other kinds.
        clamp: of experts that have one.
    """

    intermediate_size: int
    bias: bool = False
    kind: str = "gated"
    activation: str = "silu"
    router: RouterSpec | None = None
    clamp: GateClamp | None = None

    def __post_init__(self) -> None:
        check_count("layer intermediate_size", self.intermediate_size)
        _check_choice("MLP kind", self.kind, MLP_KINDS)
        _check_choice("MLP activation", self.activation, ACTIVATIONS)
        if (self.router is not None) != (self.kind == "experts"):
            raise ValueError(f"layer router is {brief(self.router)} and MLP kind {self.kind!r}; experts alone have one")
        if self.clamp is not None and (self.kind != "experts" or self.activation != "silu"):
            raise ValueError(
                f"layer clamp is set for MLP kind {self.kind!r} with {self.activation}; it is for experts with silu"
            )


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """Describes one layer.

    Attributes:
        attention: what its attention computes.
        mlp: what its MLP computes.
        norm: kind of its norms, of `NORM_KINDS`.
        norm_place: where they stand, of `NORM_PLACES`.
        residual_multiplier: multiplies the outputs of attention and MLP before they are added to the residual stream.
    """

    attention: SelfAttentionSpec
    mlp: MLPSpec
    norm: str = "rms"
    norm_place: str = "before"
    residual_multiplier: float = 1.0

    def __post_init__(self) -> None:
        _check_choice("norm", self.norm, NORM_KINDS)
        _check_choice("norm_place", self.norm_place, NORM_PLACES)
        check_number("layer residual_multiplier", self.residual_multiplier)
