"""Requests through a scheduler and a real runner, as an engine drives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxserve.config.settings import EngineConfig
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.programs.step_programs import ProgramKey
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.scheduler import Scheduler
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.plan import Wants
from tests.scheduler.drive import dispatch


@dataclasses.dataclass(frozen=True)
class Run:
    """Output tokens of each request, how often one was preempted, the forward programs that computed them, and the
    prompt tokens that they computed."""

    tokens: list[list[int]]
    num_preemptions: int
    programs: set[ProgramKey]
    prefill_tokens: int


def drive(
    runner: ModelRunner,
    config: EngineConfig,
    requests: Sequence[EngineRequest | Sequence[EngineRequest]],
    num_pages: int | None = None,
    poison: bool = True,
    **limits: object,
) -> Run:
    """Runs all requests to their end with one step in flight. num_pages is the pool's size, by default the config's.

    Requests in a sequence of their own are samples of one prompt. With poison every page holds it until a step writes
    there. limits are fields of SchedulerConfig.
    """
    if poison:
        runner._arrays.pools = [poisoned(pool) for pool in runner._arrays.pools]
    pool = PagePool(num_pages or config.cache.num_pages, config.cache.page_size)
    scheduler = Scheduler(
        dataclasses.replace(config.scheduler, **limits),
        pool,
        Buckets.from_config(config, "cpu"),
        group_windows=runner.info.group_windows,
    )
    sequences: list[Any] = []
    for request in requests:
        if isinstance(request, EngineRequest):
            sequences.append(scheduler.add(request))
        else:
            sequences += scheduler.add_samples(request, [Wants.NONE] * len(request))
    programs = set()
    prefill_tokens = 0
    in_flight = None
    while scheduler.unfinished or in_flight is not None:
        plan = scheduler.schedule()
        dispatched = None
        if plan is not None:
            programs.add(runner._shapes.forward_key(plan))
            prefill_tokens += plan.num_prefill_tokens
            dispatched = (plan, dispatch(runner, plan))
        if in_flight is not None:
            scheduler.update(in_flight[0], runner.collect(in_flight[1]))
        scheduler.check_integrity()
        in_flight = dispatched
    tokens = [sequence.output_token_ids for sequence in sequences]
    return Run(tokens, scheduler.num_preemptions, programs, prefill_tokens)


def poisoned(pool: jax.Array) -> jax.Array:
    """NaN in every dtype that has one, also where its bits are held as integers; the largest number of int8."""
    byte = 0x7F if pool.dtype == np.int8 else 0xFF
    host = np.full(pool.nbytes, byte, np.uint8).view(pool.dtype).reshape(pool.shape)
    return jax.device_put(host, may_alias=False)  # compiles nothing, which jnp.array does
