"""Every setting of the engine and its servers, as frozen dataclasses that validate themselves.

Standard library only (and models.config, which is too). gin binds these classes by name; nothing here knows gin.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from models.config import ModelConfig

POLICIES = ("fcfs",)
ATTENTION = ("auto", "triton", "cpu", "xla", "reference", "triton_interpret")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = (*DTYPES, "fp8", "fp8_e4m3", "int8")
PAGE_SIZES = (16, 32, 64, 128)
MIN_BUCKET = 8


def _at_least(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    if value < low:
        raise ValueError(f"{name} is {value}; it must be at least {low}")


def _number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}; it must be a number")


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(str(item) for item in allowed)}")


def _check_buckets(name: str, buckets: tuple[int, ...], limit: int) -> None:
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < MIN_BUCKET:
        raise ValueError(f"{name} is {buckets}; it must rise strictly from at least {MIN_BUCKET}")
    if buckets[-1] < limit:
        raise ValueError(f"{name} ends at {buckets[-1]}; it must reach the limit of {limit}")


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Limits and rules of one scheduling step.

    max_num_seqs: requests that run at once (and slots on the device).
    max_num_batched_tokens: tokens computed in one step, prefill chunks and decodes together.
    enable_chunked_prefill: long prompts are computed over several steps, mixed with decodes.
    long_prefill_token_threshold: tokens of one prompt in one step at most; 0 is no limit but the budget.
    policy: order of the waiting queue.
    max_num_waiting: requests that may queue before new ones are refused.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    policy: str = "fcfs"
    max_num_waiting: int = 4096

    def __post_init__(self) -> None:
        _at_least("max_num_seqs", self.max_num_seqs, 1)
        _at_least("max_num_batched_tokens", self.max_num_batched_tokens, MIN_BUCKET)
        _at_least("long_prefill_token_threshold", self.long_prefill_token_threshold, 0)
        _at_least("max_num_waiting", self.max_num_waiting, 1)
        _one_of("policy", self.policy, POLICIES)
        if self.long_prefill_token_threshold and not self.enable_chunked_prefill:
            raise ValueError(
                f"long_prefill_token_threshold is {self.long_prefill_token_threshold}; it needs enable_chunked_prefill"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least max_num_seqs "
                f"{self.max_num_seqs}, so that every running request can decode in one step"
            )


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """The page pool.

    page_size: tokens a page. num_pages: pages including the null page; None sizes the pool from memory.
    kv_cache_memory_bytes: memory of the pool when num_pages is None; None takes what gpu_memory_utilization leaves
    after weights and the compiler's temporaries.
    kv_cache_dtype: what pages hold; "auto" is the model's dtype, "fp8" (the same as "fp8_e4m3") and "int8" are
    quantised with a scale for each layer and head, from the checkpoint or measured at start.
    """

    page_size: int = 16
    num_pages: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _one_of("page_size", self.page_size, PAGE_SIZES)
        if self.num_pages is not None:
            _at_least("num_pages", self.num_pages, 2)
        if self.kv_cache_memory_bytes is not None:
            _at_least("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1)
            if self.num_pages is not None:
                raise ValueError(
                    f"num_pages is {self.num_pages} and kv_cache_memory_bytes is {self.kv_cache_memory_bytes}; "
                    "each fixes the size of the pool: give one"
                )
        _number("gpu_memory_utilization", self.gpu_memory_utilization)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0 and at most 1"
            )


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """A model and how it is run.

    model: Hugging Face or converted checkpoint directory. tokenizer: directory of the tokenizer; None is `model`.
    architecture: the model's shape; None reads it from the checkpoint. Given both, they must agree.
    load_format: "auto" reads the checkpoint, "dummy" makes random weights from `architecture`.
    dtype: of weights, and of pages unless kv_cache_dtype says else; "auto" is the checkpoint's.
    max_model_len: prompt and output tokens of one request together; None is the model's own context.
    token_buckets, row_buckets: sizes that steps are padded to; None is powers of two from 8 to the limits, on
        CPUs with the sizes halfway between them.
    attention: implementation of paged attention; "auto" chooses by platform.
    compilation_cache_dir: where compiled programs are kept for the next start (`~` is the home directory); "auto" is
    jaxserve/programs in XDG_CACHE_HOME or ~/.cache, None keeps none. The directory must be this user's alone. Entries
    are found by all that decides a program, jax's version and the device among it, so a stale one is never used.
    compilation_cache_max_bytes: of what is kept; the entries that were not used for longest are removed.
    bundle: directory of programs that `jaxserve.compile` wrote for this configuration and device; loaded instead of
    compiling anything, and refused where it does not fit. Its number of pages counts where none is configured.
    seed: base of the seeds drawn for requests that bring none.
    """

    model: str | None = None
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    architecture: ModelConfig | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    scheduler: SchedulerConfig = SchedulerConfig()
    cache: CacheConfig = CacheConfig()
    token_buckets: tuple[int, ...] | None = None
    row_buckets: tuple[int, ...] | None = None
    attention: str = "auto"
    compilation_cache_dir: str | None = "auto"
    compilation_cache_max_bytes: int = 4 * 1024**3
    bundle: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("load_format", self.load_format, ("auto", "dummy"))
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("attention", self.attention, ATTENTION)
        _at_least("seed", self.seed, 0)
        _at_least("compilation_cache_max_bytes", self.compilation_cache_max_bytes, 0)
        if self.max_model_len is not None:
            _at_least("max_model_len", self.max_model_len, 2)
        if self.model is None and self.load_format != "dummy":
            raise ValueError(
                "model is not set; give a checkpoint directory, or load_format 'dummy' and an architecture"
            )
        if self.model is None and self.architecture is None:
            raise ValueError("architecture is not set; load_format 'dummy' without a model needs one")
        for name, limit in (
            ("token_buckets", self.scheduler.max_num_batched_tokens),
            ("row_buckets", self.scheduler.max_num_seqs),
        ):
            buckets = getattr(self, name)
            if buckets is not None:
                object.__setattr__(self, name, tuple(buckets))
                _check_buckets(name, tuple(buckets), limit)

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """Builds the nested configuration from flat names (vLLM's), those that `LLM(model=..., ...)` takes."""
        nested: dict[str, dict[str, Any]] = {"scheduler": {}, "cache": {}}
        flat: dict[str, Any] = {}
        owners = {
            field.name: owner
            for owner, section in (("scheduler", SchedulerConfig), ("cache", CacheConfig))
            for field in dataclasses.fields(section)
        }
        own = {field.name for field in dataclasses.fields(cls)}
        for name, value in options.items():
            key = {"scheduling_policy": "policy", "block_size": "page_size"}.get(name, name)
            if key in owners:
                nested[owners[key]][key] = value
            elif key in own:
                flat[key] = value
            else:
                raise ValueError(
                    f"engine option {name!r} is unknown; known options are {', '.join(sorted(own | set(owners)))}"
                )
        if nested["scheduler"]:
            flat["scheduler"] = SchedulerConfig(**nested["scheduler"])
        if nested["cache"]:
            flat["cache"] = CacheConfig(**nested["cache"])
        return cls(**flat)


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """The gRPC server.

    host, port: where it listens; port 0 takes a free one. engine: the engine it serves.
    engine_process: the engine runs in a process of its own, away from the front end's interpreter lock.
    max_message_bytes: largest request message. served_model_name: what clients are told; None is the model's place.
    drain_seconds: how long running requests may finish after SIGTERM.
    max_unread_tokens: output tokens of one request that may wait for its reader, beyond what the connection buffers;
    the request of a reader that falls further behind is ended.
    """

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 50051
    engine_process: bool = True
    max_message_bytes: int = 4 * 1024 * 1024
    drain_seconds: float = 30.0
    max_unread_tokens: int = 8192
    served_model_name: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.port, bool) or not isinstance(self.port, int):
            raise ValueError(f"port is {self.port!r}; it must be a whole number")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must be from 0 to 65535")
        _at_least("max_message_bytes", self.max_message_bytes, 1024)
        _at_least("max_unread_tokens", self.max_unread_tokens, 1)
        _number("drain_seconds", self.drain_seconds)
        if not self.drain_seconds >= 0:
            raise ValueError(f"drain_seconds is {self.drain_seconds}; it must be at least 0")
