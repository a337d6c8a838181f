"""Makes what an engine's core starts with: page pool, scheduler, and the message that describes it to the front end."""

from __future__ import annotations

import logging

from jaxserve.config.failpoints import Failpoints
from jaxserve.config.settings import CacheConfig, EngineConfig
from jaxserve.engine.messages import EngineReady
from jaxserve.kv_cache.content_keys import ContentKeys, cache_secret
from jaxserve.kv_cache.eviction import make_eviction
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.planning.checkpoint_defaults import defaults_line, sampling_defaults
from jaxserve.request import Pooling
from jaxserve.request_checks import ModelLimits
from jaxserve.runner.protocol import Runner, RunnerInfo
from jaxserve.scheduler import Scheduler
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.prefix_costs import StepSeconds, page_seconds

_log = logging.getLogger(__name__)


def content_keys(config: EngineConfig) -> ContentKeys | None:
    """Returns what identifies the content of pages; None where requests do not share them."""
    if not config.cache.enable_prefix_caching:
        return None
    return ContentKeys(cache_secret(config.cache), model=config.model or "")


def page_pool(config: CacheConfig, info: RunnerInfo, seconds: StepSeconds | None, buckets: Buckets) -> PagePool:
    """Creates the pool of a runner's pages. seconds: predicts a step's time; None where nothing is known of it."""
    eviction = make_eviction(
        config.eviction_policy, None if seconds is None else page_seconds(seconds, info.page_size, buckets)
    )
    caches_on_host = config.enable_prefix_caching and config.enable_host_caching
    pool = PagePool(info.num_pages, info.page_size, info.num_host_pages, eviction, caches_on_host=caches_on_host)
    if info.pages_in_transit is not None:
        pool.host_copies.limit = info.pages_in_transit // 2  # of one step, so that the next one waits for none of them
    return pool


def make_scheduler(config: EngineConfig, runner: Runner, buckets: Buckets) -> Scheduler:
    """Creates the scheduler and the page pool that fit the runner.

    Args:
        config: the engine's settings.
        runner: executes the steps.
        buckets: sizes of the runner's programs.
    """
    info = runner.info
    step_seconds = None if runner.step_costs is None else runner.step_costs.seconds
    return Scheduler(
        config.scheduler,
        page_pool(config.cache, info, step_seconds, buckets),
        buckets,
        costs=info.preemption_costs,
        max_model_len=info.max_model_len,
        tokens_per_step=info.tokens_per_step,
        step_seconds=step_seconds,
        allocation_hit=Failpoints(config.failpoints).at("allocate"),
        content_keys=content_keys(config),
        group_windows=info.group_windows,
    )


def ready_message(config: EngineConfig, info: RunnerInfo, pool_tokens: int, start_seconds: float) -> EngineReady:
    """Returns the message that describes the engine to the front end.

    Args:
        config: the engine's settings.
        info: of the runner.
        pool_tokens: tokens that the whole page pool can hold for one request.
        start_seconds: time that the start took.
    """
    scheduler = config.scheduler
    chunked = scheduler.enable_chunked_prefill
    defaults = sampling_defaults(config)
    pooling, normalize = config.pooler.resolved(config.model)
    if defaults:
        _log.info("%s", defaults_line(defaults))
    max_tokens = defaults.get("max_tokens")
    limits = ModelLimits(
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        pool_tokens=pool_tokens,
        max_prompt_len=info.max_model_len if chunked else scheduler.max_num_batched_tokens,
        eos_token_ids=info.eos_token_ids,
        default_max_tokens=None if max_tokens is None else int(max_tokens),
        max_logprobs=info.max_logprobs,
        logprobs_mode=info.logprobs_mode,
        max_n=min(config.samples.max_n, scheduler.max_num_seqs + scheduler.max_num_waiting),
        embedding_size=info.hidden_size,
        pooling=Pooling[pooling],
        normalize=normalize,
    )
    return EngineReady(
        info,
        limits,
        scheduler.max_num_seqs,
        scheduler.max_num_waiting,
        start_seconds,
        defaults,
        due_after_arrival=scheduler.policy == "deadline",
        prefix_caching=config.cache.enable_prefix_caching,
    )
