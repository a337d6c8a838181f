"""The engine whose step is measured: configs/llama.gin with fewer buckets, stated here because the suite does without
gin.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models.config import ModelConfig, RopeScaling
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs.step_programs import Shapes

LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    tie_word_embeddings=False,
    bos_token_id=128000,
    eos_token_ids=(128001, 128008, 128009),
    dtype="bfloat16",
)
PAGE_SIZE = 64
NUM_PAGES = 256 * 2048 // PAGE_SIZE + 64
"""What the largest of the measured steps needs."""

TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=256,
    dtype="float32",
)
"""What a CPU tries the parts with."""


def engine_config(gpu: bool, *, num_pages: int | None = None, bundle: str | None = None) -> EngineConfig:
    """The engine under test: few programs, for the numbers of rows that are measured and for prompts."""
    rows, most = ((8, 64, 256), 2048) if gpu else ((8,), 64)
    return EngineConfig(
        architecture=LLAMA_8B if gpu else TINY,
        load_format="dummy",
        skip_tokenizer_init=True,
        scheduler=SchedulerConfig(max_num_seqs=rows[-1], max_num_batched_tokens=most),
        cache=CacheConfig(page_size=PAGE_SIZE if gpu else 16, num_pages=num_pages or (NUM_PAGES if gpu else 128)),
        token_buckets=(*rows, most),
        row_buckets=rows,
        compilation_cache_dir=None,  # a start from nothing is what is measured
        bundle=bundle,
    )


def engine_shapes(platform: str, *, num_pages: int | None = None, **fields: Any) -> Shapes:
    """The shapes of that engine's programs. fields: of the shapes, in place of those that follow from the platform."""
    config = engine_config(platform == "gpu", num_pages=num_pages)
    shapes = resolve_shapes(config, platform, planning=True)
    return dataclasses.replace(shapes, num_pages=config.cache.num_pages, **fields)
