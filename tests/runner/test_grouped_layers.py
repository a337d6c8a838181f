"""Models whose layers have windows, through scheduler and runner: groups of layers share the pool, and pages that a
window has left are NaN before anyone else writes there."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config.scheduling import PreemptionConfig
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.layer_groups import LayerGroups, pages_held
from jaxserve.models.layer_specs import LayerSpec, MLPSpec, SelfAttentionSpec
from jaxserve.pallas_kernels.paged_attention.triton.backend import DEPRECATION
from jaxserve.planning.reports.compile_report import Compiler
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs import step_programs
from jaxserve.programs.compiler import compile_program, fresh_compilations, program_memory
from jaxserve.programs.step_programs import ProgramKey, abstract_pools
from jaxserve.programs.target_devices import load_target, target_mesh
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.scheduler import Scheduler, StepPlan
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.plan import Wants
from tests.models import generate
from tests.runner.drive import drive
from tests.scheduler.drive import dispatch

PAGE = 16
LENGTHS = ((70, 40), (5, 60), (33, 50), (64, 20), (90, 64))
"""Tokens of prompts and of outputs; the windows are 17, 20 and 40."""


def layers(*windows: int | None) -> tuple[LayerSpec, ...]:
    return tuple(LayerSpec(SelfAttentionSpec(sliding_window=window), MLPSpec(48)) for window in windows)


BASE = ModelConfig("LlamaForCausalLM", 96, 32, 48, 4, 2, 1, 32, 320)
MODELS = {
    # Two groups of two layers.
    "alternating": dataclasses.replace(BASE, layers=layers(20, None, 20, None), sliding_window=20),
    # Groups of two layers: one without a window, two of window 17, of which the last lacks a layer.
    "padded": dataclasses.replace(BASE, layers=layers(17, 17, None, 17, None), num_hidden_layers=5, sliding_window=17),
    "mistral": dataclasses.replace(BASE, architecture="MistralForCausalLM", sliding_window=40),
}
WINDOWS = {"alternating": (None, 20), "padded": (None, 17, 17), "mistral": (40,)}


def config(name: str) -> EngineConfig:
    return EngineConfig(
        architecture=MODELS[name],
        load_format="dummy",
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
        cache=CacheConfig(num_pages=80, swap_space=0.001),
        token_buckets=(16, 64),
        row_buckets=(8,),
        max_model_len=320,
        seed=1,
    )


@functools.cache
def runner(name: str) -> ModelRunner:
    return ModelRunner(config(name))


@functools.cache
def request(number: int) -> EngineRequest:
    prompt, output = LENGTHS[number]
    ids = np.random.RandomState(number).randint(0, BASE.vocab_size, prompt)
    return EngineRequest(f"r{number}", tuple(ids.tolist()), max_tokens=output)


@functools.cache
def expected(name: str, number: int) -> list[int]:
    """The tokens of dense attention with windows: the whole sequence anew for every token, padded to one length."""
    drawn = params.random_params(MODELS[name], "float32", params.make_mesh(), 1)
    one, longest = request(number), 160
    tokens = np.zeros(longest, np.int32)
    end = len(one.prompt_token_ids)
    tokens[:end] = one.prompt_token_ids
    for place in range(end, end + one.max_tokens):
        tokens[place] = np.argmax(generate.dense_logits(MODELS[name], drawn, jnp.asarray(tokens))[place - 1])
    return tokens[end : end + one.max_tokens].tolist()


@functools.partial(jax.jit, donate_argnums=0)
def poisoned(pools: list[jax.Array], pages: jax.Array) -> list[jax.Array]:
    """Pools with NaN in all pages that are True in `pages`, bool [N]."""
    return [jnp.where(pages[:, None, None, None, None], jnp.nan, pool) for pool in pools]


@dataclasses.dataclass
class Served:
    """Tokens of each request, the most pages that one held in each group, preemptions by kind, and tokens found."""

    tokens: dict[str, list[int]]
    most: np.ndarray
    preemptions: dict[str, int]
    cached_tokens: int


def kept(scheduler: Scheduler, plan: StepPlan) -> set[int]:
    """Pages whose content the steps from `plan` on may read: of tables and copies, and of the prefix cache."""
    sequences = [scheduler._sequences[name] for name in scheduler.request_ids]
    pages = {page for sequence in sequences for page in sequence.live_pages}
    for row in plan.rows:
        pages -= {page for table in (row.new_pages, *row.more_pages) for page in table}
    pages |= {page for table in scheduler._queues.sharing.tables for page in table}
    pages |= {copy.source for copy in plan.copies if copy.source_tier.value == "active"}
    return pages | set(scheduler.pool._pages.cached)


def serve(name: str, requests: Sequence[EngineRequest], pages: int = 80, caches: bool = False, **limits) -> Served:
    """Runs requests as an engine does; before every step all pages that nobody may read become NaN."""
    made, settings = runner(name), config(name)
    scheduler = Scheduler(
        dataclasses.replace(settings.scheduler, **limits),
        PagePool(pages, PAGE, made.info.num_host_pages),
        Buckets.from_config(settings, "cpu"),
        group_windows=made.info.group_windows,
        content_keys=ContentKeys() if caches else None,
    )
    sequences = [scheduler.add(one) for one in requests]
    most = np.zeros(len(made.info.group_windows), int)
    in_flight = None
    for _ in range(2_000):
        if not scheduler.unfinished and in_flight is None:
            break
        plan = scheduler.schedule()
        scheduler.check_integrity()
        for sequence in sequences:
            held = [len(table) - left for table, left in zip(sequence.tables, sequence.left, strict=True)]
            most = np.maximum(most, held)
        dispatched = None
        if plan is not None:
            stale = np.ones(made.info.num_pages, bool)
            stale[list(kept(scheduler, plan))] = False
            made._arrays.pools = poisoned(made._arrays.pools, jnp.asarray(stale))
            dispatched = plan, dispatch(made, plan)
        if in_flight is not None:
            scheduler.update(in_flight[0], made.collect(in_flight[1]))
            scheduler.check_integrity()
        in_flight = dispatched
    assert not scheduler.unfinished, "no progress"
    tokens = {sequence.request_id: sequence.output_token_ids for sequence in sequences}
    found = scheduler.prefix_counts.hit_tokens + scheduler.prefix_counts.returned_tokens
    return Served(tokens, most, scheduler.num_preemptions_by_kind, found)


def check(name: str, served: Served) -> None:
    for request_id, tokens in served.tokens.items():
        assert tokens == expected(name, int(request_id[1])), request_id


@pytest.mark.parametrize("name", MODELS)
def test_the_groups_of_a_runner(name):
    assert runner(name).info.group_windows == WINDOWS[name]
    arrays = runner(name)._arrays
    assert len(arrays.pools) == (4 if name == "mistral" else 2)
    assert arrays.slots.page_table.shape == (*([] if name == "mistral" else [len(WINDOWS[name])]), 8, 20)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_dense_attention(name):
    """Alone, and all together: chunks of a prompt then share steps with others, and windows leave pages meanwhile."""
    alone = serve(name, [request(4)])
    check(name, alone)
    check(name, serve(name, [request(number) for number in range(5)]))
    check(name, serve(name, [request(number) for number in range(5)], max_num_batched_tokens=16))
    for window, held in zip(WINDOWS[name], alone.most, strict=True):
        assert held == -(-153 // PAGE) if window is None else held <= pages_held(window, 154, PAGE, 64)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["recompute", "swap"])
def test_tokens_after_preemptions(name, kind):
    groups = WINDOWS[name]
    most = sum(pages_held(window, 154, PAGE, 64) for window in groups)
    requests = [request(number) for number in range(5)]
    served = serve(name, requests, most + 2, preemption=PreemptionConfig(preemption_mode=kind))
    check(name, served)
    assert served.preemptions[kind] > 0


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_is_found_where_every_group_has_what_its_window_reaches(name):
    """The second turn of a chat finds all full pages of the first, although the windows have left most of them."""
    first = request(4)
    turn = dataclasses.replace(
        first,
        request_id="r4 again",
        prompt_token_ids=(*first.prompt_token_ids, *expected(name, 4)[:40]),
        max_tokens=24,
        arrival_time=1.0,
    )
    served = serve(name, [first, turn], caches=True, max_num_seqs=1)
    assert served.tokens["r4"] == expected(name, 4)
    assert served.tokens["r4 again"] == expected(name, 4)[40:]
    assert served.cached_tokens == 129 // PAGE * PAGE


@pytest.mark.parametrize("name", ["alternating", "mistral"])
def test_samples_of_a_prompt(name):
    """Those that begin later find the prompt while its pages are there, and compute it again where a window has left
    them."""
    first = dataclasses.replace(request(0), max_tokens=30)
    requests = [dataclasses.replace(first, request_id=f"r{number}") for number in range(6)]
    made, settings = runner(name), config(name)
    scheduler = Scheduler(
        dataclasses.replace(settings.scheduler, max_num_seqs=2),
        PagePool(40, PAGE),
        Buckets.from_config(settings, "cpu"),
        group_windows=made.info.group_windows,
    )
    sequences = scheduler.add_samples(requests, [Wants.NONE] * 6)
    while (plan := scheduler.schedule()) is not None:
        scheduler.update(plan, made.collect(dispatch(made, plan)))
        scheduler.check_integrity()
    assert all(one.output_token_ids == expected(name, 0)[:30] for one in sequences)


@pytest.mark.slow(reason="compiles the programs of two engines that the cache cannot tell apart")
def test_quantized_pages_have_the_scales_of_their_layers(monkeypatch):
    """Layers that share an array keep scales of their own: tokens are those of one table and array for each layer."""
    found = []
    requests = [request(number) for number in (1, 2)]
    settings = dataclasses.replace(
        config("alternating"),
        cache=CacheConfig(num_pages=80, kv_cache_dtype="int8"),
        token_buckets=(64,),
        compilation_cache_dir=None,  # it would hand on the programs of other groups
    )
    alone = LayerGroups(4, (None,), tuple((0, layer) for layer in range(4)))
    for grouped in (True, False):
        if not grouped:
            monkeypatch.setattr(step_programs, "layer_groups", lambda *_: alone)
        made = ModelRunner(settings)
        assert made.info.group_windows == ((None, 20) if grouped else (None,))
        assert len(made._arrays.pools) == (2 if grouped else 4)
        found.append(drive(made, settings, requests).tokens)
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------------------ programs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["forward", "swap_in", "page_copy", "table_write"])
def test_no_program_copies_a_pool_that_layers_share(kind, dtype):
    model = dataclasses.replace(MODELS["padded"], dtype=dtype, head_dim=64)  # which native kernels take, where they run
    shapes = dataclasses.replace(
        resolve_shapes(dataclasses.replace(config("padded"), architecture=model), "cpu"), num_pages=2048
    )
    size = {"forward": 64, "swap_in": 4, "page_copy": 16, "table_write": 64}[kind]
    program = compile_program(ProgramKey(kind, size), shapes, params.make_mesh())
    (first, *_) = pools = abstract_pools(shapes, params.make_mesh())
    assert len(pools) == 2 < len(model.layer_specs)
    pool = first.size * first.dtype.itemsize
    shape = re.escape(f"[{','.join(map(str, first.shape))}]")
    text, memory = program.as_text() or "", program_memory(program)
    assert bool(re.search(shape, text)) == (kind != "table_write")
    assert not re.search(rf"= \w+{shape}\S* (copy|transpose|convert)\(", text)
    assert memory.temporaries < pool
    assert memory.aliased >= (0 if kind == "table_write" else pool * len(pools))


@pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:DeprecationWarning")
@pytest.mark.parametrize("key", [ProgramKey("decode", 64), ProgramKey("forward", 64)], ids=lambda key: key.kind)
def test_programs_for_an_h200_write_shared_pools_in_place(key):
    target = load_target("h200")
    mesh = target_mesh(target)
    windows = (128, None, 128, None)
    specs = tuple(LayerSpec(SelfAttentionSpec(sliding_window=window, sinks=True), MLPSpec(1024)) for window in windows)
    model = ModelConfig(
        "LlamaForCausalLM", 4096, 512, 1024, 4, 8, 2, 64, 2048, dtype="bfloat16", layers=specs, sliding_window=128
    )
    settings = EngineConfig(
        architecture=model,
        load_format="dummy",
        scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=64),
        cache=CacheConfig(num_pages=4096),
        token_buckets=(64,),
        row_buckets=(64,),
    )
    shapes = dataclasses.replace(resolve_shapes(settings, "gpu"), num_pages=4096)
    assert (shapes.groups.size, shapes.groups.windows) == (2, (None, 128))
    with fresh_compilations():
        _, inspected = Compiler(shapes, mesh, target, context=1024).compile(key, bundle=False)
    report = inspected.report
    assert report.problems(target) == []
    assert report.pool_copies == 0
    assert (report.command_buffers, report.outside_command_buffers) == (1, 0)
    assert report.alias_bytes == report.donated_bytes > report.pool_bytes == 2 * 4096 * 2 * 2 * 16 * 64 * 2
    assert 0 < report.temp_bytes < report.pool_bytes
