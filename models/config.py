"""The architecture of a model as plain data, read from a Hugging Face `config.json` or written in gin.

Imports no jax, so that a configuration can be validated, explained and simulated without a device.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxserve.models.end_tokens import as_ids, end_token_ids
from jaxserve.models.json_files import brief, read_object
from jaxserve.models.rope import RopeScaling, check_number
from jaxserve.models.rope import from_hf as rope_from_hf
from jaxserve.models.stored import (
    EMBEDDING,
    HEAD,
    INDEX_FILE,
    SINGLE_FILE,
    Stored,
    has_own_head,
    has_safetensors,
    read_stored,
)

ARCHITECTURES = ("LlamaForCausalLM",)
"""The names that `jaxserve.models.registry` has entries for; here, so that an unknown one is named without jax."""

_INT32: int = 2**31 - 1

_LARGEST: dict[str, int] = {"num_hidden_layers": 1024, "head_dim": 2**16}
"""Bounds of what a start builds one by one, or computes on the host; other sizes must fit into 32 bits."""

_CONTEXT_KEYS = ("max_sequence_length", "max_seq_length", "max_seq_len", "seq_length", "n_positions")
"""Names under which a `config.json` may bound the context beside max_position_embeddings."""

_OTHER_KEYS = (
    "attention_multiplier", "attn_logit_softcapping", "clip_qkv", "embedding_multiplier", "final_logit_softcapping",
    "layer_types", "logit_scale", "logits_scaling", "no_rope_layers", "num_experts", "num_local_experts",
    "query_pre_attn_scalar", "residual_multiplier", "sliding_window", "use_qk_norm",
)  # fmt: skip
"""Keys of a `config.json` by which other architectures compute something else."""

_NESTED_KEYS = (
    "attention_bias", "bos_token_id", "dtype", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "max_position_embeddings", "mlp_bias", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "torch_dtype", "vocab_size",
)  # fmt: skip
"""Keys that are read outside `text_config`, where models of several modalities have them."""

_log = logging.getLogger(__name__)


def check_architecture(name: str) -> None:
    """Raises ValueError, with the known names, where an architecture is not known."""
    if name not in ARCHITECTURES:
        raise ValueError(
            f"model architecture is {brief(name)}; known architectures are {', '.join(sorted(ARCHITECTURES))}"
        )


def _check_count(name: str, value: Any, most: int = _INT32) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {brief(value)}; it must be a whole number of at least 1")
    if value > most:
        raise ValueError(f"{name} is {brief(value)}; it must be at most {most}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only model. Sizes are counts of elements; names follow Hugging Face."""

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
            _check_count(f"model {name}", getattr(self, name), _LARGEST.get(name, _INT32))
        for name in ("rms_norm_eps", "rope_theta"):
            check_number(f"model {name}", getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model head_dim is {self.head_dim}; rotary embeddings need an even number")
        _check_count("model context (max_position_embeddings times the rope_scaling factor)", self.context_length)
        as_ids("model eos_token_ids", list(self.eos_token_ids), self.vocab_size)
        as_ids("model bos_token_id", self.bos_token_id, self.vocab_size)

    @property
    def group_size(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def decisive(self) -> ModelConfig:
        """The same architecture with the same values in all that decides no program: equal ones compute the same."""
        return dataclasses.replace(
            self, bos_token_id=None, eos_token_ids=(), dtype="float32", rope_scaling=self.rope_scaling.normalized
        )

    @property
    def context_length(self) -> int:
        """Positions that the model can be used for."""
        return int(self.max_position_embeddings * self.rope_scaling.context_factor)

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path, tokenizer: str | pathlib.Path | None = None) -> ModelConfig:
        """Reads what the files of a checkpoint directory say together.

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
        config = cls.from_hf(raw)
        ends, lines = end_token_ids(raw, directory, directory if tokenizer is None else pathlib.Path(tokenizer))
        lines += _other_limits(raw, config, directory) + _unread_keys(raw, config)
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
        architecture = _architecture(raw)
        if _quantises_weights(raw.get("quantization_config") or raw.get("compression_config") or {}):
            raise ValueError("config.json quantization_config is set; only unquantised weights are supported")
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
            raise ValueError(f"config.json hidden_act is {brief(raw['hidden_act'])}; only 'silu' is supported")
        heads = _required_count(raw, "num_attention_heads")
        hidden = _required_count(raw, "hidden_size")
        if raw.get("head_dim") is None and hidden % heads:
            raise ValueError(
                f"config.json hidden_size is {hidden}; without a head_dim it must be a multiple of num_attention_heads "
                f"{heads}"
            )
        theta, scaling = rope_from_hf(raw, _required_count(raw, "max_position_embeddings"))
        context, scaling = _context(raw, scaling)
        vocabulary = _required_count(raw, "vocab_size")
        for name in ("eos_token_id", "bos_token_id"):
            as_ids(f"config.json {name}", raw.get(name), vocabulary)
        return cls(
            architecture=architecture,
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=_required_count(raw, "intermediate_size"),
            num_hidden_layers=_required_count(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_optional(raw, "num_key_value_heads", heads),
            head_dim=_optional(raw, "head_dim", hidden // heads),
            max_position_embeddings=context,
            rms_norm_eps=_optional(raw, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            attention_bias=_flag(raw, "attention_bias"),
            mlp_bias=_flag(raw, "mlp_bias"),
            bos_token_id=_first_token(raw.get("bos_token_id")),
            eos_token_ids=as_ids("config.json eos_token_id", raw.get("eos_token_id")),
            dtype=_dtype_name(raw) or "float32",
        )

    def to_hf(self) -> dict[str, Any]:
        """The fields of a Hugging Face `config.json` that `from_hf` translates back to this configuration."""
        raw: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("architecture", "rope_scaling", "eos_token_ids")
        }
        raw |= {
            "architectures": [self.architecture],
            "hidden_act": "silu",
            "eos_token_id": list(self.eos_token_ids) or None,
            "rope_scaling": None,
        }
        if self.architecture == "LlamaForCausalLM":
            raw["model_type"] = "llama"
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
        return raw


def check_config_file(directory: str | pathlib.Path) -> ModelConfig | None:
    """Reads a checkpoint's `config.json`, if there is one. Raises ValueError as `ModelConfig.from_hf` does.

    It takes no time: who reads other files of a checkpoint asks this first, so that the cause is named and not an
    effect.
    """
    path = pathlib.Path(directory) / "config.json"
    return ModelConfig.from_hf(read_object(path)) if path.is_file() else None


def _quantises_weights(quantization: Any) -> bool:
    """Whether a `quantization_config` says more than how the key-value cache was calibrated."""
    if not isinstance(quantization, dict):
        return True
    if quantization.get("quant_method") == "compressed-tensors":
        return bool(quantization.get("config_groups"))
    if quantization.get("quant_method") == "modelopt":
        return quantization.get("quant_algo") is not None
    return bool(quantization)


def _required_count(raw: Mapping[str, Any], name: str) -> int:
    if raw.get(name) is None:
        raise ValueError(f"config.json has no {name}; a checkpoint without it cannot be served")
    _check_count(f"config.json {name}", raw[name], _LARGEST.get(name, _INT32))
    return raw[name]


def _optional(raw: Mapping[str, Any], name: str, default: Any) -> Any:
    return default if raw.get(name) is None else raw[name]


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = _optional(raw, name, False)
    if not isinstance(value, bool):
        raise ValueError(f"config.json {name} is {brief(value)}; it must be true or false")
    return value


def _architecture(raw: Mapping[str, Any]) -> str:
    """The architecture, checked before everything else: of another one nothing else need be as here."""
    names = raw.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        kind = f" (model_type is {brief(raw['model_type'])})" if raw.get("model_type") else ""
        raise ValueError(
            f"config.json architectures is {brief(names)}; exactly one name is needed; known architectures are "
            f"{', '.join(sorted(ARCHITECTURES))}{kind}"
        )
    check_architecture(names[0])
    return names[0]


def _context(raw: Mapping[str, Any], scaling: RopeScaling) -> tuple[int, RopeScaling]:
    """max_position_embeddings, or what bounds it under another name, and the scaling that this context has.

    Where scaling multiplies max_position_embeddings, a bound that is at most that bounds the context before scaling,
    and a larger one the context after it.
    """
    context = _required_count(raw, "max_position_embeddings")
    bounds = [_required_count(raw, name) for name in _CONTEXT_KEYS if raw.get(name) is not None]
    before = min([context, *bounds])
    after = min((bound for bound in bounds if bound > context), default=None)
    if after is None or after >= before * scaling.context_factor:
        return before, scaling
    return after, dataclasses.replace(scaling, stretched=True)


def _other_limits(raw: Mapping[str, Any], config: ModelConfig, directory: pathlib.Path) -> list[str]:
    """A line where other keys that tell the context disagree with it.

    A tokenizer's model_max_length is often that of a training run, or absurd, so it only has the line.
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


def _unread_keys(raw: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """A line where config.json has settings by which another architecture would compute something else."""
    neutral = (None, False, 0, 1)
    found = [name for name in _OTHER_KEYS if raw.get(name) not in neutral]
    if raw.get("use_sliding_window") is False and "sliding_window" in found:
        found.remove("sliding_window")
    lines = []
    if found:
        lines.append(f"config.json has {', '.join(found)}, which {config.architecture} does not know; not used")
    nested = raw.get("text_config")
    for name, value in nested.items() if isinstance(nested, dict) else ():
        if name in _NESTED_KEYS and value is not None and value != raw.get(name):
            lines.append(
                f"config.json text_config has {name} {brief(value)}, and {brief(raw.get(name))} stands beside "
                "text_config; the latter counts"
            )
    if raw.get("model_type") not in (None, "llama"):
        lines.append(
            f"config.json model_type is {brief(raw['model_type'])}; the architecture {config.architecture} counts"
        )
    return lines


def _compared(config: ModelConfig, raw: Mapping[str, Any], stored: Stored) -> tuple[ModelConfig, list[str]]:
    """The configuration with what the stored tensors say of it, and a line for each disagreement."""
    lines = []
    if (stored.directory / SINGLE_FILE).exists() and (stored.directory / INDEX_FILE).exists():
        lines.append(f"checkpoint {stored.directory} holds {SINGLE_FILE} and {INDEX_FILE}; only the former is read")
    own = stored.dtype
    if _dtype_name(raw) is None:
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


def _first_token(value: Any) -> int | None:
    """The token that a text begins with: an id, or a list of one."""
    if isinstance(value, list):
        if len(value) > 1:
            raise ValueError(f"config.json bos_token_id is {brief(value)}; it must be one token id")
        return value[0] if value else None
    return value


def _dtype_name(raw: Mapping[str, Any]) -> str | None:
    """The dtype that config.json names; None where it names none."""
    new, old = (_without_module(name, raw.get(name)) for name in ("dtype", "torch_dtype"))
    if new and old and new != old:
        raise ValueError(f"config.json dtype is {new!r} and torch_dtype is {old!r}; they contradict each other")
    return new or old


def _without_module(name: str, value: Any) -> str | None:
    """The name of a dtype: early releases of transformers wrote torch.bfloat16, and "auto" names none."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"config.json {name} is {brief(value)}; it must be a name such as 'bfloat16'")
    return None if value in (None, "", "auto") else value.removeprefix("torch.")
