"""Defines every setting of the engine and its servers, as frozen dataclasses that validate themselves.

Standard library only (and `jaxserve.models.config`, which adds numpy). gin binds these classes by name; nothing here
knows gin.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxserve.config.access_config import AccessConfig
from jaxserve.config.chat_config import ChatConfig
from jaxserve.config.checks import at_least, between, did_you_mean, number, one_of
from jaxserve.config.client_limits import LimitsConfig
from jaxserve.config.failpoints import Failpoint
from jaxserve.config.http_config import HttpConfig
from jaxserve.config.logprobs_config import LogprobsConfig
from jaxserve.config.parallel_samples import ParallelSamplesConfig
from jaxserve.config.pooler_config import PoolerConfig
from jaxserve.config.queue_limits import QueueConfig
from jaxserve.config.scheduling import MIN_BUCKET, SchedulerConfig
from jaxserve.config.structured_outputs_config import StructuredOutputsConfig
from jaxserve.config.tracing_config import TracingConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.quantization import KINDS

LOG_LEVELS = ("debug", "info", "warning")

CASCADE = ("auto", "on", "off")
ATTENTION = ("auto", "triton", "cpu", "cpu_float32", "xla", "reference", "triton_interpret")
DTYPES = ("auto", "float32", "bfloat16", "float16")
EVICTION_POLICIES = ("lru", "lfu", "cost")
KV_CACHE_DTYPES = (*DTYPES, "fp8", "fp8_e4m3", "int8")
PAGE_SIZES = (16, 32, 64, 128)
READY_WHEN = ("auto", "servable", "complete")


def _check_buckets(name: str, buckets: tuple[int, ...], limit: int) -> None:
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < MIN_BUCKET:
        raise ValueError(f"{name} is {buckets}; it must rise strictly from at least {MIN_BUCKET}")
    if buckets[-1] < limit:
        raise ValueError(f"{name} ends at {buckets[-1]}; it must reach the limit of {limit}")


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Configures the page pool.

    page_size: tokens a page. num_pages: pages including the null page; None sizes the pool from memory.
    kv_cache_memory_bytes: memory of the pool when num_pages is None; None takes what gpu_memory_utilization leaves
    after weights and the compiler's temporaries.
    kv_cache_dtype: what pages hold; "auto" is the model's dtype, "fp8" (the same as "fp8_e4m3") and "int8" are
    quantized with a scale for each layer and head, from the checkpoint or measured at start.
    swap_space: GiB of host memory for pages of swapped sequences and, where these leave room, for cached pages that the
    device had no room for; 0 is none.
    enable_prefix_caching: requests of a tenant share the pages of what they begin with, which are computed once.
    enable_host_caching: cached pages that are reclaimed move to host memory, if there is swap_space.
    eviction_policy: which cached page is reclaimed first: "lru" is the least recently used, "lfu" the least used,
    "cost" the one whose loss is predicted to cost least.
    disk_cache_dir: directory for cached pages that host memory has no room for, and for those of an orderly stop, which
    the next start finds; None is none. disk_cache_max_bytes: of its files.
    prefix_caching_secret_file: file of 16 to 64 bytes that key the hashes of pages, for processes that must agree on
    them; None draws a secret for this process, or for disk_cache_dir.
    """

    page_size: int = 16
    num_pages: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_dtype: str = "auto"
    swap_space: float = 0.0
    enable_prefix_caching: bool = True
    enable_host_caching: bool = True
    eviction_policy: str = "lru"
    prefix_caching_secret_file: str | None = None
    disk_cache_dir: str | None = None
    disk_cache_max_bytes: int = 16 << 30

    def __post_init__(self) -> None:
        between("swap_space", self.swap_space, 0.0)
        for name in ("enable_prefix_caching", "enable_host_caching"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} is {value!r}; it must be True or False")
        at_least("disk_cache_max_bytes", self.disk_cache_max_bytes, 1)
        tiers = self.swap_space and self.enable_prefix_caching and self.enable_host_caching
        if self.disk_cache_dir is not None and not tiers:
            raise ValueError(
                f"disk_cache_dir is {self.disk_cache_dir!r}; pages get there by way of host memory: set swap_space "
                "(GiB), and leave enable_prefix_caching and enable_host_caching on, or unset it"
            )
        one_of("eviction_policy", self.eviction_policy, EVICTION_POLICIES)
        one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        one_of("page_size", self.page_size, PAGE_SIZES)
        if self.num_pages is not None:
            at_least("num_pages", self.num_pages, 2)
        if self.kv_cache_memory_bytes is not None:
            at_least("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1)
            if self.num_pages is not None:
                raise ValueError(
                    f"num_pages is {self.num_pages} and kv_cache_memory_bytes is {self.kv_cache_memory_bytes}; "
                    "each fixes the size of the pool: give one"
                )
        number("gpu_memory_utilization", self.gpu_memory_utilization)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0 and at most 1"
            )


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Configures a model and how it is run.

    model: Hugging Face or converted checkpoint directory. tokenizer: directory of the tokenizer; None is `model`.
    architecture: the model's shape; None reads it from the checkpoint. Given both, they must agree.
    load_format: "auto" reads the checkpoint, "dummy" makes random weights from `architecture`.
    dtype: of weights, and of pages unless kv_cache_dtype says else; "auto" is the checkpoint's.
    quantization: "fp8", "int8" or "int4" quantizes the matrices of a plain checkpoint while it is loaded; None serves
    weights as the checkpoint has them, quantized or not.
    chat: how conversations become prompts, and outputs replies.
    max_model_len: prompt and output tokens of one request together; None is the model's own context.
    token_buckets, row_buckets: sizes that steps are padded to; None is powers of two from 8 to the limits, on
        CPUs with the sizes halfway between them.
    attention: implementation of paged attention; "auto" chooses by platform.
    cascade_attention: whether rows that share a prefix read its pages together: "on", "off", or "auto" where that was
    measured to be faster. No bit of a result depends on it.
    structured_outputs: bounds the grammars of requests.
    compilation_cache_dir: where compiled programs are kept for the next start (`~` is the home directory); "auto" is
    jaxserve/programs in XDG_CACHE_HOME or ~/.cache, None keeps none. The directory must be this user's alone. Entries
    are found by all that decides a program, jax's version and the device among it, so a stale one is never used.
    compilation_cache_max_bytes: of what is kept; the entries that were not used for longest are removed.
    ready_when: "complete" serves when all programs of the closed set are there, "servable" when those are that can
    serve every request, with more padding: the others are compiled meanwhile, by a process of their own with a
    low priority, and join one by one. "auto" is "servable" for a server on CPUs without max_decode_gap and "complete"
    everywhere else.
    bundle: directory of programs that `jaxserve.compile` wrote for this configuration and device; loaded instead of
    compiling anything, and refused where it does not fit. Its number of pages counts where none is configured.
    pooler: how embeddings are made where a request does not say.
    seed: base of the seeds drawn for requests that bring none. samples: bounds the samples of one request.
    generation_config: where defaults of sampling parameters come from: "auto" takes those of the model's
    generation_config.json, "vllm" none, and a directory those of the file there. What a request sets always counts.
    composition_dir: directory for what steps consisted of over time, as JSON and a plot, written when the engine ends;
    None writes nothing.
    failpoints: faults that a test or a drill injects, see jaxserve/config/failpoints.py; none is right for a server.
    logprobs: the log-probabilities that requests may ask for.
    """

    model: str | None = None
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    architecture: ModelConfig | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    scheduler: SchedulerConfig = SchedulerConfig()
    cache: CacheConfig = CacheConfig()
    chat: ChatConfig = ChatConfig()
    logprobs: LogprobsConfig = LogprobsConfig()
    structured_outputs: StructuredOutputsConfig = StructuredOutputsConfig()
    samples: ParallelSamplesConfig = ParallelSamplesConfig()
    token_buckets: tuple[int, ...] | None = None
    row_buckets: tuple[int, ...] | None = None
    attention: str = "auto"
    cascade_attention: str = "auto"
    compilation_cache_dir: str | None = "auto"
    compilation_cache_max_bytes: int = 4 * 1024**3
    ready_when: str = "auto"
    bundle: str | None = None
    pooler: PoolerConfig = PoolerConfig()
    seed: int = 0
    generation_config: str = "auto"
    composition_dir: str | None = None
    failpoints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("load_format", self.load_format, ("auto", "dummy"))
        one_of("dtype", self.dtype, DTYPES)
        one_of("quantization", self.quantization, (None, *KINDS))
        one_of("attention", self.attention, ATTENTION)
        one_of("cascade_attention", self.cascade_attention, CASCADE)
        one_of("ready_when", self.ready_when, READY_WHEN)
        at_least("seed", self.seed, 0)
        if not isinstance(self.generation_config, str) or not self.generation_config:
            raise ValueError(
                f"generation_config is {self.generation_config!r}; it must be 'auto', 'vllm' or a directory's name"
            )
        at_least("compilation_cache_max_bytes", self.compilation_cache_max_bytes, 0)
        if self.max_model_len is not None:
            at_least("max_model_len", self.max_model_len, 2)
        object.__setattr__(self, "failpoints", tuple(self.failpoints))
        for text in self.failpoints:
            Failpoint.parse(text)
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
        names = {"scheduling_policy": "policy", "block_size": "page_size"}
        known = _option_names(cls)
        for name in options:
            if names.get(name, name) not in known:
                raise ValueError(f"engine option {name!r} is unknown; {did_you_mean(name, known | set(names))}")
        return _from_flat(cls, {names.get(name, name): value for name, value in options.items()})


def ineffective_settings(config: EngineConfig, max_model_len: int) -> list[str]:
    """Returns a line for each setting that has no effect, or less than it seems, because of another one.

    max_model_len: as resolved, for a configuration that leaves it to the model.
    """
    scheduler, found = config.scheduler, []
    if scheduler.preemption.preemption_mode == "swap" and not config.cache.swap_space:
        found.append(
            "preemption_mode is 'swap', but swap_space is 0: preempted sequences are computed again; set "
            "CacheConfig.swap_space (GiB)"
        )
    if scheduler.ordering.drop_late and scheduler.policy != "deadline":
        found.append(
            f"drop_late is True, but policy is {scheduler.policy!r}: only policy 'deadline' drops what is late"
        )
    if not scheduler.enable_chunked_prefill and scheduler.max_num_batched_tokens < max_model_len:
        found.append(
            f"enable_chunked_prefill is False and max_num_batched_tokens {scheduler.max_num_batched_tokens} is below "
            f"max_model_len {max_model_len}: longer prompts than the former are refused; raise it, or enable chunks"
        )
    return found


def _sections(config: type) -> dict[str, type]:
    """Returns the fields of a config that are configs of their own and always present."""
    return {
        field.name: type(field.default)
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(field.default) and not isinstance(field.default, type)
    }


def _option_names(config: type) -> set[str]:
    """Returns the names of all fields, with those of the sections in place of the sections."""
    sections = _sections(config)
    own = {field.name for field in dataclasses.fields(config)} - set(sections)
    return own.union(*(_option_names(section) for section in sections.values()))


def _from_flat(config: type, options: dict[str, Any]) -> Any:
    """Builds a config whose sections take their fields from the same flat options."""
    nested = {
        name: _from_flat(section, options)
        for name, section in _sections(config).items()
        if _option_names(section) & set(options)
    }
    own = {field.name for field in dataclasses.fields(config)} - set(_sections(config))
    return config(**{name: value for name, value in options.items() if name in own}, **nested)


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Configures the server.

    host, port: where it listens for gRPC; port 0 takes a free one. http_port: where it listens for HTTP; 0 turns HTTP
    off. engine: the engine it serves.
    engine_process: the engine runs in a process of its own, away from the front end's interpreter lock.
    max_message_bytes: largest request message. served_model_name: the model name that clients see; None derives it from
    the end of the model's path.
    drain_seconds: how long running requests may finish after SIGTERM.
    max_unread_tokens: output tokens of one request that may wait for its reader, beyond what the connection buffers;
    the request of a reader that falls further behind is ended. limits: bounds what clients may hold open. http: what
    the HTTP port accepts. access: who may call, and TLS. tracing: where spans of requests go.
    queue: bounds what may wait for the engine, by tokens and by tenant. The tenants' weights are those of policy "fair"
    too (PolicyConfig.tenant_weights): they are set in one of the two places.
    step_timeout: seconds in which a step of the engine must end and the engine's process must answer; else the server
    ends. None is the larger of 60 and 20 times what the largest step is predicted to take. log_level: "info" logs the
    settings that differ from their defaults, "debug" all of them.
    """

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 50051
    http_port: int = 8000
    engine_process: bool = True
    max_message_bytes: int = 4 * 1024 * 1024
    drain_seconds: float = 30.0
    max_unread_tokens: int = 8192
    limits: LimitsConfig = LimitsConfig()
    http: HttpConfig = HttpConfig()
    access: AccessConfig = AccessConfig()
    queue: QueueConfig = QueueConfig()
    tracing: TracingConfig = TracingConfig()
    served_model_name: str | None = None
    step_timeout: float | None = None
    log_level: str = "info"

    def __post_init__(self) -> None:
        one_of("log_level", self.log_level, LOG_LEVELS)
        for name in ("port", "http_port"):
            port = getattr(self, name)
            if isinstance(port, bool) or not isinstance(port, int):
                raise ValueError(f"{name} is {port!r}; it must be a whole number")
            if not 0 <= port <= 65535:
                raise ValueError(f"{name} is {port}; it must be from 0 to 65535")
        if self.port and self.port == self.http_port:
            raise ValueError(f"port and http_port are both {self.port}; give two, or http_port 0 for no HTTP")
        at_least("max_message_bytes", self.max_message_bytes, 1024)
        at_least("max_unread_tokens", self.max_unread_tokens, 1)
        if self.step_timeout is not None:
            number("step_timeout", self.step_timeout)
            if not 0.1 <= self.step_timeout < math.inf:
                raise ValueError(
                    f"step_timeout is {self.step_timeout}; it must be at least 0.1 and finite, or None to be chosen "
                    "from the model and the device"
                )
        number("drain_seconds", self.drain_seconds)
        if not self.drain_seconds >= 0:
            raise ValueError(f"drain_seconds is {self.drain_seconds}; it must be at least 0")
        self._share_tenant_weights()

    def _share_tenant_weights(self) -> None:
        """Gives the weights of the tenants to the policy, or the policy's to the queue."""
        ordering, queue = self.engine.scheduler.ordering, self.queue
        weights = queue.relative_weights
        if not weights and ordering.tenant_weights:
            default = queue.default_tenant
            tenants = {
                name: dataclasses.replace(default, weight=default.weight * weight)
                for name, weight in ordering.tenant_weights.items()
            }
            object.__setattr__(self, "queue", dataclasses.replace(queue, tenants=tenants))
        elif not ordering.tenant_weights:
            scheduler = self.engine.scheduler
            scheduler = dataclasses.replace(scheduler, ordering=dataclasses.replace(ordering, tenant_weights=weights))
            object.__setattr__(self, "engine", dataclasses.replace(self.engine, scheduler=scheduler))
        elif weights.keys() != ordering.tenant_weights.keys() or any(
            not math.isclose(weight, ordering.tenant_weights[name]) for name, weight in weights.items()
        ):
            raise ValueError(
                f"tenant_weights is {dict(ordering.tenant_weights)} and the weights of tenants are {weights}: set the "
                "weights in one of the two places"
            )
