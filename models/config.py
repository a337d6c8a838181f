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

from jaxserve.models.families.family import Family
from jaxserve.models.layer_groups import LayerKind
from jaxserve.models.layer_specs import LayerSpec
from jaxserve.models.layers.rope import RopeScaling
from jaxserve.models.loading.config_keys import (
    LARGEST,
    OTHER_KEYS,
    ConfigKeys,
    dtype_name,
    first_token,
    flag,
    nested_keys,
    optional,
    quantizes_weights,
    required_count,
)
from jaxserve.models.loading.end_tokens import as_ids, end_token_ids
from jaxserve.models.loading.json_files import read_object
from jaxserve.models.loading.rope_settings import rope_settings
from jaxserve.models.loading.stored import (
    EMBEDDING,
    HEAD,
    INDEX_FILE,
    SINGLE_FILE,
    Stored,
    has_own_head,
    has_safetensors,
    read_stored,
)
from jaxserve.models.registry import ARCHITECTURES, lookup
from jaxserve.models.value_checks import INT32_MAX, brief, check_count, check_number

_CONTEXT_KEYS = ("max_sequence_length", "max_seq_length", "max_seq_len", "seq_length", "n_positions")
"""Keys under which a `config.json` may give the context length besides max_position_embeddings."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Describes the architecture of a decoder-only model. Sizes are counts of elements; names follow Hugging Face.

    Attributes:
        attention_bias: all projections of attention have biases, in every layer.
        mlp_bias: all matrices of the MLPs have biases.
        sliding_window: positions that the layers with a window attend to; None where no layer has one.
        layers: what each layer computes; None where the architecture's family makes it of the fields above, which is
            so of all models whose layers are alike. `layer_specs` has it either way.
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
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    sliding_window: int | None = None
    layers: tuple[LayerSpec, ...] | None = None

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
        for name in ("rms_norm_eps", "rope_theta"):
            check_number(f"model {name}", getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model head_dim is {self.head_dim}; rotary embeddings need an even number")
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
        """Maximum number of positions the model can be used for."""
        return int(self.max_position_embeddings * self.rope_scaling.context_factor)

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
        raw = read_object(directory / "config.json")
        config, told = cls._read(raw)
        ends, lines = end_token_ids(raw, directory, directory if tokenizer is None else pathlib.Path(tokenizer))
        lines += _other_limits(raw, config, directory) + told + nested_keys(raw)
        config = dataclasses.replace(config, eos_token_ids=ends)
        if has_safetensors(directory):
            config, more = _compared(config, raw, read_stored(directory))
            lines += more
        for line in lines:
            _log.warning("%s", line)
        return config

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Translates the fields of a Hugging Face `config.json`; a missing or unsupported one is a ValueError."""
        return cls._read(raw)[0]

    @classmethod
    def _read(cls, content: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
        """Returns the configuration that a `config.json` describes, and a log line where it has unused keys."""
        family = lookup(_architecture(content))
        raw = ConfigKeys(content, family.defaults)
        if quantizes_weights(raw.get("quantization_config") or raw.get("compression_config") or {}):
            raise ValueError("config.json quantization_config is set; only unquantized weights are supported")
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
            raise ValueError(f"config.json hidden_act is {brief(raw['hidden_act'])}; only 'silu' is supported")
        heads = required_count(raw, "num_attention_heads")
        hidden = required_count(raw, "hidden_size")
        if raw.get("head_dim") is None and hidden % heads:
            raise ValueError(
                f"config.json hidden_size is {hidden}; without a head_dim it must be a multiple of num_attention_heads "
                f"{heads}"
            )
        theta, scaling = rope_settings(raw, required_count(raw, "max_position_embeddings"))
        context, scaling = _context(raw, scaling)
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
            head_dim=optional(raw, "head_dim", hidden // heads),
            max_position_embeddings=context,
            rms_norm_eps=optional(raw, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=flag(raw, "tie_word_embeddings"),
            bos_token_id=first_token(raw.get("bos_token_id")),
            eos_token_ids=as_ids("config.json eos_token_id", raw.get("eos_token_id")),
            dtype=dtype_name(raw) or "float32",
            layers=layers,
            **shared_fields(layers),
        )
        return config, _unread_keys(raw, family)

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of a Hugging Face `config.json` that `from_hf` translates back to this configuration."""
        family = lookup(self.architecture)
        raw: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("architecture", "rope_scaling", "eos_token_ids", "layers")
        }
        raw |= {
            "architectures": [self.architecture],
            "model_type": family.model_type,
            "hidden_act": "silu",
            "eos_token_id": list(self.eos_token_ids) or None,
            "rope_scaling": None,
        }
        if self.sliding_window is not None:
            kinds = ("full_attention", "sliding_attention")
            windows = [layer.attention.sliding_window is not None for layer in self.layer_specs]
            # Some families have no layer_types, and read the window for all layers.
            told = {"max_window_layers": 0} if all(windows) else {"layer_types": [kinds[each] for each in windows]}
            raw |= {"use_sliding_window": True, **told}
        scaling = self.rope_scaling
        if scaling.kind != "default":
            raw["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "linear" and scaling.stretched:
            original = self.max_position_embeddings / scaling.factor
            raw["rope_scaling"]["original_max_position_embeddings"] = original
        if scaling.kind == "llama3":
            raw["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }
        if family.layers(ConfigKeys(raw, family.defaults)) != self.layer_specs:
            raise ValueError(f"model layers are some that no config.json of {self.architecture} describes")
        return raw


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


def _architecture(raw: Mapping[str, Any]) -> str:
    """Returns the architecture; checked first, because for another architecture no other key need have the same
    meaning.
    """
    names = raw.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        kind = f" (model_type is {brief(raw['model_type'])})" if raw.get("model_type") else ""
        raise ValueError(
            f"config.json architectures is {brief(names)}; exactly one name is needed; known architectures are "
            f"{', '.join(sorted(ARCHITECTURES))}{kind}"
        )
    return names[0]


def _context(raw: Mapping[str, Any], scaling: RopeScaling) -> tuple[int, RopeScaling]:
    """Returns max_position_embeddings, or the context length under another key, and the scaling that applies to it.

    Where scaling multiplies max_position_embeddings, a limit of at most that bounds the context before scaling, and a
    larger one the context after it.
    """
    context = required_count(raw, "max_position_embeddings")
    bounds = [required_count(raw, name) for name in _CONTEXT_KEYS if raw.get(name) is not None]
    before = min([context, *bounds])
    after = min((bound for bound in bounds if bound > context), default=None)
    if after is None or after >= before * scaling.context_factor:
        return before, scaling
    return after, dataclasses.replace(scaling, stretched=True)


def _other_limits(raw: Mapping[str, Any], config: ModelConfig, directory: pathlib.Path) -> list[str]:
    """Returns a log line where other keys that give the context length disagree with it.

    A tokenizer's model_max_length is often that of a training run, or absurd, so it is only logged.
    """
    keys = ("max_position_embeddings", *_CONTEXT_KEYS)
    found = {name: raw[name] for name in keys if raw.get(name) is not None}
    path = directory / "tokenizer_config.json"
    longest = read_object(path).get("model_max_length") if path.is_file() else None
    if isinstance(longest, int | float) and 0 < longest < 2**31:
        found["model_max_length (of tokenizer_config.json)"] = longest
    if all(value in (config.max_position_embeddings, config.context_length) for value in found.values()):
        return []
    told = ", ".join(f"{name} {value}" for name, value in found.items())
    return [f"the files of {directory} have {told}; the context is {config.context_length} tokens"]


def _unread_keys(keys: ConfigKeys, family: Family) -> list[str]:
    """Returns a log line where config.json has settings that the family does not know.

    Raises ValueError where another architecture would compute something different because of them, unless the family
    allows it.
    """
    unread = keys.unread()
    refused = [name for name in unread if name in OTHER_KEYS and not family.ignores_others]
    if refused:
        told = ", ".join(f"{name} {brief(keys[name])}" for name in refused)
        raise ValueError(
            f"config.json has {told}, by which models compute something else and which {family.architecture} does not "
            "know; if the checkpoint was made without it, set it to null"
        )
    lines = []
    if unread:
        lines.append(f"config.json has {', '.join(unread)}, which {family.architecture} does not know; not used")
    if keys.get("model_type") not in (None, family.model_type):
        lines.append(
            f"config.json model_type is {brief(keys['model_type'])}; the architecture {family.architecture} counts"
        )
    return lines


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
            f"config.json tie_word_embeddings is true, but {HEAD} of {stored.directory} differs from {EMBEDDING}; "
            "the stored head is used"
        )
    return config, lines
