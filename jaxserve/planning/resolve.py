"""Combines a configuration with the checkpoint that it names."""

from __future__ import annotations

import dataclasses
import pathlib

from jaxserve.config.settings import EngineConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import checkpoint
from jaxserve.models.loading.end_tokens import check_vocabulary
from jaxserve.models.loading.quantization_config import check_wanted
from jaxserve.models.params import DTYPES, packed_kernels, parameters, quantized_kernels
from jaxserve.models.quantization import Quantization
from jaxserve.pallas_kernels.cpu import row_products
from jaxserve.pallas_kernels.paged_attention import IMPLEMENTATIONS, Use, choose, is_quantized
from jaxserve.planning.checkpoint_defaults import sampling_defaults
from jaxserve.planning.decode_roofline import page_bytes
from jaxserve.programs.step_programs import Shapes
from jaxserve.sampling_params import MAX_STOP_TOKEN_IDS, STOP_WIDTH
from jaxserve.scheduler.buckets import Buckets

GIB = 2**30


def resolve_shapes(config: EngineConfig, platform: str, *, planning: bool = False) -> Shapes:
    """Returns the shapes of the programs on devices of `platform` ("cpu", "gpu"); the number of pages is left at 2.

    Args:
        config: the engine's configuration.
        platform: of the devices.
        planning: weights will not be read, so a configured architecture does without the checkpoint.

    Raises:
        ValueError: configuration and checkpoint contradict each other.
    """
    model = _quantized(resolve_model(config, planning=planning), config.quantization)
    sampling_defaults(config)  # a faulty file is told before anything is compiled
    max_model_len = config.max_model_len or model.context_length
    if max_model_len > model.longest_context:
        scaled = ", scaled" if model.longest_context != model.max_position_embeddings else ""
        raise ValueError(
            f"max_model_len is {max_model_len}; the model's context (max_position_embeddings{scaled}) is "
            f"{model.longest_context}"
        )
    most = STOP_WIDTH - MAX_STOP_TOKEN_IDS
    if len(model.eos_token_ids) > most:
        raise ValueError(f"model has {len(model.eos_token_ids)} end-of-sequence ids; at most {most} are supported")
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    if dtype not in DTYPES:
        raise ValueError(f"model dtype is {dtype!r}; set EngineConfig.dtype to one of {', '.join(DTYPES)}")
    pages = config.cache.kv_cache_dtype
    kv_cache_dtype = {"auto": dtype, "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}.get(pages, pages)
    _check_checkpoint(config, model, scales=is_quantized(kv_cache_dtype), planning=planning)
    use = Use(dtype, kv_cache_dtype, config.cache.page_size, model.head_dim, model.group_size)
    shapes = Shapes(
        model=model,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        buckets=Buckets.from_config(config, platform),
        num_slots=config.scheduler.max_num_seqs,
        max_model_len=max_model_len,
        page_size=config.cache.page_size,
        num_pages=2,
        num_penalty_rows=config.scheduler.num_penalty_rows,
        packed=packed_kernels(model, dtype) if platform == "cpu" else "",
        row_products=row_products.kernels() if platform == "cpu" else "",
        quantized=quantized_kernels(model) if platform == "cpu" else "",
        attention=choose(platform, config.attention, use),
        max_logprobs=min(config.logprobs.max_logprobs, model.vocab_size),
        logprobs_mode=config.logprobs.logprobs_mode,
        cascade=config.cascade_attention,
    )
    if shapes.cascade == "on" and not IMPLEMENTATIONS[shapes.attention].cascades:
        names = ", ".join(name for name, one in IMPLEMENTATIONS.items() if one.cascades)
        raise ValueError(
            f"cascade_attention is 'on'; attention {shapes.attention!r} reads the pages of each row by itself: "
            f"set 'auto', or choose an attention among {names}"
        )
    return dataclasses.replace(shapes, num_host_pages=_host_pages(config.cache.swap_space, shapes))


def _quantized(model: ModelConfig, wanted: str | None) -> ModelConfig:
    """Returns the architecture quantized as configured. Raises ValueError where its shapes do not allow it."""
    check_wanted(wanted, model.quantization)
    if wanted is None or model.quantization is not None:
        return model
    model = dataclasses.replace(model, quantization=Quantization.at_load(wanted))
    parameters(model)
    return model


def _host_pages(swap_space: float, shapes: Shapes) -> int:
    """Returns the pages that fit into `swap_space` GiB. Raises ValueError where it is not 0 and too small for one."""
    page = page_bytes(shapes)
    pages = int(swap_space * GIB) // page
    if swap_space and not pages:
        raise ValueError(
            f"swap_space is {swap_space:g} GiB; a page has {page} bytes, so it must be at least {page / GIB:.3g}, or 0 "
            "for none"
        )
    return pages


def _check_checkpoint(config: EngineConfig, model: ModelConfig, *, scales: bool, planning: bool) -> None:
    """Compares the checkpoint's tensors and tokenizer with its model, before anything is compiled."""
    if config.load_format == "dummy" or config.model is None:
        return
    if planning and not checkpoint.has_weights(config.model):
        return
    checkpoint.check(config.model, model, scales=scales)
    if not config.skip_tokenizer_init:
        check_vocabulary(pathlib.Path(config.tokenizer or config.model), model.vocab_size)


def resolve_model(config: EngineConfig, *, planning: bool = False) -> ModelConfig:
    """Returns the architecture: configured, or read from the checkpoint; a ValueError names the field where they
    differ.

    End tokens, the first token and the dtype are the checkpoint's where both define them: no program depends on them.

    planning: as for `resolve_shapes`; an existing checkpoint is compared all the same.
    """
    wanted = config.architecture
    if wanted is not None and config.load_format == "dummy":
        return wanted
    assert config.model is not None
    if wanted is not None and planning and not pathlib.Path(config.model).is_dir():
        return wanted
    found = ModelConfig.from_directory(config.model, config.tokenizer)
    if wanted is not None:
        _check_same(wanted, found, config)
    return found


def _check_same(wanted: ModelConfig, found: ModelConfig, config: EngineConfig) -> None:
    """Raises ValueError where the configured architecture and the checkpoint's differ in fields that affect
    programs.
    """
    one, other = wanted.decisive, found.decisive
    for field in dataclasses.fields(ModelConfig):
        if field.name == "max_position_embeddings" and config.max_model_len is not None:
            continue  # it decides nothing then but whether max_model_len is too large, and the checkpoint's counts
        if field.name == "layers":
            _check_layers(one, other, config)
        elif getattr(one, field.name) != getattr(other, field.name):
            also = ", or set EngineConfig.max_model_len" if field.name == "max_position_embeddings" else ""
            raise ValueError(
                f"architecture {field.name} is {getattr(wanted, field.name)!r}; the checkpoint {config.model} "
                f"has {getattr(found, field.name)!r}: take the checkpoint's with "
                f"--gin.EngineConfig.architecture=None (in Python architecture=None){also}"
            )


def _check_layers(one: ModelConfig, other: ModelConfig, config: EngineConfig) -> None:
    """Raises ValueError, naming the first one, where layers of two models with the same fields differ."""
    for number, (wanted, found) in enumerate(zip(one.layer_specs, other.layer_specs, strict=True)):
        if wanted != found:
            raise ValueError(
                f"architecture layer {number} is {wanted}; the checkpoint {config.model} has {found}: take the "
                "checkpoint's with --gin.EngineConfig.architecture=None (in Python architecture=None)"
            )
