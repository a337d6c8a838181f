"""Holds the architecture of a model as plain data, read from a Hugging Face `config.json` or written in gin.

Imports no jax, so that a configuration can be validated, explained and simulated without a device.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxserve.models.layer_groups import LayerKind
from jaxserve.models.layer_specs import LayerSpec
from jaxserve.models.layers.rope import Rope, RopeScaling, rope_frequencies
from jaxserve.models.loading import quantization_config
from jaxserve.models.loading.config_keys import (
    LARGEST,
    ConfigKeys,
    dtype_name,
    first_token,
    flag,
    nested_keys,
    optional,
    required_count,
)
from jaxserve.models.loading.config_words import (
    WHOLE,
    architecture_name,
    context_and_scaling,
    other_limits,
    read_whole,
    unread_keys,
    written_keys,
)
from jaxserve.models.loading.end_tokens import as_ids, end_token_ids
from jaxserve.models.loading.json_files import read_object
from jaxserve.models.loading.rope_settings import rope_settings, rotary_size
from jaxserve.models.loading.stored import (
    HEAD,
    INDEX_FILE,
    SINGLE_FILE,
    Stored,
    has_own_head,
    has_safetensors,
    read_stored,
)
from jaxserve.models.loading.text_part import text_names, text_part
from jaxserve.models.quantization import Quantization
from jaxserve.models.registry import lookup
from jaxserve.models.value_checks import INT32_MAX, brief, check_count, check_number

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Describes the architecture of a decoder-only model. Sizes are counts of elements; names follow Hugging Face.

    Attributes:
        attention_bias: all projections of attention have biases, in every layer.
        mlp_bias: all matrices of the MLPs have biases.
        rotary_size: elements of a head that are rotated, the first ones of a checkpoint's; None for all.
        sliding_window: positions that the layers with a window attend to; None where no layer has one.
        embedding_size: numbers of a token's embedding, which matrices of their own project to hidden_size and back;
            None where it is hidden_size.
        embedding_multiplier: multiplies the embeddings, rounded to the dtype of the weights.
        learned_positions: a learned vector of each position is added to the embeddings.
        logits_scaling: divides the logits.
        final_logit_softcapping: logits become cap * tanh(logit / cap); None for no cap.
        layers: what each layer computes; None where the architecture's family makes it of the fields above, which is
            so of all models whose layers are alike. `layer_specs` has it either way.
        quantization: how the weights of matrices are quantized; None where they are not.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    rotary_size: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    sliding_window: int | None = None
    embedding_size: int | None = None
    embedding_multiplier: float = 1.0
    learned_positions: bool = False
    logits_scaling: float = 1.0
    final_logit_softcapping: float | None = None
    layers: tuple[LayerSpec, ...] | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            check_count(f"model {name}", getattr(self, name), LARGEST.get(name, INT32_MAX))
        for name in ("rms_norm_eps", "rope_theta", "embedding_multiplier", "logits_scaling"):
            check_number(f"model {name}", getattr(self, name))
        if self.final_logit_softcapping is not None:
            check_number("model final_logit_softcapping", self.final_logit_softcapping)
        if self.embedding_size is not None:
            check_count("model embedding_size", self.embedding_size)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model head_dim is {self.head_dim}; rotary embeddings need an even number")
        if self.rotary_size is not None and (self.rotary_size % 2 or not 0 < self.rotary_size < self.head_dim):
            raise ValueError(
                f"model rotary_size is {self.rotary_size}; it must be None for all elements of a head, or an even "
                f"number from 2 to below head_dim {self.head_dim}"
            )
        self.rope_scaling.check_size(self.rotary_size or self.head_dim)
        check_count("model context (max_position_embeddings times the rope_scaling factor)", self.context_length)
        as_ids("model eos_token_ids", list(self.eos_token_ids), self.vocab_size)
        as_ids("model bos_token_id", self.bos_token_id, self.vocab_size)
        self._check_layers()

    def _check_layers(self) -> None:
        """Raises ValueError where the layers contradict the fields; layers that follow from the fields become None."""
        alike = lookup(self.architecture).layers(vars(self))
        if self.layers == alike:
            object.__setattr__(self, "layers", None)
        for name, value in shared_fields(self.layers or alike).items():
            if getattr(self, name) != value:
                made = "its layers have" if self.layers else f"{self.architecture} makes layers with"
                raise ValueError(f"model {name} is {brief(getattr(self, name))}; {made} {brief(value)}")

    @functools.cached_property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """Returns the specification of each layer, first to last."""
        return self.layers or lookup(self.architecture).layers(vars(self))

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Returns what determines the pages of each layer, first to last."""
        shape = self.num_key_value_heads, self.head_dim
        return tuple(LayerKind(layer.attention.sliding_window, *shape) for layer in self.layer_specs)

    @property
    def group_size(self) -> int:
        """Number of query heads that share one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def decisive(self) -> ModelConfig:
        """Returns this architecture with normalized values in fields that affect no program: equal ones compile to the
        same.
        """
        return dataclasses.replace(
            self, bos_token_id=None, eos_token_ids=(), dtype="float32", rope_scaling=self.rope_scaling.normalized
        )

    @property
    def context_length(self) -> int:
        """Maximum number of positions the model is used for, unless more are asked for."""
        return int(self.max_position_embeddings * self.rope_scaling.context_factor)

    @property
    def longest_context(self) -> int:
        """Maximum number of positions the model can be used for."""
        dynamic = self.rope_scaling.kind == "dynamic"
        return int(self.max_position_embeddings * self.rope_scaling.factor) if dynamic else self.context_length

    def rotary_frequencies(self, rope: Rope | None = None) -> np.ndarray:
        """Computes `rope_frequencies` of layers; rope: their own, None for the model's."""
        rope = rope or Rope(self.rope_theta, self.rope_scaling)
        return rope_frequencies(
            self.rotary_size or self.head_dim, rope.theta, rope.scaling, self.max_position_embeddings
        )

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path, tokenizer: str | pathlib.Path | None = None) -> ModelConfig:
        """Reads the configuration from all files of a checkpoint directory.

        These are `config.json`, `generation_config.json`, the tokenizer's files, and the safetensors files where there
        are some. Where they disagree on what does not stop a start, one line is logged.

        Args:
            directory: of the checkpoint, in Hugging Face's format or as `checkpoint.save_orbax` wrote it.
            tokenizer: directory of the tokenizer's files; None is the checkpoint's.

        Raises:
            ValueError: one line; of several faults an unknown architecture is named first.
        """
        directory = pathlib.Path(directory)
        if not directory.is_dir():
            raise ValueError(f"model is {str(directory)!r}; there is no such directory")
        raw, parts = text_part(read_object(directory / "config.json"))
        config, told = cls._read(raw)
        ends, lines = end_token_ids(raw, directory, directory if tokenizer is None else pathlib.Path(tokenizer))
        limits = config.max_position_embeddings, config.context_length
        lines += parts + other_limits(raw, limits, directory) + told + nested_keys(raw)
        config = dataclasses.replace(config, eos_token_ids=ends)
        if has_safetensors(directory):
            config, more = _compared(
                config, raw, read_stored(directory, text_names(directory, lookup(config.architecture).names))
            )
            lines += more
        for line in lines:
            _log.warning("%s", line)
        return config

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Translates the fields of a Hugging Face `config.json`; a missing or unsupported one is a ValueError."""
        return cls._read(text_part(raw)[0])[0]

    @classmethod
    def _read(cls, content: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
        """Returns the configuration that a `config.json` describes, and a log line where it has unused keys."""
        family = lookup(architecture_name(content))
        if WHOLE in content:
            return read_whole(content[WHOLE], cls), []
        raw = ConfigKeys(content, family.defaults, family.key_names, family.inert)
        quantization, told = quantization_config.read(
            raw.get("quantization_config") or raw.get("compression_config"), family.dequantized
        )
        heads = required_count(raw, "num_attention_heads")
        hidden = required_count(raw, "hidden_size")
        if raw.get("head_dim") is None and hidden % heads:
            raise ValueError(
                f"config.json hidden_size is {hidden}; without a head_dim it must be a multiple of num_attention_heads "
                f"{heads}"
            )
        theta, scaling = rope_settings(
            raw,
            required_count(raw, "max_position_embeddings"),
            "full_attention" if family.nested_rope else None,
            family.rope_theta,
            family.rope_keys,
        )
        if family.scaled_context:
            scaling = dataclasses.replace(scaling, stretched=scaling.kind == "linear")
        context, scaling = context_and_scaling(raw, scaling)
        head_dim = optional(raw, "head_dim", hidden // heads)
        rotary = rotary_size(raw, head_dim, partial=family.partial_rotation)
        vocabulary = required_count(raw, "vocab_size")
        for name in ("eos_token_id", "bos_token_id"):
            as_ids(f"config.json {name}", raw.get(name), vocabulary)
        layers = family.layers(raw)
        config = cls(
            architecture=family.architecture,
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=optional(raw, "num_key_value_heads", heads),
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=optional(raw, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            rotary_size=None if rotary == head_dim else rotary,
            tie_word_embeddings=flag(raw, "tie_word_embeddings"),
            bos_token_id=first_token(raw.get("bos_token_id")),
            eos_token_ids=as_ids("config.json eos_token_id", raw.get("eos_token_id")),
            dtype=dtype_name(raw) or "float32",
            layers=layers,
            quantization=quantization,
            **shared_fields(layers),
            **(family.fields(raw) if family.fields else {}),
        )
        return config, told + unread_keys(raw, family)

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of a Hugging Face `config.json` that `from_hf` translates back to this configuration."""
        family = lookup(self.architecture)
        raw = written_keys(self, family)
        try:
            same = ModelConfig.from_hf(raw) == self
        except ValueError:
            same = False
        # What no config.json of the architecture describes, or this page does not write in its words.
        return raw if same else raw | {WHOLE: dataclasses.asdict(self)}


def shared_fields(layers: Sequence[LayerSpec]) -> dict[str, Any]:
    """Derives the fields of `ModelConfig` that these layers share."""
    attention = [layer.attention for layer in layers]
    return {
        "num_hidden_layers": len(layers),
        "intermediate_size": max(layer.mlp.intermediate_size for layer in layers),
        "attention_bias": all(each.qkv_bias and each.out_bias for each in attention),
        "mlp_bias": all(layer.mlp.bias for layer in layers),
        "sliding_window": max((each.sliding_window for each in attention if each.sliding_window), default=None),
    }


def check_config_file(directory: str | pathlib.Path) -> ModelConfig | None:
    """Reads a checkpoint's `config.json`, if there is one. Raises ValueError as `ModelConfig.from_hf` does.

    It takes no time: call it before reading a checkpoint's other files, so that the error names the cause and not a
    symptom.
    """
    path = pathlib.Path(directory) / "config.json"
    return ModelConfig.from_hf(read_object(path)) if path.is_file() else None


def _compared(config: ModelConfig, raw: Mapping[str, Any], stored: Stored) -> tuple[ModelConfig, list[str]]:
    """Returns the configuration updated from the stored tensors, and a line for each disagreement."""
    lines = []
    if (stored.directory / SINGLE_FILE).exists() and (stored.directory / INDEX_FILE).exists():
        lines.append(f"checkpoint {stored.directory} holds {SINGLE_FILE} and {INDEX_FILE}; only the former is read")
    own = stored.dtype
    if dtype_name(raw) is None:
        config = dataclasses.replace(config, dtype=own or config.dtype)
    elif own is not None and own != config.dtype:
        lines.append(
            f"config.json dtype is {config.dtype!r}, but most weights of {stored.directory} are in {own}; "
            f"EngineConfig.dtype 'auto' is {config.dtype!r}"
        )
    if config.tie_word_embeddings and has_own_head(stored):
        config = dataclasses.replace(config, tie_word_embeddings=False)
        lines.append(
            f"config.json tie_word_embeddings is true, but {HEAD} of {stored.directory} differs from "
            f"{stored.embedding}; the stored head is used"
        )
    return config, lines
