"""Reads `quantization_config` of a `config.json`: every field is used, known to affect no number, or refused by name.

Sources of the fields' meanings: compressed-tensors' quantization/quant_config.py, quant_scheme.py and quant_args.py
(0.20), and transformers' utils/quantization_config.py (5.24). Imports no jax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.models.quantization import Quantization, Scheme, Target
from jaxserve.models.value_checks import brief

KEY = "config.json quantization_config"

Read = tuple[Quantization | None, list[str]]

_NEUTRAL = (None, False, "", [], {})


def read(raw: Any, dequantized: frozenset[str] = frozenset()) -> Read:
    """Returns the quantization that a `quantization_config` describes, and lines for the log.

    Args:
        raw: its content; None or empty where there is none.
        dequantized: methods of which a family's loading takes care itself; it has no others then.

    Raises:
        ValueError: one line, where a field is unknown, malformed or not supported.
    """
    if raw in _NEUTRAL:
        return None, []
    if not isinstance(raw, Mapping):
        raise ValueError(f"{KEY} is {brief(raw)}; it must be an object")
    method = raw.get("quant_method")
    if method is None and "fmt" in raw and "weight_block_size" in raw:
        method = "fp8"  # DeepSeek's own releases
    if method in dequantized:
        _rest(raw, {"quant_method", "modules_to_not_convert"}, frozenset({"dequantize"}))
        return None, []
    if method == "modelopt" and raw.get("quant_algo") is None:
        return None, []  # it quantizes keys and values alone
    known = dequantized or frozenset(_METHODS)
    if not isinstance(method, str) or method not in known:
        raise ValueError(f"{KEY} quant_method is {brief(method)}; supported are {', '.join(sorted(known))}")
    return _METHODS[method](raw)


def check_wanted(wanted: str | None, found: Quantization | None) -> None:
    """Raises ValueError where `EngineConfig.quantization` contradicts a checkpoint that is quantized already."""
    if wanted is not None and found is not None and found.kinds != {wanted}:
        raise ValueError(
            f"quantization is {wanted!r}; the checkpoint is quantized already ({found.method}, "
            f"{', '.join(sorted(found.kinds))}): leave quantization at None, or take an unquantized checkpoint"
        )


def _rest(raw: Mapping[str, Any], used: set[str], inert: frozenset[str], where: str = KEY) -> None:
    """Raises ValueError for the first field that is neither used nor inert, and not without effect."""
    for name in sorted(raw.keys() - used - inert):
        if raw[name] not in _NEUTRAL:
            raise ValueError(f"{where} {name} is {brief(raw[name])}; no such setting is supported")


def _choice(raw: Mapping[str, Any], name: str, default: Any, allowed: tuple[Any, ...], where: str = KEY) -> Any:
    value = raw.get(name)
    value = default if value is None else value
    if not any(value == one and type(value) is type(one) for one in allowed):
        raise ValueError(f"{where} {name} is {brief(value)}; it must be one of {', '.join(map(str, allowed))}")
    return value


def _names(raw: Mapping[str, Any], *keys: str, where: str = KEY) -> tuple[str, ...]:
    """Returns a list of names that may stand under several keys."""
    for key in keys:
        if (value := raw.get(key)) is not None:
            if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
                raise ValueError(f"{where} {key} is {brief(value)}; it must be a list of names")
            return tuple(value)
    return ()


def _group(raw: Mapping[str, Any], default: int | None, where: str = KEY) -> int | None:
    """Returns a group size; None for a whole row, which -1 stands for."""
    value = raw.get("group_size")
    value = default if value is None else value
    if value is None or value == -1:
        return None
    if type(value) is not int or value < 1:
        raise ValueError(f"{where} group_size is {brief(value)}; it must be a whole number of at least 1, or -1")
    return value


# -- compressed-tensors ------------------------------------------------------------------------------------------------

_FORMATS = ("naive-quantized", "float-quantized", "int-quantized", "pack-quantized")


def _compressed_tensors(raw: Mapping[str, Any]) -> Read:
    groups = raw.get("config_groups")
    used = {"quant_method", "config_groups", "format", "ignore", "kv_cache_scheme"}
    inert = frozenset({"quantization_status", "global_compression_ratio", "version", "sparsity_config"})
    _rest(raw, used, inert)
    sparse = raw.get("sparsity_config") or {}
    if not isinstance(sparse, Mapping) or sparse.get("format", "dense") != "dense":
        raise ValueError(f"{KEY} sparsity_config is {brief(sparse)}; only weights that are not sparse are supported")
    if not groups:
        return None, []  # keys and values alone are quantized
    if not isinstance(groups, Mapping):
        raise ValueError(f"{KEY} config_groups is {brief(groups)}; it must be an object")
    status = raw.get("quantization_status", "compressed")
    if status != "compressed":
        raise ValueError(f"{KEY} quantization_status is {brief(status)}; weights must be stored 'compressed'")
    lines: list[str] = []
    targets = tuple(_config_group(name, group, raw, lines) for name, group in groups.items())
    return Quantization("compressed-tensors", targets, _names(raw, "ignore"), head=True), lines


def _config_group(name: str, group: Any, raw: Mapping[str, Any], lines: list[str]) -> Target:
    where = f"{KEY} config_groups {name}"
    if not isinstance(group, Mapping):
        raise ValueError(f"{where} is {brief(group)}; it must be an object")
    _rest(group, {"targets", "weights", "input_activations", "format"}, frozenset(), where)
    modules = _names(group, "targets", where=where)
    if not modules:
        raise ValueError(f"{where} has no targets")
    weights = group.get("weights")
    if weights is None:
        return Target(modules, None)
    if not isinstance(weights, Mapping):
        raise ValueError(f"{where} weights is {brief(weights)}; it must be an object")
    at = f"{where} weights"
    used = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"}
    inert = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})
    _rest(weights, used, inert, at)
    _choice(weights, "dynamic", False, (False,), at)
    number = _choice(weights, "type", "int", ("int", "float"), at)
    bits = _choice(weights, "num_bits", 8, (8,) if number == "float" else (4, 8), at)
    symmetric = _choice(weights, "symmetric", True, (True,) if number == "float" else (True, False), at)
    size = _group(weights, None, at)
    likely = "channel" if weights.get("group_size") == -1 else "tensor" if size is None else "group"
    strategy = _choice(weights, "strategy", likely, ("tensor", "channel", "group", "block"), at)
    if (strategy == "group") != (size is not None):
        raise ValueError(f"{at} strategy is {strategy!r} and group_size {brief(weights.get('group_size'))}")
    order = _choice(weights, "actorder", "", ("", False, "weight", "static", "group", "dynamic"), at)
    block = _block(weights.get("block_structure"), f"{at} block_structure") if strategy == "block" else None
    if block and number != "float":
        raise ValueError(f"{at} strategy is 'block' for whole numbers; only fp8 is supported in blocks")
    layout = _choice({"format": group.get("format") or raw.get("format")}, "format", _FORMATS[0], _FORMATS, where)
    packed = layout == "pack-quantized"
    if (packed and number == "float") or (bits == 4 and not packed):
        raise ValueError(f"{where} format is {layout!r} for {bits} bits of {number}; they do not go together")
    scheme = Scheme(
        "fp8" if number == "float" else f"int{bits}",
        block[1] if block else size,
        zeros=not symmetric,
        ordered=order in ("group", "dynamic"),
        activations=_activations(group.get("input_activations"), number, f"{where} input_activations", lines),
    )
    return Target(modules, scheme, "packed" if packed else "plain", block)


def _activations(raw: Any, number: str, where: str, lines: list[str]) -> str:
    """Returns the kind of number that activations become; "" where they stay as they are."""
    if raw is None:
        return ""
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} is {brief(raw)}; it must be an object")
    used = {"num_bits", "type", "symmetric", "strategy", "dynamic", "group_size"}
    _rest(raw, used, frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}), where)
    kind = _choice(raw, "type", "int", ("int", "float"), where)
    _choice(raw, "num_bits", 8, (8,), where)
    _choice(raw, "symmetric", True, (True,), where)
    dynamic = _choice(raw, "dynamic", False, (True, False), where)
    strategy = _choice(raw, "strategy", "tensor", ("token", "tensor", "group"), where)
    if kind != number:
        raise ValueError(f"{where} type is {kind!r}, that of the weights {number!r}; they must be the same")
    if dynamic and strategy == "token":
        return "int8" if kind == "int" else "fp8"
    told = "dynamic" if dynamic else "static"
    lines.append(f"{where}: {told} scales of a {strategy} are not used; activations keep their dtype")
    return ""


# -- fp8 of transformers and DeepSeek ----------------------------------------------------------------------------------


def _block(value: Any, where: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(one) is int and one > 0 for one in value):
        raise ValueError(f"{where} is {brief(value)}; it must be two whole numbers, rows and columns")
    return value[0], value[1]


def _fp8(raw: Mapping[str, Any]) -> Read:
    used = {"quant_method", "fmt", "weight_block_size", "activation_scheme", "modules_to_not_convert"}
    _rest(raw, used | {"ignored_layers", "scale_fmt"}, frozenset({"quantization_type"}))
    _choice(raw, "fmt", "e4m3", ("e4m3",))
    _choice(raw, "scale_fmt", "float", ("float",))
    activation = _choice(raw, "activation_scheme", "dynamic", ("dynamic", "static"))
    if raw.get("weight_block_size") is None:
        block, name = None, "a tensor"
    else:
        block = _block(raw["weight_block_size"], f"{KEY} weight_block_size")
        name = f"{block[1]} numbers"
    ignored = _names(raw, "modules_to_not_convert", "ignored_layers")
    target = Target(("Linear",), Scheme("fp8", block[1] if block else None), "inverse", block)
    lines = [f"{KEY}: {activation} scales of {name} are not used for activations, which keep their dtype"]
    return Quantization("fp8", (target,), ignored, loosely=True), lines


# -- AWQ and GPTQ ------------------------------------------------------------------------------------------------------

_TRAINING = frozenset(
    "tokenizer dataset damp_percent damp_auto_increment act_group_aware true_sequential static_groups meta backend "
    "model_seqlen block_name_to_quantize module_name_preceding_first_block batch_size pad_token_id max_input_length "
    "cache_block_outputs use_cuda_fp16 use_exllama exllama_config max_memory model_name_or_path model_file_base_name "
    "is_marlin_format pack_dtype lm_head_name fuse_max_seq_len do_fuse modules_to_fuse mse offload_to_disk".split()
)
"""Fields that tell how a checkpoint was made, or which kernels its makers used."""


def _awq(raw: Mapping[str, Any]) -> Read:
    used = {"quant_method", "bits", "group_size", "zero_point", "version", "format", "modules_to_not_convert"}
    _rest(raw, used, _TRAINING | {"desc_act", "sym"})
    _choice(raw, "bits", 4, (4,))
    layout = {"version": str(raw.get("version") or raw.get("format") or "gemm").lower()}
    _choice(layout, "version", "gemm", ("gemm",))
    zeros = _choice(raw, "zero_point", True, (True,))
    scheme = Scheme("int4", _group(raw, 128), zeros=zeros)
    ignored = _names(raw, "modules_to_not_convert")
    return Quantization("awq", (Target(("Linear",), scheme, "awq"),), ignored, loosely=True), []


def _gptq(raw: Mapping[str, Any]) -> Read:
    used = {"quant_method", "bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "lm_head"}
    _rest(raw, used, _TRAINING)
    bits = _choice(raw, "bits", 4, (4, 8))
    _choice(raw, "lm_head", False, (False,))
    ordered = _choice(raw, "desc_act", False, (True, False))
    symmetric = _choice(raw, "sym", True, (True, False))
    layout = {"format": str(raw.get("checkpoint_format") or raw.get("format") or "gptq").lower()}
    layout = _choice(layout, "format", "gptq", ("gptq", "gptq_v2"))
    scheme = Scheme(f"int{bits}", _group(raw, 128), zeros=not symmetric, ordered=ordered)
    return Quantization("gptq", (Target(("Linear",), scheme, layout),)), []


_METHODS: dict[str, Callable[[Mapping[str, Any]], Read]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "awq": _awq,
    "gptq": _gptq,
}
