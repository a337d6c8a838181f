"""Hits of the prefix cache on real models, over pages that hold NaN before: the same bits as without it.

All steps are computed by programs of one size, so that tokens, log-probabilities and embeddings are equal to the bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jaxserve.config.failpoints import Failpoints
from jaxserve.config.scheduling import PreemptionConfig
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import AbortRequest, AddRequest, EngineOutput, FromEngine, outputs
from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.kv_cache.page_files import PageFiles
from jaxserve.models.config import ModelConfig
from jaxserve.request import EngineRequest, FinishReason, Pooling, RequestOptions
from jaxserve.runner.disk_pages import DiskPages
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.wrapper import RunnerWrapper
from tests.runner.drive import poisoned

DENSE = ModelConfig("LlamaForCausalLM", 96, 32, 48, 2, 4, 2, 32, 256, tie_word_embeddings=True)
WINDOW = ModelConfig.from_hf(
    {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "sliding_window": 21,
    }
)
CONFIG = EngineConfig(
    architecture=DENSE,
    load_format="dummy",
    scheduler=SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=64,
        long_prefill_token_threshold=32,
        preemption=PreemptionConfig(recompute_seconds_per_token=1.0, swap_seconds_per_page=1e-6),
    ),
    cache=CacheConfig(num_pages=64, page_size=16, swap_space=24 * 16384 / 2**30),
    token_buckets=(64,),
    row_buckets=(8,),
    seed=3,
)
PROMPT = tuple(range(3, 56))
"""53 tokens: three full pages and a part."""


@dataclasses.dataclass
class Answer:
    """All that a request was answered, log-probabilities and the embedding as the bytes that were sent."""

    tokens: tuple[int, ...] = ()
    scores: tuple[object, ...] = ()
    pooled: bytes = b""
    reason: FinishReason | None = None
    error: str = ""

    def add(self, output: EngineOutput) -> None:
        assert self.reason is None, "an output after the end"
        self.tokens += output.token_ids
        parts = (output.prompt_logprobs, output.logprobs)
        self.scores += tuple(row for one in parts if one is not None for row in one.columns().packed.tolist())
        self.pooled += output.pooled
        self.reason, self.error = output.finish_reason, output.error


class Engine:
    """An engine of its own over a module's runner, whose pages it fills with NaN. waits: for prefixes that others
    compute. num_pages: that it uses; None for all. secret: file of that of its content keys. cached: tokens that each
    ended request found."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        caching: bool = True,
        waits: bool = False,
        num_pages: int | None = None,
        secret: str | None = None,
    ):
        runner._failpoints = Failpoints(())
        runner.reset()
        runner._arrays.pools = [poisoned(pool) for pool in runner._arrays.pools]
        admission = dataclasses.replace(CONFIG.scheduler.admission, wait_for_prefix=waits)
        config = dataclasses.replace(
            CONFIG,
            cache=dataclasses.replace(CONFIG.cache, enable_prefix_caching=caching),
            scheduler=dataclasses.replace(CONFIG.scheduler, admission=admission),
        )
        if secret is not None:
            cache = dataclasses.replace(config.cache, prefix_caching_secret_file=secret)
            config = dataclasses.replace(config, cache=cache)
        used = RunnerWrapper(runner)
        if num_pages is not None:
            used.info = dataclasses.replace(runner.info, num_pages=num_pages)
        self.core = EngineCore(config, used)
        self.answers: dict[str, Answer] = {}
        self.cached: dict[str, int] = {}

    def send(self, *requests: EngineRequest) -> None:
        for one in requests:
            self.answers[one.request_id] = Answer()
            assert self.core.handle(AddRequest(one)) == []

    def take(self, messages: list[FromEngine]) -> None:
        for output in (one for message in messages for one in outputs(message)):
            self.answers[output.request_id].add(output)
            if output.finish_reason is not None:
                self.cached[output.request_id] = output.num_cached_tokens

    def step(self) -> None:
        self.take(self.core.step())
        self.core.check_integrity()

    def serve(self, *requests: EngineRequest) -> list[Answer]:
        self.send(*requests)
        while self.core.busy:
            self.step()
        return [self.answers[one.request_id] for one in requests]


@pytest.fixture(scope="module", params=[DENSE, WINDOW], ids=["dense", "window"])
def runner(request) -> ModelRunner:
    return ModelRunner(dataclasses.replace(CONFIG, architecture=request.param))


@pytest.fixture
def start(runner) -> Iterator[Callable[..., Engine]]:
    """Makes engines with the cache, and checks in the end that they are idle and whole."""
    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        made.append(Engine(runner, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.core.check_integrity()
        assert engine.core.stats().pages_used == 0
        assert engine.core.runner.compile_misses == 0


def ask(name: str, prompt: tuple[int, ...] = PROMPT, max_tokens: int = 5, **fields) -> EngineRequest:
    return EngineRequest(name, prompt, max_tokens, logprobs=3 if "pooling" not in fields else None, **fields)


def undisturbed(runner: ModelRunner, *requests: EngineRequest) -> list[Answer]:
    """The answers of each request alone, by an engine without a cache."""
    engine = Engine(runner, caching=False)
    return [engine.serve(one)[0] for one in requests]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}, {"repetition_penalty": 1.3}])
def test_a_hit_changes_no_bit(runner, start, sampling):
    requests = [
        ask("first", **sampling),
        ask("same", **sampling),
        ask("longer", (*PROMPT, 7, 8, 9), **sampling),
        ask("branch", (*PROMPT[:40], 1, 2, 3), **sampling),
        ask("shorter", PROMPT[:48], **sampling),
    ]
    expected = undisturbed(runner, *requests)
    engine = start()
    assert [engine.serve(one)[0] for one in requests] == expected
    assert engine.cached == {"first": 0, "same": 48, "longer": 48, "branch": 32, "shorter": 32}
    counts = engine.core.scheduler.prefix_counts
    assert (counts.queries, counts.hits, counts.hit_tokens) == (5, 4, 160)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}])
def test_pages_that_come_back_from_host_memory_change_no_bit(runner, start, sampling):
    """Seven pages hold one request at a time, so each loses its pages to the next one."""
    others = [ask(f"other {index}", tuple(index + place % 60 for place in range(100)), 3) for index in (1, 30)]
    requests = [ask("first", **sampling), others[0], ask("same", **sampling), others[1], ask("again", **sampling)]
    expected = undisturbed(runner, *requests)
    engine = start(num_pages=8)
    assert [engine.serve(one)[0] for one in requests] == expected
    assert (engine.cached["same"], engine.cached["again"]) == (48, 48)
    stats = engine.core.stats()
    assert stats.host_cache_hits == 2
    assert stats.host_cache_choices == {"fetched": 2, "computed": 0, "wrong": 0} | stats.host_cache_choices
    assert stats.host_pages_free + stats.host_pages_cached == runner.info.num_host_pages > 0
    assert stats.page_bytes * stats.host_pages_cached > 0


def test_pages_that_come_back_from_disk_change_no_bit(runner, start, tmp_path):
    """Two engines, one after the other, on one directory; of the second prompt's pages the last is damaged."""
    requests = [ask("first", temperature=1.0, seed=5), ask("second", (5, *PROMPT)), ask("third", (6, *PROMPT))]
    expected = undisturbed(runner, *requests)

    (tmp_path / "secret").write_bytes(b"a secret of these tests")

    def serve() -> dict[str, int]:
        files = PageFiles(str(tmp_path / "pages"), b"m" * 16, b"s" * 16, runner.info.page_bytes, 1 << 30)
        runner.disk = disk = DiskPages(files, runner._host_pages.make, runner._host_pages.put)
        engine = start(num_pages=9, secret=str(tmp_path / "secret"))
        assert [engine.serve(one)[0] for one in requests] == expected
        assert disk.wait(10)
        engine.core.close()
        return engine.cached

    try:
        assert serve() == {"first": 0, "second": 0, "third": 0}
        keys = ContentKeys(b"a secret of these tests")
        key = keys.links(keys.root("", ""), (5, *PROMPT)[:48], 16)[-1]
        path = tmp_path / "pages" / f"{key.hex()}.page"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
        left = 32 if runner.info.group_windows == (None,) else 0  # the window had no need of the first page
        assert serve() == {"first": 48, "second": left, "third": 48}
        assert serve() == {"first": 48, "second": 48, "third": 48}
    finally:
        runner.disk = None


@pytest.mark.parametrize("waits", [False, True])
def test_a_prompt_in_progress_is_found(runner, start, waits):
    """The second request joins when two pages of the first one are computed, or waits until all of them are."""
    requests = [ask("first", PROMPT * 2), ask("second", (*PROMPT * 2, 4))]
    engine = start(waits=waits)
    engine.send(requests[0])
    engine.step()
    assert engine.core.scheduler.num_running == 1
    engine.send(requests[1])
    engine.step()
    running = [*engine.core.scheduler._queues.running.prefilling.values()]
    assert [one.num_cached_tokens for one in running] == ([0] if waits else [0, 32])
    assert running[0].num_computed < running[0].num_prompt_tokens
    engine.serve()
    assert engine.cached["second"] == (96 if waits else 32)
    assert [*engine.answers.values()] == undisturbed(runner, *requests)


def test_a_chat_finds_its_own_answer(runner, start):
    first = ask("first", PROMPT, 40, temperature=1.0, seed=1)
    engine = start()
    (answer,) = engine.serve(first)
    second = ask("second", (*PROMPT, *answer.tokens, 9, 8, 7))
    assert engine.serve(second) == undisturbed(runner, second)
    assert engine.cached["second"] == 80, "53 + 39 tokens are computed, five full pages"


def test_a_request_of_one_token_fills_the_cache(runner, start):
    engine = start()
    engine.serve(ask("first", max_tokens=1))
    assert engine.serve(ask("second")) == undisturbed(runner, ask("second"))
    assert engine.cached["second"] == 48


def test_requests_that_begin_in_one_step_are_each_computed(runner, start):
    requests = [ask(f"r{index}", PROMPT[:20], temperature=1.0, seed=index) for index in range(3)]
    engine = start()
    engine.send(*requests)
    engine.step()
    assert engine.core.scheduler.num_running == 3
    assert engine.serve() == []
    assert [*engine.answers.values()] == undisturbed(runner, *requests)
    assert set(engine.cached.values()) == {0}
    engine.serve(ask("later", PROMPT[:20]))
    assert engine.cached["later"] == 16


def test_prompt_logprobs_are_computed_from_the_first_that_is_reported_and_fill_the_cache(runner, start):
    scored = ask("scored", max_tokens=1, prompt_logprobs=2)
    end = ask("end", max_tokens=2, prompt_logprobs=1, prompt_logprobs_start=49)
    edge = dataclasses.replace(end, request_id="edge", prompt_logprobs_start=48)
    expected = undisturbed(runner, scored, end, edge, ask("plain"))
    engine = start()
    assert engine.serve(scored) == expected[:1]
    assert [engine.serve(one)[0] for one in (end, edge, ask("plain"))] == expected[1:]
    again = dataclasses.replace(scored, request_id="again")
    assert engine.serve(again) == expected[:1]
    # Token 49 is scored from the hidden state of token 48, behind three pages; token 48 from one in the third page.
    assert engine.cached == {"scored": 0, "end": 48, "edge": 32, "plain": 48, "again": 0}


def test_embeddings_read_the_cache_only_for_the_last_token_and_fill_it(runner, start):
    embedded = {kind: ask(kind.name, max_tokens=1, pooling=kind) for kind in Pooling}
    expected = undisturbed(runner, *embedded.values(), ask("plain"))
    engine = start()
    found = [engine.serve(one)[0] for one in (*embedded.values(), ask("plain"))]
    assert all(one.pooled for one in found[:-1])
    assert found == expected
    again = dataclasses.replace(embedded[Pooling.LAST], request_id="again")
    assert engine.serve(again) == [expected[list(embedded).index(Pooling.LAST)]]
    assert engine.cached["again"] == engine.cached["plain"] == 48
    assert engine.cached[Pooling.MEAN.name] == engine.cached[Pooling.CLS.name] == 0


@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.CLS])
def test_an_embedding_fills_the_cache(start, pooling):
    engine = start()
    engine.serve(ask("embedded", max_tokens=1, pooling=pooling))
    engine.serve(ask("plain"))
    assert engine.cached["plain"] == 48


def test_who_opts_out_reads_and_fills_nothing(runner, start):
    out = RequestOptions(prefix_caching=False)
    expected = undisturbed(runner, ask("first"))
    engine = start()
    assert engine.serve(ask("first", options=out)) == expected
    assert engine.core.scheduler.pool.num_cached == 0
    assert engine.serve(ask("second")) == expected
    assert engine.serve(ask("third", options=out)) == expected
    assert engine.cached == {"first": 0, "second": 0, "third": 0}
    assert engine.core.scheduler.prefix_counts.queries == 1


def test_tenants_and_salts_find_their_own_pages_alone(runner, start):
    named = [RequestOptions(tenant, cache_salt=salt) for tenant in ("", "a", "b") for salt in ("", "a", "s")]
    requests = [ask(f"r{index}", options=options) for index, options in enumerate(named)]
    (expected,) = undisturbed(runner, ask("plain"))
    engine = start()
    assert [engine.serve(one)[0] for one in requests] == [expected] * 9
    assert set(engine.cached.values()) == {0}
    assert engine.serve(dataclasses.replace(requests[4], request_id="again")) == [expected]
    assert engine.cached["again"] == 48


@pytest.mark.parametrize(("after", "most"), [(0, 0), (1, 32)])
@pytest.mark.parametrize("point", ["pack", "enqueue"])
def test_a_row_that_fails_alone_leaves_nothing_that_it_did_not_compute(runner, start, point, after, most):
    """Its prompt takes two steps; beside it another is computed, which is none the worse."""
    other = ask("other", PROMPT[::-1])
    expected = undisturbed(runner, ask("good"), other)
    engine = start()
    runner._failpoints = Failpoints((f"{point}=raise,request=bad,after={after}",))
    bad, beside = engine.serve(ask("bad"), other)
    assert bad.reason is FinishReason.ERROR
    assert beside == expected[1]
    assert engine.serve(ask("good")) == expected[:1]
    assert engine.cached["good"] <= most
    assert engine.serve(ask("again")) == expected[:1]
    assert engine.cached["again"] == 48


@pytest.mark.parametrize("point", ["execute", "collect"])
def test_nothing_is_found_after_a_device_fault(runner, start, point):
    other = ask("other", PROMPT[::-1])
    expected = undisturbed(runner, ask("first"), other)
    engine = start()
    engine.serve(ask("first"))
    assert engine.core.scheduler.pool.num_cached == 3
    runner._failpoints = Failpoints((f"{point}=raise,times=1,after=1",))
    assert engine.serve(other) == expected[1:]
    assert engine.serve(ask("again")) == expected[:1]
    assert engine.cached["again"] == 0
    assert engine.serve(ask("at last")) == expected[:1]
    assert engine.cached["at last"] == 48


def test_an_aborted_request_leaves_what_it_has_computed(runner, start):
    expected = undisturbed(runner, ask("second", PROMPT * 2))
    engine = start()
    engine.send(ask("first", PROMPT * 2))
    engine.step()
    engine.step()
    engine.take(engine.core.handle(AbortRequest("first")))
    assert engine.answers["first"].reason is FinishReason.ABORT
    assert engine.serve(ask("second", PROMPT * 2)) == expected
    assert engine.cached["second"] == 64, "and so is the step in flight"
