"""Reads single keys of a `config.json` and records which were read, so that none is dropped silently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxserve.models.value_checks import INT32_MAX, brief, check_count

LARGEST: dict[str, int] = {"num_hidden_layers": 1024, "head_dim": 2**16}
"""Upper bounds of sizes that a start iterates over or computes on the host; other sizes must fit into 32 bits."""

OTHER_KEYS = frozenset(
    "attention_multiplier attn_logit_softcapping clip_qkv embedding_multiplier final_logit_softcapping layer_types "
    "logit_scale logits_scaling no_rope_layers num_experts num_local_experts query_pre_attn_scalar residual_multiplier "
    "sliding_window use_qk_norm".split()
)
"""Keys that change what some architecture computes; an architecture that does not read them would differ."""

INERT_KEYS = frozenset(
    "architectures model_type transformers_version auto_map id2label label2id num_labels problem_type tokenizer_class "
    "task_specific_params finetuning_task torchscript pruned_heads tie_encoder_decoder is_encoder_decoder is_decoder "
    "add_cross_attention cross_attention_hidden_size use_bfloat16 tf_legacy_loss return_dict return_dict_in_generate "
    "output_attentions output_hidden_states output_scores output_router_logits chunk_size_feed_forward use_cache "
    "initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop pretraining_tp dropout "
    "pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id forced_bos_token_id "
    "forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids prefix max_length min_length do_sample "
    "early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences "
    "exponential_decay_length_penalty remove_invalid_values gradient_checkpointing unsloth_version unsloth_fixed "
    "text_config cache_implementation".split()
)
"""Keys that affect no logits: they describe a checkpoint, its training or sampling from it."""

_NESTED_KEYS = (
    "attention_bias", "bos_token_id", "dtype", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "max_position_embeddings", "mlp_bias", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "torch_dtype", "vocab_size",
)  # fmt: skip
"""Keys that are read outside `text_config`, where multimodal models have them."""


def _is_neutral(value: Any) -> bool:
    """Returns whether a setting with this value has no effect: nothing, off, or a factor of 1."""
    return value is not True and any(value == neutral for neutral in (None, False, 0, 1, "", [], {}))


class ConfigKeys(Mapping[str, Any]):
    """Wraps a `config.json` with a family's defaults for missing keys, and records the keys that are read."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        defaults: Mapping[str, Any],
        names: Mapping[str, str] | None = None,
        inert: frozenset[str] = frozenset(),
    ):
        """Wraps the content of a file.

        Args:
            raw: the content.
            defaults: of keys that it leaves out, by the names that are asked for.
            names: the names that stand in the file for names that are asked for.
            inert: keys that affect no logits, besides `INERT_KEYS`.
        """
        self._names = dict(names or {})
        self._content = {**{self._names.get(name, name): value for name, value in defaults.items()}, **raw}
        self._read: set[str] = set()
        self._inert = INERT_KEYS | inert

    def __getitem__(self, name: str) -> Any:
        name = self._names.get(name, name)
        self._read.add(name)
        return self._content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def unread(self) -> list[str]:
        """Returns the keys that are set, may affect logits, and were not read."""
        named = self._content.keys() - self._read - self._inert
        if self._content.get("use_sliding_window") is False:
            named -= {"sliding_window", "max_window_layers"}
        return sorted(name for name in named if not name.startswith("_") and not _is_neutral(self._content[name]))


def required_count(raw: Mapping[str, Any], name: str) -> int:
    """Returns the integer of a required key."""
    if raw.get(name) is None:
        raise ValueError(f"config.json has no {name}; a checkpoint without it cannot be served")
    check_count(f"config.json {name}", raw[name], LARGEST.get(name, INT32_MAX))
    return raw[name]


def optional_count(raw: Mapping[str, Any], name: str) -> int | None:
    """Returns the integer of a key, or None."""
    return None if raw.get(name) is None else required_count(raw, name)


def optional(raw: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns the value of a key; the default where it is missing or null."""
    return default if raw.get(name) is None else raw[name]


def flag(raw: Mapping[str, Any], name: str) -> bool:
    """Returns the boolean of a key; false where it is missing or null."""
    value = optional(raw, name, False)
    if not isinstance(value, bool):
        raise ValueError(f"config.json {name} is {brief(value)}; it must be true or false")
    return value


def first_token(value: Any) -> int | None:
    """Returns the beginning-of-sequence token: an id, or a list of one."""
    if isinstance(value, list):
        if len(value) > 1:
            raise ValueError(f"config.json bos_token_id is {brief(value)}; it must be one token id")
        return value[0] if value else None
    return value


def dtype_name(raw: Mapping[str, Any]) -> str | None:
    """Returns the dtype that config.json names; None where it names none."""
    new, old = (_without_module(name, raw.get(name)) for name in ("dtype", "torch_dtype"))
    if new and old and new != old:
        raise ValueError(f"config.json dtype is {new!r} and torch_dtype is {old!r}; they contradict each other")
    return new or old


def _without_module(name: str, value: Any) -> str | None:
    """Strips the module from a dtype's name: early transformers releases wrote torch.bfloat16, and "auto" names
    none.
    """
    if value is not None and not isinstance(value, str):
        raise ValueError(f"config.json {name} is {brief(value)}; it must be a name such as 'bfloat16'")
    return None if value in (None, "", "auto") else value.removeprefix("torch.")


def nested_keys(raw: Mapping[str, Any]) -> list[str]:
    """Returns a line for each key of `text_config` whose value differs from that of the same top-level key."""
    nested = raw.get("text_config")
    return [
        f"config.json text_config has {name} {brief(value)}, and {brief(raw.get(name))} stands beside text_config; the "
        "latter counts"
        for name, value in (nested.items() if isinstance(nested, dict) else ())
        if name in _NESTED_KEYS and value is not None and value != raw.get(name)
    ]
