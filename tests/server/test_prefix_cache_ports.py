"""The prefix cache as clients see it: over both ports, with keys of two tenants, of a model of random weights."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import grpc
import httpx
import pytest
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.config.access_config import AccessConfig
from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.config.settings import CacheConfig, EngineConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.models.config import ModelConfig
from jaxserve.models.tiny.tiny_tokenizer import VOCAB_SIZE
from jaxserve.serving.clients.client_credentials import Credentials
from jaxserve.serving.clients.http_client import HttpClient
from tests.server.access_harness import KeyFile, Secured, secured
from tests.server.test_metrics_route import samples
from tests.server.vllm_harness import ids

PAGE = 16
MODEL = ModelConfig("LlamaForCausalLM", VOCAB_SIZE, 16, 32, 1, 2, 1, 32, 256, tie_word_embeddings=True, dtype="float32")
CONFIG = EngineConfig(
    architecture=MODEL,
    load_format="dummy",
    dtype="float32",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16),
    token_buckets=(16,),
    row_buckets=(8,),
    cache=CacheConfig(num_pages=65),
)


@dataclasses.dataclass
class Server:
    """A server with keys by name; `engine` counts what is computed."""

    parts: Secured
    keys: dict[str, str]
    engine: InlineEngine

    def post(self, key: str, path: str, **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys[key]}"}
        return httpx.post(f"http://{self.parts.http.address}{path}", json=body or None, headers=headers, verify=False)

    def cached(self, key: str, prompt: str, path: str = "/v1/completions", **body: Any) -> int:
        """Tokens of a completion's prompt that were found, as its usage says."""
        answer = self.post(key, path, prompt=prompt, max_tokens=1, temperature=0, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    def warmed(self, key: str, **body: Any) -> tuple[int, int, int]:
        answer = self.post(key, "/v1/cache/warm_up", **body)
        assert answer.status_code == 200, answer.text
        return tuple(answer.json()[f"{name}_tokens"] for name in ("prompt", "cached", "computed"))

    def flushed(self) -> int:
        return self.post("admin", "/reset_prefix_cache").json()["freed_pages"]

    def metrics(self) -> dict[str, float]:
        return samples(self.parts.get("/metrics", self.keys["admin"]).text)

    def client(self, key: str):
        return self.parts.client(self.keys[key])

    def http(self, key: str) -> HttpClient:
        return HttpClient(f"http://{self.parts.http.address}", Credentials(self.keys[key]))

    @property
    def computed(self) -> int:
        """Tokens computed since the start, padding left out."""
        return self.engine.core._totals["computed_tokens"]


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    file = KeyFile(
        tmp_path_factory.mktemp("keys") / "keys",
        a={"kv_events": True},
        b={"kv_events": True},
        admin={"admin": True},
        all={"admin": True, "kv_events": True, "tenant": ""},
    )
    engine = InlineEngine(CONFIG)
    with secured(tokenizer, AccessConfig(api_keys=str(file.path), kv_events=True), client=engine) as parts:
        yield Server(parts, file.keys, engine)


@pytest.fixture(autouse=True)
def empty(server):
    server.flushed()


PROMPT = "a prompt of more than three pages of sixteen tokens, the last one of which is not full"
"""87 tokens with <bos>: five full pages."""
FOUND = 80


def test_a_second_identical_request_finds_all_full_pages(server):
    assert len(PROMPT) + 1 == 87
    assert [server.cached("a", PROMPT) for _ in range(2)] == [0, FOUND]
    answer = server.post("a", "/v1/embeddings", input=PROMPT).json()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": FOUND}
    with server.client("a") as client, server.http("a") as http:
        assert client.generate_text(PROMPT, {"max_tokens": 1}).usage.cached_tokens == FOUND
        assert http.generate_text(PROMPT, {"max_tokens": 1}).usage.cached_tokens == FOUND
        assert http.generate_text(PROMPT, {"max_tokens": 1}, prefix_caching=False).usage.cached_tokens == 0
        assert client.generate_text(PROMPT, {"max_tokens": 1}, prefix_caching=False).usage.cached_tokens == 0
        assert http.generate_text(PROMPT, {"max_tokens": 1}, cache_salt="s").usage.cached_tokens == 0


def test_a_request_that_opts_out_neither_reads_nor_fills(server):
    assert [server.cached("a", PROMPT, prefix_caching=False) for _ in range(2)] == [0, 0]
    assert server.cached("a", PROMPT) == 0, "nothing was filled"
    assert server.cached("a", PROMPT, prefix_caching=False) == 0, "nothing is read"
    answer = server.post("a", "/v1/completions", prompt="a", prefix_caching="no")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prefix_caching")
    answer = server.post("a", "/v1/embeddings", input="a", prefix_caching=1)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prefix_caching")


def test_salts_of_one_tenant_share_nothing(server):
    assert server.cached("a", PROMPT, cache_salt="one") == 0
    assert server.cached("a", PROMPT, cache_salt="two") == 0
    assert server.cached("a", PROMPT) == 0
    assert server.cached("a", PROMPT, cache_salt="one") == FOUND


def test_one_tenant_never_finds_nor_learns_of_the_pages_of_another(server):
    """Same tokens, same text of a salt. What b is told is the same whether a has asked before or not."""

    def asked_by_b() -> list[Any]:
        before, found = server.computed, []
        for body in ({}, {"cache_salt": "s"}):
            found.append(server.cached("b", PROMPT, **body))
            found.append(server.computed - before)
            answer = server.post("b", "/v1/embeddings", input=PROMPT, **body).json()
            found.append(answer["usage"])
        found.append(server.warmed("b", prompt=PROMPT))
        with server.client("b") as client:
            usage = client.generate_text(PROMPT, {"max_tokens": 1}, cache_salt="t").usage
            found += [usage.cached_tokens, server.computed - before, client.server_info().HasField("stats")]
        found += [server.post("b", path).status_code for path in ("/debug/timeline", "/reset_prefix_cache")]
        found.append(server.parts.get("/metrics", server.keys["b"]).status_code)
        found.append(asyncio.run(loads(server, "b")))
        return found

    alone = asked_by_b()
    assert 403 in alone
    server.flushed()
    for body in ({}, {"cache_salt": "s"}, {"cache_salt": "t"}):
        assert [server.cached("a", PROMPT, **body) for _ in range(2)] == [0, FOUND]
    assert asked_by_b() == alone
    assert not any("tenant" in name or "'a'" in name or "'b'" in name for name in server.metrics())


async def loads(server: Server, key: str) -> float:
    """The hit rate that GetLoads tells one key, after two requests by it."""
    metadata = (("authorization", f"Bearer {server.keys[key]}"),)
    async with grpc.aio.insecure_channel(server.parts.grpc.address) as channel:
        stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        (load,) = (await stub.GetLoads(pb.GetLoadsRequest(), metadata=metadata)).loads
        return load.cache_hit_rate


def test_a_gateway_is_told_of_its_own_hits_and_pages(server):
    tokens = ids(PROMPT)

    async def body() -> None:
        async with grpc.aio.insecure_channel(server.parts.grpc.address) as channel:
            stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            keys = {name: (("authorization", f"Bearer {key}"),) for name, key in server.keys.items()}
            calls = {
                name: stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(), metadata=keys[name])
                for name in ("a", "b", "all")
            }
            for call in calls.values():
                await call.read()
            params = pb.SamplingParams(temperature=0, max_tokens=1)
            request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=tokens), sampling_params=params)
            for name, found in (("a", 0), ("a", FOUND), ("b", 0)):
                (answer,) = [one async for one in stub.Generate(request, metadata=keys[name])]
                assert answer.complete.cached_tokens == found, name
            rates = {}
            for name in ("a", "b", "all"):
                (load,) = (await stub.GetLoads(pb.GetLoadsRequest(), metadata=keys[name])).loads
                rates[name] = load.cache_hit_rate
            assert rates == {"a": FOUND / 172, "b": 0.0, "all": FOUND / 258}
            answer = await stub.FlushCache(common_pb2.FlushCacheRequest(), metadata=keys["admin"])
            assert answer.success
            told = {name: [] for name in calls}
            for name, call in calls.items():
                cleared = False
                while not cleared:
                    for event in (await call.read()).events:
                        told[name] += [tuple(block.token_ids) for block in event.stored.blocks]
                        cleared = event.WhichOneof("data") == "cleared"
                call.cancel()
            pages = [tuple(tokens[start : start + PAGE]) for start in range(0, FOUND, PAGE)]
            assert told == {"a": pages, "b": pages, "all": pages * 2}, "each of its own, once"

    asyncio.run(body())


def test_a_warm_up_computes_what_is_missing_and_generates_nothing(server):
    assert server.warmed("a", prompt=PROMPT) == (87, 0, 87)
    before = server.computed
    assert server.warmed("a", prompt=PROMPT) == (87, FOUND, 7)
    assert server.computed - before == 7
    assert server.warmed("a", prompt=PROMPT, cache_salt="s") == (87, 0, 87)
    assert server.cached("a", PROMPT) == FOUND
    assert server.cached("a", PROMPT[:40]) == 32
    assert server.warmed("a", prompt=[PROMPT, PROMPT[::-1]]) == (174, FOUND, 94)
    exact = ids(PROMPT)[: 2 * PAGE]
    assert server.warmed("a", prompt=exact) == (32, 0, 32)
    assert server.warmed("a", prompt=[*exact, 5]) == (33, 32, 1), "a full last page is kept too"
    with server.client("b") as client, server.http("b") as http:
        found = client.warm_prefix(PROMPT, cache_salt="s")
        assert (found.prompt_tokens, found.cached_tokens, found.computed_tokens) == (87, 0, 87)
        warmed = http.warm_prefix(PROMPT, cache_salt="s")
        assert (warmed.num_prompt_tokens, warmed.num_cached_tokens, warmed.num_computed_tokens) == (87, FOUND, 7)
        assert client.generate_text(PROMPT, {"max_tokens": 1}, cache_salt="s").usage.cached_tokens == FOUND


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "a", "max_tokens": 1}, "body has the unknown field 'max_tokens'"),
        ({"prompt": "a", "stream": True}, "body has the unknown field 'stream'"),
        ({"model": "echo"}, "body has no prompt or messages"),
        ({"prompt": "a", "messages": []}, "body has both prompt and messages"),
        ({"prompt": "a", "prefix_caching": False}, "prefix_caching is false; a warm-up fills the prefix cache"),
        ({"prompt": "a", "tenant": "b"}, "tenant is 'b'; requests of this key belong to 'a'"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "a" * 300}, "prompt has 301 tokens; at most max_model_len 256 are allowed"),
    ],
)
def test_warm_ups_that_are_refused(server, body, message):
    answer = server.post("a", "/v1/cache/warm_up", **body)
    assert answer.status_code == (403 if "tenant" in body else 400)
    assert answer.json()["error"]["message"].startswith(message)


def test_a_flush_is_an_administrators_and_frees_what_nobody_runs(server):
    server.cached("a", PROMPT)
    assert server.post("a", "/reset_prefix_cache").status_code == 403
    assert server.cached("a", PROMPT) == FOUND
    assert server.flushed() == 5
    assert server.flushed() == 0
    assert server.cached("a", PROMPT) == 0
    with server.client("a") as client, server.client("admin") as admin, server.http("admin") as http:
        with pytest.raises(grpc.RpcError, match="FlushCache concerns the whole server and needs an admin's key"):
            client.flush_cache()
        assert admin.flush_cache() == 5
        assert http.flush_cache() == 0


def test_the_metrics_count_tokens_requests_and_evictions(server):
    before = server.metrics()
    server.cached("a", PROMPT)
    server.cached("a", PROMPT)
    server.cached("a", "short")
    server.cached("a", PROMPT, prefix_caching=False)
    assert server.flushed() == 5
    for number in range(14):  # more pages than there are
        server.cached("a", f"{number:02} {PROMPT}")
    now = server.metrics()
    counted = {name: now[name] - before[name] for name in now if name.startswith("prefix_cache")}
    evicted = counted.pop("prefix_cache_evictions_total{'cause': 'capacity'}")
    assert evicted >= 14 * 5 - 64
    assert counted == {
        "prefix_cache_queries_total": 2 * 87 + 6 + 14 * 90,
        "prefix_cache_hits_total": FOUND,
        "prefix_cache_requests_total{'result': 'hit'}": 1,
        "prefix_cache_requests_total{'result': 'miss'}": 16,
        "prefix_cache_returned_tokens_total": 0,
        "prefix_cache_evictions_total{'cause': 'flush'}": 5,
        "prefix_cache_evictions_total{'cause': 'lost'}": 0,
    }
    assert now["kv_cache_pages{'state': 'cached'}"] + now["kv_cache_pages{'state': 'free'}"] == 64
    with server.client("admin") as client:
        stats = client.server_info().stats
        assert stats.prefix_cache_queries == now["prefix_cache_queries_total"]
        assert stats.prefix_cache_hits == now["prefix_cache_hits_total"]
