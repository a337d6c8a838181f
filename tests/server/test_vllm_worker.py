"""What a gateway asks a worker about itself, over a real connection: health, model, load, tokenizer."""

import asyncio
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
from smg_grpc_proto.generated import common_pb2
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
from jaxserve.serving.served_model import ServedModel
from tests.server.fakes import READY
from tests.server.harness import MAX_MESSAGE_BYTES, Served, health_of, serving, status_of
from tests.server.vllm_harness import SERVICE, answers, completed, failure, ids, request, run, stub_of

Code = grpc.StatusCode


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
    load = record.measured(stats, READY, 10.0, Caller())
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (2, 4, 6)
    assert (load.num_used_tokens, load.token_usage) == (4 * READY.info.page_size, 4 / 16)
    assert (load.utilization, load.max_running_requests, load.gen_throughput) == (2 / 8, 8, 0)
    later = EngineStats(generation_tokens=300)
    assert record.measured(later, READY, 10.5, Caller()).gen_throughput == 0  # too soon
    assert record.measured(later, READY, 14.0, Caller()).gen_throughput == 50
    assert record.measured(later, READY, 14.1, Caller()).gen_throughput == 50


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
            (stub.StartProfile(common_pb2.StartProfileRequest()), "no profiles"),
            (stub.StopProfile(common_pb2.StopProfileRequest()), "no profiles"),
            (answers(stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest())), "set AccessConfig.kv_events"),
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
