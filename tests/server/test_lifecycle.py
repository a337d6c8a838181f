"""Start, health, reflection, drain, the engine's death."""

import asyncio
import socket
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jaxserve.serving.bind import BindError
from jaxserve.serving.clients.grpc_client import AsyncClient, Client
from jaxserve.serving.grpc_port.grpc_server import SERVICE_NAME, GrpcServer
from jaxserve.serving.served_model import ServedModel
from tests.server.harness import GREEDY, MAX_MESSAGE_BYTES, Served, health_of, run_served, serving_in_thread, status_of

Code = grpc.StatusCode


def test_before_it_is_ready_the_server_answers_not_serving():
    async def body() -> None:
        server = GrpcServer("127.0.0.1", 0, MAX_MESSAGE_BYTES, ServedModel("echo"))
        await server.start()
        assert server.port > 0
        async with AsyncClient(server.address) as client:
            assert await health_of(server.address) == "NOT_SERVING"
            assert await health_of(server.address, SERVICE_NAME) == "NOT_SERVING"
            calls = (client.generate_text("a"), client.model_info(), client.server_info(), client.tokenize("a"))
            for call in calls:
                code, details = await status_of(call)
                assert code is Code.UNAVAILABLE
                assert "starting" in details
            with pytest.raises(TimeoutError, match=r"not ready within 0\.2 s"):
                await client.wait_ready(0.2)
        await server.stop()

    asyncio.run(body())


def test_ready_is_serving_and_wait_ready_returns(tokenizer):
    async def body(served: Served) -> None:
        assert await health_of(served.address) == "SERVING"
        assert await health_of(served.address, SERVICE_NAME) == "SERVING"
        await served.client.wait_ready()

    run_served(body, tokenizer)


def test_reflection_lists_the_services_and_describes_ours(tokenizer):
    async def body(served: Served) -> None:
        async with grpc.aio.insecure_channel(served.address) as channel:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            requests = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME),
            ]
            answers = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
        names = {service.name for service in answers[0].list_services_response.service}
        assert names == {
            "jaxserve.v1.JaxServe",
            "vllm.grpc.engine.VllmEngine",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        assert b"GetModelInfo" in answers[1].file_descriptor_response.file_descriptor_proto[0]

    run_served(body, tokenizer)


@pytest.mark.parametrize("port_is_ours", [True, False])
def test_a_port_in_use_is_one_clear_line(tokenizer, port_is_ours):
    async def body(served: Served) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen(1)
            port = served.server.port if port_is_ours else other.getsockname()[1]
            second = GrpcServer("127.0.0.1", port, MAX_MESSAGE_BYTES, ServedModel("echo"))
            with pytest.raises(BindError, match=f"^port {port} is in use: [^\n]*$"):
                await second.start()
            await second.stop()
        assert (await served.client.generate_text("a", GREEDY)).text == "a"

    run_served(body, tokenizer)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_ours_is_one_clear_line(host):
    async def body() -> None:
        server = GrpcServer(host, 1, MAX_MESSAGE_BYTES, ServedModel("echo"))
        with pytest.raises(BindError, match=f"^cannot listen on {host}:1: [^\n]*$"):
            await server.start()
        await server.stop()

    asyncio.run(body())


def test_drain_finishes_what_runs_and_refuses_what_is_new(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        running = asyncio.ensure_future(served.client.generate_text("abc", GREEDY))
        await served.until(served.engine.wait_for_requests, 1)
        served.drain()
        assert await health_of(served.address) == "NOT_SERVING"
        assert (await served.client.server_info()).draining
        code, details = await status_of(served.client.generate_text("new", GREEDY))
        assert code is Code.UNAVAILABLE
        assert "shutting down" in details
        closing = asyncio.ensure_future(served.frontend.close(60.0))
        served.engine.resume()
        assert (await running).text == "abc"
        await closing

    run_served(body, tokenizer)


def test_what_is_left_when_the_drain_ends_is_unavailable(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        running = asyncio.ensure_future(status_of(served.client.generate_text("abc", GREEDY)))
        await served.until(served.engine.wait_for_requests, 1)
        served.drain()
        await served.frontend.close(0.05)
        code, details = await running
        assert code is Code.UNAVAILABLE
        assert "shutting down" in details

    run_served(body, tokenizer)


def test_the_engines_death_makes_every_stream_unavailable(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        running = [asyncio.ensure_future(status_of(served.client.generate_text("abc", GREEDY))) for _ in range(5)]
        await served.until(served.engine.wait_for_requests, 5)
        served.engine.die("out of memory in step 7")
        for code, details in await asyncio.gather(*running):
            assert code is Code.UNAVAILABLE
            assert "out of memory in step 7" in details
        code, details = await status_of(served.client.generate_text("new", GREEDY))
        assert code is Code.UNAVAILABLE
        assert "out of memory in step 7" in details

    run_served(body, tokenizer)


def test_a_health_watch_sees_every_change(tokenizer):
    async def body() -> None:
        server = GrpcServer("127.0.0.1", 0, MAX_MESSAGE_BYTES, ServedModel("echo"))
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            server.announce()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            server.drain()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
        await server.stop()

    asyncio.run(body())


def test_the_blocking_client_offers_every_call(tokenizer):
    with serving_in_thread(tokenizer) as served, Client(served.address) as client:
        client.wait_ready()
        assert "".join(chunk.text for chunk in client.generate("abc", GREEDY)) == "abc"
        assert client.generate_text([5, 6], GREEDY).token_ids == (5, 6, 2)
        assert not client.abort("nobody")
        assert client.model_info().name == "echo"
        assert client.server_info().num_pages == 16
        assert client.detokenize(client.tokenize("hé")) == "hé"


def test_a_burst_of_any_size_waits_its_turn(tokenizer):
    """gRPC by itself refuses calls at random from 1,000 on that wait for Python to take them, and any above 3,000."""

    async def body(served: Served) -> None:
        answers = await asyncio.gather(*(served.client.tokenize(f"{number}") for number in range(4000)))
        assert len(answers) == 4000

    run_served(body, tokenizer)
