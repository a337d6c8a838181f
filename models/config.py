"""The architecture of a model as plain data, read from a Hugging Face `config.json` or written in gin.

Imports no jax, so that a configuration can be validated, explained and simulated without a device.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

ROPE_KINDS = ("default", "linear", "llama3")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a finite number above 0")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    kind `linear` divides every frequency by `factor`; kind `llama3` divides only the long wavelengths and blends
    in between (Llama 3.1 model card; `transformers.modeling_rope_utils` is the reference the tests compare with).
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope_scaling kind is {self.kind!r}; supported kinds are {', '.join(ROPE_KINDS)}")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            _check_number(f"rope_scaling {name}", getattr(self, name))
        if self.factor < 1.0:
            raise ValueError(f"rope_scaling factor is {self.factor}; it must be at least 1")
        if self.kind == "default" and self.factor != 1.0:
            raise ValueError(f"rope_scaling factor is {self.factor}; kind 'default' has none, so it must be 1")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling low_freq_factor is {self.low_freq_factor}; it must be below "
                f"high_freq_factor {self.high_freq_factor}"
            )


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
            _check_count(f"model {name}", getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta"):
            _check_number(f"model {name}", getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model head_dim is {self.head_dim}; rotary embeddings need an even number")

    @property
    def group_size(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path) -> ModelConfig:
        """Reads `config.json` (and the stop tokens of `generation_config.json`) of a Hugging Face directory."""
        directory = pathlib.Path(directory)
        if not directory.is_dir():
            raise ValueError(f"model is {str(directory)!r}; there is no such directory")
        raw = _read_json(directory / "config.json")
        generation = directory / "generation_config.json"
        if generation.is_file():
            stops = _read_json(generation).get("eos_token_id")
            if stops is not None:
                raw["eos_token_id"] = stops
        return cls.from_hf(raw)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Translates the fields of a Hugging Face `config.json`; a missing or unsupported one is a ValueError."""
        architectures = raw.get("architectures") or []
        if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
            raise ValueError(f"config.json architectures is {architectures!r}; exactly one name is needed")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json hidden_act is {raw['hidden_act']!r}; only 'silu' is supported")
        if _quantises_weights(raw.get("quantization_config") or {}):
            raise ValueError("config.json quantization_config is set; only unquantised weights are supported")
        heads = _required_count(raw, "num_attention_heads")
        hidden = _required_count(raw, "hidden_size")
        context = _required_count(raw, "max_position_embeddings")
        rope = _rope_fields(raw)
        return cls(
            architecture=architectures[0],
            vocab_size=_required_count(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_required_count(raw, "intermediate_size"),
            num_hidden_layers=_required_count(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_optional(raw, "num_key_value_heads", heads),
            head_dim=_optional(raw, "head_dim", hidden // heads),
            max_position_embeddings=context,
            rms_norm_eps=_optional(raw, "rms_norm_eps", 1e-6),
            rope_theta=_optional(rope, "rope_theta", _optional(raw, "rope_theta", 10000.0)),
            rope_scaling=_rope_scaling(rope, raw.get("original_max_position_embeddings") or context),
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            attention_bias=_flag(raw, "attention_bias"),
            mlp_bias=_flag(raw, "mlp_bias"),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=_as_ids(raw.get("eos_token_id")),
            dtype=_dtype_name(raw),
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
        if scaling.kind == "llama3":
            raw["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }
        return raw


def _quantises_weights(quantization: Any) -> bool:
    """Whether a `quantization_config` says more than how the key-value cache was calibrated."""
    if not isinstance(quantization, dict):
        return True
    if quantization.get("quant_method") == "compressed-tensors":
        return bool(quantization.get("config_groups"))
    if quantization.get("quant_method") == "modelopt":
        return quantization.get("quant_algo") is not None
    return bool(quantization)


def _rope_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings: transformers 5 writes `rope_parameters`, earlier releases `rope_scaling`, which wins."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    fields = raw.get(name) or {}
    if not isinstance(fields, dict):
        raise ValueError(f"config.json {name} is {fields!r}; it must be an object")
    partial = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"config.json partial_rotary_factor is {partial!r}; only whole heads are rotated")
    return fields


def _rope_scaling(fields: Mapping[str, Any], context: int) -> RopeScaling:
    """`context` stands in for original_max_position_embeddings, as in transformers."""
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind == "linear":
        return RopeScaling(kind, **_rope_numbers(fields, kind, ("factor",)))
    if kind == "llama3":
        fields = {"original_max_position_embeddings": context, **fields}
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return RopeScaling(kind, **_rope_numbers(fields, kind, names))
    return RopeScaling(kind)


def _rope_numbers(fields: Mapping[str, Any], kind: str, names: tuple[str, ...]) -> dict[str, Any]:
    for name in names:
        if fields.get(name) is None:
            raise ValueError(f"config.json rope_scaling has no {name}; kind {kind!r} needs it")
    return {name: fields[name] for name in names}


def _required_count(raw: Mapping[str, Any], name: str) -> int:
    if raw.get(name) is None:
        raise ValueError(f"config.json has no {name}; a checkpoint without it cannot be served")
    _check_count(f"config.json {name}", raw[name])
    return raw[name]


def _optional(raw: Mapping[str, Any], name: str, default: Any) -> Any:
    return default if raw.get(name) is None else raw[name]


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = _optional(raw, name, False)
    if not isinstance(value, bool):
        raise ValueError(f"config.json {name} is {value!r}; it must be true or false")
    return value


def _dtype_name(raw: Mapping[str, Any]) -> str:
    value = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if not isinstance(value, str):
        raise ValueError(f"config.json dtype is {value!r}; it must be a name such as 'bfloat16'")
    return value


def _as_ids(value: Any) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ValueError(f"eos_token_id is {value!r}; it must be a token id or a list of them")
    return tuple(ids)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"model file {path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model file {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"model file {path} holds a {type(content).__name__}; it must hold an object")
    return content
