"""SubscribeKvEvents and FlushCache of gateways: who may call them, and what a stream says."""

from __future__ import annotations

import contextlib
import dataclasses

import grpc
import pytest
from smg_grpc_proto.generated import common_pb2 as pb

from jaxserve.config.access_config import AccessConfig, exposure_warnings
from jaxserve.frontend import cache_followers
from jaxserve.kv_cache.event_log import CacheEvent, CacheEventKind
from jaxserve.serving.access.callers import Caller
from jaxserve.serving.grpc_port import kv_events
from jaxserve.serving.grpc_port.kv_events import EventStream
from jaxserve.serving.problem import UnauthenticatedError
from tests.server.fakes import FLUSHED_PAGES, READY
from tests.server.harness import Served, status_of
from tests.server.vllm_harness import answers, run

Code = grpc.StatusCode

PAGE = READY.info.page_size


CALLERS = {
    "a": Caller("a", tenant="a", follows_cache=True),
    "b": Caller("b", tenant="b", follows_cache=True),
    "gateway": Caller("gateway", follows_cache=True),
    "plain": Caller("plain", tenant="a"),
    "admin": Caller("admin", tenant="admin", is_admin=True),
    "all": Caller("all", tenant="", is_admin=True, follows_cache=True),
}


class Keys:
    """Callers by the name that stands for their key."""

    def identify(self, credential):
        name = (credential or "").removeprefix("Bearer ")
        if name not in CALLERS:
            raise UnauthenticatedError("the key is missing or wrong")
        return CALLERS[name]


def key(name: str, **metadata: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {name}"), *((one.replace("_", "-"), value) for one, value in metadata.items()))


def stored(tenant: str, *hashes: int, parent: int | None = None, salted: bool = False) -> CacheEvent:
    tokens = tuple(name for name in hashes for _ in range(PAGE))
    namespace = hash((tenant, salted)) >> 1
    return CacheEvent(CacheEventKind.STORED, tenant, hashes, parent, tokens, namespace, salted)


def follows(test, tokenizer, **options) -> None:
    """Runs a test of a server that publishes events, with a key for each of CALLERS."""

    async def body(served: Served, stub) -> None:
        served.model.kv_events = True
        await test(served, stub)

    run(body, tokenizer, callers=Keys(), **options)


def subscribe(stub, name: str, start: int = 0, **metadata: str):
    return stub.SubscribeKvEvents(
        pb.SubscribeKvEventsRequest(start_sequence_number=start), metadata=key(name, **metadata)
    )


async def news(call) -> pb.KvEventBatch:
    """The next batch that is no heartbeat."""
    while (batch := await call.read()).load.load_only:
        pass
    return batch


def hashes(batch: pb.KvEventBatch) -> list[list[int]]:
    return [
        [block.block_hash for block in event.stored.blocks] or list(event.removed.block_hashes)
        for event in batch.events
    ]


async def until_cleared(call) -> list[pb.KvEventBatch]:
    """The next batches, up to the one that ends with a cleared cache."""
    batches = [await news(call)]
    while batches[-1].events[-1].WhichOneof("data") != "cleared":
        batches.append(await news(call))
    return batches


def salts_of(batches) -> list[str]:
    return [event.stored.cache_salt for batch in batches for event in batch.events if event.HasField("stored")]


async def end_of(call) -> tuple[grpc.StatusCode, str]:
    """The status of a call of which something was read."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass
    return await call.code(), await call.details()


def test_events_are_off_unless_the_server_says_otherwise(tokenizer):
    async def body(served: Served, stub) -> None:
        for name in ("all", "a", "plain"):
            code, details = await status_of(answers(subscribe(stub, name)))
            assert (code, "set AccessConfig.kv_events" in details) == (Code.UNIMPLEMENTED, True)
        assert served.engine.followed == []

    run(body, tokenizer, callers=Keys())


def test_a_key_of_its_own_is_needed(tokenizer):
    async def body(served: Served, stub) -> None:
        for name in ("plain", "admin"):
            code, details = await status_of(answers(subscribe(stub, name)))
            assert (code, "--kv-events" in details) == (Code.PERMISSION_DENIED, True)
        assert (await status_of(answers(subscribe(stub, "nobody"))))[0] is Code.UNAUTHENTICATED
        code, details = await status_of(answers(subscribe(stub, "a", x_tenant="b")))
        assert (code, "requests of this key belong to 'a'" in details) == (Code.PERMISSION_DENIED, True)
        assert served.engine.followed == []

    follows(body, tokenizer)


def test_a_stream_begins_with_what_is_known_and_goes_on_in_order(tokenizer):
    async def body(served: Served, stub) -> None:
        first = subscribe(stub, "all")
        begin = await first.read()
        assert [event.WhichOneof("data") for event in begin.events] == ["cleared"]
        assert (begin.sequence_number, begin.snapshot.count, begin.snapshot.blocks) == (1, 1, 0)
        await served.until(served.engine.wait_for_followers, 1)
        served.engine.tell(stored("", 1, 2, parent=-5))
        batch = await news(first)
        (event,) = batch.events
        assert (batch.sequence_number, batch.dp_rank, event.event_id) == (2, 0, 1)
        assert event.stored.parent_block_hash == -5
        assert [(block.block_hash, set(block.token_ids), block.block_size) for block in event.stored.blocks] == [
            (1, {1}, PAGE),
            (2, {2}, PAGE),
        ]
        assert [len(block.token_ids) for block in event.stored.blocks] == [PAGE, PAGE]
        assert not event.stored.HasField("cache_salt")
        assert batch.load.max_running_requests == READY.max_num_seqs
        second = subscribe(stub, "all", start=41)
        begin = await second.read()
        assert hashes(begin) == [[], [1], [2]]
        assert [event.event_id for event in begin.events] == [0, 0, 0]
        assert (begin.sequence_number, begin.snapshot.blocks) == (42, 2)
        assert begin.events[2].stored.parent_block_hash == 1
        served.engine.tell(CacheEvent(CacheEventKind.REMOVED, "", (2,)))
        assert hashes(await news(first)) == hashes(await news(second)) == [[2]]
        served.engine.tell(CacheEvent(CacheEventKind.CLEARED))
        batch = await news(second)
        assert (batch.sequence_number, batch.events[0].WhichOneof("data")) == (44, "cleared")
        first.cancel()
        second.cancel()
        await served.until(served.engine.wait_for_followers, 2)
        assert served.engine.followed == [1, 0]

    follows(body, tokenizer)


def test_one_tenant_is_told_nothing_of_another(tokenizer):
    async def body(served: Served, stub) -> None:
        calls = {name: subscribe(stub, name) for name in ("a", "b", "all")}
        calls["gateway"] = subscribe(stub, "gateway", x_tenant="b")
        for call in calls.values():
            await call.read()
        await served.until(served.engine.wait_for_followers, 1)
        served.engine.tell(stored("a", 1), stored("b", 2), stored("a", 3, salted=True))
        served.engine.tell(CacheEvent(CacheEventKind.REMOVED, "a", (1,)))
        served.engine.tell(stored("b", 4, parent=2))
        served.engine.tell(CacheEvent(CacheEventKind.CLEARED))  # which all are told of
        found = {name: await until_cleared(call) for name, call in calls.items()}
        told = {name: [one for batch in batches for one in hashes(batch)][:-1] for name, batches in found.items()}
        assert told == {"a": [[1], [3], [1]], "b": [[2], [4]], "gateway": [[2], [4]], "all": [[1], [2], [3], [1], [4]]}
        numbers = [batch.sequence_number for batch in found["b"]]
        assert numbers == list(range(2, 2 + len(numbers))), "a gap would tell of others"
        salts = {name: salts_of(batches) for name, batches in found.items()}
        assert salts["a"][0] == ""
        assert len(salts["a"][1]) == 16  # a hash in place of the salt
        assert salts["b"] == salts["gateway"] == ["", ""]
        assert all(salts["all"]), "to an administrator, pages of a tenant are none that anybody finds by tokens alone"

    follows(body, tokenizer)


def test_a_reader_that_is_too_far_behind_is_told_to_begin_anew(tokenizer, monkeypatch):
    monkeypatch.setattr(cache_followers, "MAX_UNREAD_PAGES", 3)

    async def body(served: Served, stub) -> None:
        call = subscribe(stub, "a")
        await call.read()
        await served.until(served.engine.wait_for_followers, 1)
        served.engine.tell(stored("a", 1, 2, 3, 4))
        code, details = await end_of(call)
        assert (code, "begins with all pages that are known" in details) == (Code.RESOURCE_EXHAUSTED, True)

    follows(body, tokenizer)


def test_a_silent_cache_sends_the_load_alone(tokenizer, monkeypatch):
    monkeypatch.setattr(kv_events, "HEARTBEAT_SECONDS", 0.01)

    async def body(served: Served, stub) -> None:
        call = subscribe(stub, "a", start=5)
        begin, beat, other = [await call.read() for _ in range(3)]
        assert [one.load.load_only for one in (begin, beat, other)] == [False, True, True]
        assert [one.sequence_number for one in (begin, beat, other)] == [6, 6, 6]
        assert [one.load.sample for one in (begin, beat, other)] == [1, 2, 3]
        assert not beat.events

    follows(body, tokenizer)


def test_streams_end_with_the_engine(tokenizer):
    async def body(served: Served, stub) -> None:
        call = subscribe(stub, "all")
        await call.read()
        served.engine.die("out of memory")
        assert await end_of(call) == (Code.UNAVAILABLE, "the engine has ended: out of memory")

    follows(body, tokenizer)


def test_a_flush_is_an_administrators_call(tokenizer):
    async def body(served: Served, stub) -> None:
        for name in ("a", "plain", "gateway"):
            code, details = await status_of(stub.FlushCache(pb.FlushCacheRequest(), metadata=key(name)))
            assert (code, "needs an admin's key" in details) == (Code.PERMISSION_DENIED, True)
        answer = await stub.FlushCache(pb.FlushCacheRequest(timeout_s=2), metadata=key("admin"))
        assert (answer.success, answer.message) == (True, f"{FLUSHED_PAGES} pages freed")
        call = stub.FlushCache(pb.FlushCacheRequest(timeout_s=-1), metadata=key("admin"))
        assert (await status_of(call))[0] is Code.INVALID_ARGUMENT
        served.engine.die("out of memory")
        call = stub.SubscribeKvEvents(pb.SubscribeKvEventsRequest(), metadata=key("all"))
        assert (await end_of(call))[0] is Code.UNAVAILABLE
        call = stub.FlushCache(pb.FlushCacheRequest(), metadata=key("admin"))
        assert (await status_of(call))[0] is Code.UNAVAILABLE

    follows(body, tokenizer)


@pytest.mark.parametrize(("pages", "sizes"), [(0, [0]), (256, [256]), (600, [256, 256, 88])])
def test_snapshots_are_cut_into_numbered_chunks(pages, sizes):
    events = [stored("", name, parent=name - 1 or None) for name in range(1, pages + 1)]
    chunks = list(EventStream("", PAGE, start=9).snapshot(events, missed_before=True))
    assert [sum(len(one) for one in hashes(chunk)) for chunk in chunks] == sizes
    assert [chunk.sequence_number for chunk in chunks] == [*range(10, 10 + len(sizes))]
    assert [chunk.snapshot.index for chunk in chunks] == [*range(len(sizes))]
    assert {(chunk.snapshot.count, chunk.snapshot.blocks, chunk.snapshot.unknown_before) for chunk in chunks} == {
        (len(sizes), pages, 1)
    }
    cleared = [sum(event.HasField("cleared") for event in chunk.events) for chunk in chunks]
    assert cleared == [1, *[0] * (len(sizes) - 1)]


def test_an_event_of_many_pages_becomes_several_that_follow_one_another():
    batch = EventStream("", PAGE, start=0).batch([stored("", *range(1, 601))])
    assert [len(event.stored.blocks) for event in batch.events] == [256, 256, 88]
    assert [event.stored.parent_block_hash for event in batch.events] == [0, 256, 512]
    assert not batch.events[0].stored.HasField("parent_block_hash")
    assert batch.events[1].stored.blocks[0].token_ids == [257] * PAGE


def test_a_server_that_tells_everybody_of_its_pages_warns():
    named = [line for line in exposure_warnings(AccessConfig(kv_events=True), "0.0.0.0") if "kv_events is True" in line]
    assert len(named) == 1
    assert not any("kv_events" in line for line in exposure_warnings(AccessConfig(), "0.0.0.0"))
    assert exposure_warnings(AccessConfig(kv_events=True), "127.0.0.1") == []
    with pytest.raises(ValueError, match="kv_events is 'yes'; it must be True or False"):
        AccessConfig(kv_events="yes")  # pyright: ignore[reportArgumentType]


def test_events_state_the_group_of_layers(tokenizer):
    """Fields of vLLM's events, by which gateways keep pages that windows have left out of their index."""

    async def test(served: Served, stub) -> None:
        call = subscribe(stub, "all")
        await call.read()
        kept = dataclasses.replace(stored("", 1, 2), group=0)
        served.engine.tell(kept, dataclasses.replace(stored("", 3, 4), group=1, window=64))
        full, sliding = (event.stored for event in (await news(call)).events)
        assert (full.group_idx, full.kv_cache_spec_kind) == (0, "full_attention")
        assert not full.HasField("kv_cache_spec_sliding_window")
        assert (sliding.group_idx, sliding.kv_cache_spec_kind) == (1, "sliding_window")
        assert sliding.kv_cache_spec_sliding_window == 64
        served.engine.tell(CacheEvent(CacheEventKind.REMOVED, "", (3,), group=1), stored("", 9))
        removed, alike = (await news(call)).events
        assert removed.removed.group_idx == 1
        assert not alike.stored.HasField("group_idx")
        assert not alike.stored.HasField("kv_cache_spec_kind")
        second = subscribe(stub, "all")  # whose snapshot has them, too
        told = [event.stored for event in (await second.read()).events if event.HasField("stored")]
        assert [one.group_idx for one in told if one.HasField("group_idx")] == [0, 0, 1]

    follows(test, tokenizer)
