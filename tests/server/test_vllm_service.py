"""The service that gateways speak, over a real connection, by the stubs of its own package."""

import asyncio
import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import time
import zipfile

import grpc
import pytest
import tokenizers
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.config.client_limits import LimitsConfig
from jaxserve.engine.messages import EngineStats
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.models.tiny.tiny_tokenizer import EOS_ID, build_tokenizer
from jaxserve.request import FinishReason
from jaxserve.serving.access.callers import Caller
from jaxserve.serving.grpc_port.grpc_server import GrpcServer
from jaxserve.serving.grpc_port.tokenizer_bundle import tokenizer_zip
from jaxserve.serving.grpc_port.vllm_load import LoadRecord
from jaxserve.serving.problem import UnauthenticatedError
from jaxserve.serving.served_model import ServedModel
from tests.engine_ready import changed
from tests.server.fakes import READY, EchoEngine
from tests.server.harness import MAX_MESSAGE_BYTES, Served, health_of, run_served, serving, status_of

Code = grpc.StatusCode
SERVICE = "vllm.grpc.engine.VllmEngine"


def ids(text: str) -> list[int]:
    """Token ids of a text of plain ASCII, without <bos>."""
    return [byte + 3 for byte in text.encode()]


def request(text: str = "", **fields) -> pb.GenerateRequest:
    """A greedy request of token ids."""
    fields = {"tokenized": pb.TokenizedInput(input_ids=ids(text))} | fields
    fields["sampling_params"] = fields.get("sampling_params", pb.SamplingParams(temperature=0))
    return pb.GenerateRequest(**fields)


@contextlib.asynccontextmanager
async def stub_of(address: str):
    async with grpc.aio.insecure_channel(address) as channel:
        yield vllm_engine_pb2_grpc.VllmEngineStub(channel)


def run(test, tokenizer, engine=None, **options) -> None:
    """Runs a test with a server of its own and its stub."""

    async def body(served: Served) -> None:
        async with stub_of(served.address) as stub:
            await test(served, stub)

    run_served(body, tokenizer, engine, **options)


async def answers(call) -> list[pb.GenerateResponse]:
    return [answer async for answer in call]


async def completed(call) -> pb.GenerateComplete:
    (answer,) = await answers(call)
    return answer.complete


async def failure(call) -> tuple[grpc.StatusCode, str]:
    return await status_of(answers(call))


def test_a_stream_has_chunks_of_new_ids_and_one_last_message(tokenizer):
    async def body(served: Served, stub) -> None:
        served.engine.pause()
        stream = aiter(stub.Generate(request("abc", stream=True)))
        served.engine.allow(1)
        first = (await anext(stream)).chunk
        assert list(first.token_ids) == ids("a")
        assert (first.prompt_tokens, first.completion_tokens, first.cached_tokens, first.index) == (3, 1, 1, 0)
        served.engine.resume()
        rest = await answers(stream)
        chunks = [answer.chunk for answer in rest if answer.HasField("chunk")]
        streamed = [*first.token_ids, *(token_id for chunk in chunks for token_id in chunk.token_ids)]
        assert streamed == [*ids("abc"), EOS_ID]
        assert sum(chunk.completion_tokens for chunk in (first, *chunks)) == 4
        assert [answer.WhichOneof("response") for answer in rest] == ["chunk"] * len(chunks) + ["complete"]
        last = rest[-1].complete
        assert (list(last.output_ids), last.finish_reason) == (streamed, "stop")
        assert (last.prompt_tokens, last.completion_tokens, last.cached_tokens) == (3, 4, 1)

    run(body, tokenizer)


def test_without_stream_there_is_one_message(tokenizer):
    async def body(served: Served, stub) -> None:
        last = await completed(stub.Generate(request("abc")))
        assert (list(last.output_ids), last.finish_reason) == ([*ids("abc"), EOS_ID], "stop")
        last = await completed(stub.Generate(request("abc", sampling_params=pb.SamplingParams(max_tokens=2))))
        assert (list(last.output_ids), last.finish_reason) == (ids("ab"), "length")

    run(body, tokenizer)


def test_a_text_is_tokenized_here(tokenizer):
    async def body(served: Served, stub) -> None:
        last = await completed(stub.Generate(pb.GenerateRequest(text="hi")))
        assert (list(last.output_ids), last.prompt_tokens) == ([*ids("hi"), EOS_ID], 3)  # <bos> too
        assert served.engine.requests[0].prompt_token_ids == tuple(tokenizer.encode("hi"))

    run(body, tokenizer)


def test_every_field_reaches_the_engine(tokenizer):
    params = pb.SamplingParams(
        temperature=0.5, top_k=7, top_p=0.75, min_p=0.125, seed=11, max_tokens=5, min_tokens=2, stop_token_ids=[9],
        ignore_eos=True, n=1, repetition_penalty=1, skip_special_tokens=True, spaces_between_special_tokens=True,
    )  # fmt: skip
    metadata = (("x-tenant", "t"), ("x-priority", "-3"), ("x-request-timeout", "1000"), ("x-binary-bin", b"\xff"))

    async def body(served: Served, stub) -> None:
        before = time.time()
        last = await completed(
            stub.Generate(request("xyz", request_id="mine", sampling_params=params), metadata=metadata)
        )
        assert list(last.output_ids) == [*ids("xyz"), EOS_ID, *ids("x")]
        (sent,) = served.engine.requests
        assert sent.request_id == "mine"
        assert (sent.temperature, sent.top_k, sent.top_p, sent.min_p) == (0.5, 7, 0.75, 0.125)
        assert (sent.seed, sent.max_tokens, sent.min_tokens, sent.stop_token_ids) == (11, 5, 2, (9,))
        assert (sent.options.tenant, sent.options.priority) == ("t", -3)
        assert before + 1000 <= sent.options.deadline <= time.time() + 1000

    run(body, tokenizer)


def test_zeros_are_unset(tokenizer):
    async def body(served: Served, stub) -> None:
        await completed(stub.Generate(request("ab", sampling_params=pb.SamplingParams())))
        (sent,) = served.engine.requests
        assert (sent.temperature, sent.top_p, sent.top_k, sent.min_p, sent.min_tokens) == (1.0, 1.0, 0, 0.0, 0)
        assert sent.max_tokens == READY.limits.pool_tokens - 2 + 1  # the last needs no page
        assert (sent.options.tenant, sent.options.priority, sent.options.deadline) == ("", 0, None)
        assert sent.stop_token_ids == (EOS_ID,)

    run(body, tokenizer)


def test_stop_strings_are_the_engines(tokenizer):
    async def body(served: Served, stub) -> None:
        params = pb.SamplingParams(temperature=0, stop=["zz", "ll"])
        last = await completed(stub.Generate(request("hello", sampling_params=params)))
        assert (list(last.output_ids), last.finish_reason, last.matched_stop_str) == (ids("hell"), "stop", "ll")
        params = pb.SamplingParams(temperature=0, stop_token_ids=ids("l"))
        last = await completed(stub.Generate(request("hello", sampling_params=params)))
        assert (list(last.output_ids), last.matched_token_id) == (ids("hel"), ids("l")[0])

    run(body, tokenizer)


def test_refusals_have_the_codes_that_the_gateway_acts_on(tokenizer):
    engine = EchoEngine(changed(READY, max_num_seqs=1, max_num_waiting=0))

    async def body(served: Served, stub) -> None:
        code, details = await failure(stub.Generate(request("a", sampling_params=pb.SamplingParams(n=3))))
        assert (code, details) == (Code.INVALID_ARGUMENT, "n is 3; this engine does not support it: leave it out")
        code, details = await failure(stub.Generate(request("a" * 600)))
        assert code is Code.INVALID_ARGUMENT
        assert "max_model_len 512" in details
        code, details = await failure(stub.Generate(request("a"), metadata=(("x-priority", "high"),)))
        assert (code, details[:21]) == (Code.INVALID_ARGUMENT, "x-priority is 'high';")
        code, details = await failure(stub.Generate(request("a"), metadata=(("x-request-timeout", "nan"),)))
        assert (code, details[:26]) == (Code.INVALID_ARGUMENT, "x-request-timeout is 'nan'")
        served.engine.pause()
        first = stub.Generate(request("abc", request_id="r"))
        await served.until(served.engine.wait_for_requests, 1)
        second = stub.Generate(request("abc"))
        assert await second.code() is Code.RESOURCE_EXHAUSTED
        assert dict(await second.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        served.drain()
        assert (await failure(stub.Generate(request("a"))))[0] is Code.UNAVAILABLE
        served.engine.resume()
        assert (await completed(first)).finish_reason == "stop"

    run(body, tokenizer, engine)


def test_a_request_that_fails_is_an_error(tokenizer):
    async def body(served: Served, stub) -> None:
        served.engine.pause()
        calls = [stub.Generate(request("abc", request_id=name)) for name in ("row", "late", "same")]
        await served.until(served.engine.wait_for_requests, 3)
        assert (await failure(stub.Generate(request("abc", request_id="same"))))[0] is Code.ALREADY_EXISTS
        served.engine.fail_request("row", "NaN")
        assert await failure(calls[0]) == (Code.INTERNAL, "NaN")
        late = stub.Generate(request("abc"), metadata=(("x-request-timeout", "0.05"),))
        assert (await failure(late))[0] is Code.DEADLINE_EXCEEDED
        served.engine.die("the device is lost")
        assert (await failure(calls[1]))[0] is Code.UNAVAILABLE
        answer = await stub.HealthCheck(pb.HealthCheckRequest())
        assert (answer.healthy, answer.message) == (False, "the engine has ended: 'the device is lost'")

    run(body, tokenizer)


def test_abort_ends_the_stream_with_what_there_is(tokenizer):
    async def body(served: Served, stub) -> None:
        served.engine.pause()
        streams = [aiter(stub.Generate(request("abc", request_id=name, stream=True))) for name in ("a", "b")]
        await served.until(served.engine.wait_for_requests, 2)
        served.engine.allow(1)
        for stream in streams:
            await anext(stream)
        await stub.Abort(pb.AbortRequest(request_ids=["a"]))
        (last,) = await answers(streams[0])
        assert (last.complete.finish_reason, list(last.complete.output_ids)) == ("abort", ids("a"))
        await served.until(served.engine.wait_for_abort, "a")
        code, details = await status_of(stub.Abort(pb.AbortRequest(request_ids=["a", "b"])))
        assert (code, details) == (Code.NOT_FOUND, "request_ids ['a'] name no unfinished requests")
        assert (await answers(streams[1]))[-1].complete.finish_reason == "abort"
        assert await stub.Abort(pb.AbortRequest()) == pb.AbortResponse()
        code, details = await status_of(stub.Abort(pb.AbortRequest(request_ids=["x"] * 2000)))
        assert (code, details) == (Code.INVALID_ARGUMENT, "request_ids has 2000 ids; at most 1024 are allowed")

    run(body, tokenizer)


def test_a_client_that_leaves_aborts_its_request(tokenizer):
    async def body(served: Served, stub) -> None:
        served.engine.pause()
        call = stub.Generate(request("abc", request_id="gone"))
        await served.until(served.engine.wait_for_requests, 1)
        call.cancel()
        await served.until(served.engine.wait_for_abort, "gone")

    run(body, tokenizer)


def test_health_is_an_error_until_the_model_is_loaded():
    """A gateway asks a worker that answers for its model, once."""

    async def body() -> None:
        served = ServedModel("echo")
        server = GrpcServer("127.0.0.1", 0, MAX_MESSAGE_BYTES, served)
        await server.start()
        try:
            async with stub_of(server.address) as stub:
                assert (await status_of(stub.HealthCheck(pb.HealthCheckRequest())))[0] is Code.UNAVAILABLE
                assert (await status_of(stub.GetModelInfo(pb.GetModelInfoRequest())))[0] is Code.UNAVAILABLE
            assert await health_of(server.address, SERVICE) == "NOT_SERVING"
        finally:
            await server.stop()

    asyncio.run(body())


def test_health_follows_the_engines_progress(tokenizer):
    async def body(served: Served, stub) -> None:
        answer = await stub.HealthCheck(pb.HealthCheckRequest())
        assert (answer.healthy, answer.message) == (True, "ready")
        assert await health_of(served.address, SERVICE) == "SERVING"
        served.engine.state = "stuck"
        while (answer := await stub.HealthCheck(pb.HealthCheckRequest())).healthy:
            pass
        assert answer.message.startswith("the engine has ended: 'a step has not ended for ")

    run(body, tokenizer, step_timeout=0.2)


def test_a_server_that_drains_is_not_healthy(tokenizer):
    async def body(served: Served, stub) -> None:
        served.drain()
        answer = await stub.HealthCheck(pb.HealthCheckRequest())
        assert (answer.healthy, answer.message) == (False, "the server is shutting down")
        assert await health_of(served.address, SERVICE) == "NOT_SERVING"
        assert (await stub.GetServerInfo(pb.GetServerInfoRequest())).is_paused

    run(body, tokenizer)


def test_health_is_answered_when_no_other_call_is(tokenizer):
    async def body() -> None:
        async with (
            serving(tokenizer, limits=LimitsConfig(max_open_calls=1)) as served,
            stub_of(served.address) as stub,
        ):
            served.engine.pause()
            call = stub.Generate(request("abc"))
            await served.until(served.engine.wait_for_requests, 1)
            code, details = await failure(stub.Generate(request("abc")))
            assert (code, "max_open_calls" in details) == (Code.RESOURCE_EXHAUSTED, True)
            assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
            call.cancel()

    asyncio.run(body())


def test_the_model_and_the_server_describe_themselves(tokenizer):
    async def body(served: Served, stub) -> None:
        model = await stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (model.served_model_name, model.model_path, model.tokenizer_path) == ("echo", "echo", "echo")
        assert (model.is_generation, model.supports_vision, list(model.architectures)) == (
            True,
            False,
            ["EchoForCausalLM"],
        )
        assert (model.max_context_length, model.max_req_input_len) == (512, 511)
        assert (model.vocab_size, list(model.eos_token_ids)) == (READY.limits.vocab_size, [EOS_ID])
        before = time.time()
        await completed(stub.Generate(request("a")))
        server = await stub.GetServerInfo(pb.GetServerInfoRequest())
        assert (server.server_type, server.data_parallel_size, server.max_num_seqs) == ("jaxserve", 1, 8)
        assert (server.active_requests, server.is_paused, server.block_size) == (0, False, READY.info.page_size)
        assert before <= server.last_receive_timestamp <= time.time()

    run(body, tokenizer)


def test_loads_are_the_engines(tokenizer):
    async def body(served: Served, stub) -> None:
        served.engine.pause()
        call = stub.Generate(request("abcdef", stream=True))
        await served.until(served.engine.wait_for_requests, 1)
        (load,) = (await stub.GetLoads(pb.GetLoadsRequest(include=["core"]))).loads
        assert load.num_waiting_uncached_tokens == 6
        served.engine.allow(1)
        await call.read()
        answer = await stub.GetLoads(pb.GetLoadsRequest(dp_rank=0))
        (load,) = answer.loads
        assert (load.num_running_reqs, load.num_total_reqs, load.num_waiting_uncached_tokens) == (1, 1, 0)
        assert load.cache_hit_rate == pytest.approx(1 / 6)  # the echo engine says that one token was cached
        assert load.max_total_num_tokens == READY.info.usable_pages * READY.info.page_size
        assert answer.dp_rank_count == 1
        assert (await status_of(stub.GetLoads(pb.GetLoadsRequest(dp_rank=1))))[0] is Code.INVALID_ARGUMENT

    run(body, tokenizer)


def test_a_load_is_what_the_counts_say():
    record = LoadRecord()
    stats = EngineStats(num_running=2, num_waiting=3, num_swapped=1, pages_used=4, generation_tokens=100)
    load = record.measured(stats, READY, now=10.0)
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (2, 4, 6)
    assert (load.num_used_tokens, load.token_usage) == (4 * READY.info.page_size, 4 / 16)
    assert (load.utilization, load.max_running_requests, load.gen_throughput) == (2 / 8, 8, 0)
    later = EngineStats(generation_tokens=300)
    assert record.measured(later, READY, now=10.5).gen_throughput == 0  # too soon
    assert record.measured(later, READY, now=14.0).gen_throughput == 50
    assert record.measured(later, READY, now=14.1).gen_throughput == 50


async def bundle_of(stub) -> zipfile.ZipFile:
    """The zip that GetTokenizer streams, its checksum compared."""
    chunks = await answers(stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
    data = b"".join(chunk.data for chunk in chunks)
    assert [chunk.sha256 for chunk in chunks] == [""] * (len(chunks) - 1) + [hashlib.sha256(data).hexdigest()]
    return zipfile.ZipFile(io.BytesIO(data))


def test_the_tokenizer_makes_the_round_trip(tokenizer, tmp_path):
    async def body(served: Served, stub) -> None:
        archive = await bundle_of(stub)
        assert archive.namelist() == ["tokenizer.json"]
        other = tokenizers.Tokenizer.from_buffer(archive.read("tokenizer.json"))
        text = "copy: Grüße 😀 <eos>\n"
        assert other.encode(text).ids == tokenizer.encode(text)
        assert (await bundle_of(stub)).read("tokenizer.json") == archive.read("tokenizer.json")

    run(body, tokenizer)


def test_the_bundle_has_what_encodes_and_nothing_else(tmp_path):
    files = {
        "tokenizer_config.json": json.dumps({"bos_token": "<bos>", "pad_token": "<pad>"}),
        "config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "model.safetensors": "weights",
        "keys.json": "secret",
        "README.md": "",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    build_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    archive = zipfile.ZipFile(io.BytesIO(tokenizer_zip(tokenizer)))
    assert archive.namelist() == ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in archive.namelist():
        assert archive.read(name) == (tmp_path / name).read_bytes()
    assert tokenizer_zip(tokenizer) == tokenizer_zip(tokenizer)  # every worker sends the same
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (1, 0)


def test_a_tokenizer_that_cuts_is_sent_as_one_that_does_not(tmp_path):
    cutting = build_tokenizer()
    cutting.enable_truncation(4)
    cutting.enable_padding(length=9)
    cutting.save(str(tmp_path / "tokenizer.json"))
    archive = zipfile.ZipFile(io.BytesIO(tokenizer_zip(Tokenizer(tmp_path))))
    other = tokenizers.Tokenizer.from_buffer(archive.read("tokenizer.json"))
    assert len(cutting.encode("abcdef").ids) == 9
    assert other.encode("abcdef").ids == [1, *ids("abcdef")]


def test_without_a_tokenizer_there_is_none_to_get():
    async def body(served: Served, stub) -> None:
        code, details = await failure(stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
        assert (code, "skip_tokenizer_init" in details) == (Code.UNIMPLEMENTED, True)
        assert (await stub.GetModelInfo(pb.GetModelInfoRequest())).tokenizer_path == ""

    run(body, None)


def test_what_is_not_implemented_says_why(tokenizer):
    async def body(served: Served, stub) -> None:
        for call, reason in (
            (stub.Embed(pb.EmbedRequest()), "computes no embeddings"),
            (stub.FlushCache(common_pb2.FlushCacheRequest()), "no prefix cache"),
            (stub.StartProfile(common_pb2.StartProfileRequest()), "no profiles"),
            (stub.StopProfile(common_pb2.StopProfileRequest()), "no profiles"),
            (answers(stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest())), "no events of its KV cache"),
        ):
            code, details = await status_of(call)
            assert (code, reason in details) == (Code.UNIMPLEMENTED, True), details

    run(body, tokenizer)


def test_reflection_lists_the_service(tokenizer):
    async def body(served: Served, stub) -> None:
        async with grpc.aio.insecure_channel(served.address) as channel:
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter(
                    [
                        reflection_pb2.ServerReflectionRequest(list_services=""),
                        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
                    ]
                )
            )
            listed = await call.read()
            assert SERVICE in [service.name for service in listed.list_services_response.service]
            assert (await call.read()).file_descriptor_response.file_descriptor_proto
            call.cancel()

    run(body, tokenizer)


def test_unknown_fields_and_large_messages_are_refused(tokenizer, monkeypatch):
    monkeypatch.setattr("tests.server.harness.MAX_MESSAGE_BYTES", 4 * 2**20)

    async def body(served: Served, stub) -> None:
        async with grpc.aio.insecure_channel(served.address) as channel:

            async def raw(method: str, message: bytes) -> tuple[grpc.StatusCode, str]:
                call = channel.unary_stream(f"/{SERVICE}/{method}")(message)
                return await call.code(), await call.details()

            newer = request("a").SerializeToString() + bytes([0xF8, 0x07, 0x01])  # field 127
            assert await raw("Generate", newer) == (
                Code.INVALID_ARGUMENT,
                "GenerateRequest has unknown field 127; this server does not support it",
            )
            for message, reason in (
                (request("a" * 300_000), "bytes of token ids, at least"),
                (pb.GenerateRequest(text="a" * 300_000), "prompt has 300000 bytes, at least"),
                (request("a", sampling_params=pb.SamplingParams(stop=[""] * 200_000)), "beside the prompt"),
            ):
                code, details = await raw("Generate", message.SerializeToString())
                assert (code, reason in details) == (Code.INVALID_ARGUMENT, True), details
            many = pb.AbortRequest(request_ids=[""] * 200_000).SerializeToString()
            assert await raw("Abort", many) == (
                Code.INVALID_ARGUMENT,
                "the request is malformed: it has 400000 bytes; at most 262144 are allowed",
            )
        assert served.engine.requests == []

    run(body, tokenizer)


def test_who_is_not_known_gets_health_alone(tokenizer):
    class Nobody:
        def identify(self, credential):
            if credential != "Bearer key":
                raise UnauthenticatedError("the key is missing or wrong")
            return Caller("name", tenant="fixed")

    async def body(served: Served, stub) -> None:
        served.model.callers = Nobody()
        assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
        calls = [
            answers(stub.Generate(request("a"))),
            answers(stub.GetTokenizer(common_pb2.GetTokenizerRequest())),
            answers(stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest())),
            stub.Embed(pb.EmbedRequest()),
            stub.FlushCache(common_pb2.FlushCacheRequest()),
            stub.StartProfile(common_pb2.StartProfileRequest()),
            stub.StopProfile(common_pb2.StopProfileRequest()),
            stub.Abort(pb.AbortRequest(request_ids=["a"])),
            stub.GetModelInfo(pb.GetModelInfoRequest()),
            stub.GetServerInfo(pb.GetServerInfoRequest()),
            stub.GetLoads(pb.GetLoadsRequest()),
        ]
        for call in calls:
            assert await status_of(call) == (Code.UNAUTHENTICATED, "the key is missing or wrong")
        metadata = (("authorization", "Bearer key"), ("x-tenant", "another"))
        await completed(stub.Generate(request("a"), metadata=metadata))
        assert served.engine.requests[0].options.tenant == "fixed"

    run(body, tokenizer)


def test_without_the_package_the_service_is_left_out(tokenizer, monkeypatch, caplog):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "smg_grpc_proto" else found(name))

    async def body(served: Served, stub) -> None:
        assert (await failure(stub.Generate(request("a"))))[0] is Code.UNIMPLEMENTED
        assert (await served.client.generate_text("hi")).finish_reason is FinishReason.STOP

    with caplog.at_level(logging.INFO, "jaxserve.server"):
        run(body, tokenizer)
    lines = [record.getMessage() for record in caplog.records if "jaxserve[gateway]" in record.getMessage()]
    assert lines == ["gateways are not served: smg-grpc-proto is not installed (pip install 'jaxserve[gateway]')"]
