"""Embed and Score over jaxserve.v1 and VllmEngine, by both ports' clients and the command line."""

from __future__ import annotations

import dataclasses
import json

import grpc
import numpy as np
import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm_pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from jaxserve import client as command
from jaxserve.pooling_params import PoolingParams
from jaxserve.request import EngineRequest, Pooling
from jaxserve.serving.clients.grpc_client import Client
from jaxserve.serving.clients.http_client import HttpClient
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2_grpc as pb_grpc
from tests.server.fakes import EMBEDDING_SIZE, pooled
from tests.server.harness import run_served, status_of
from tests.server.http.http_harness import http_serving_in_thread

TEXTS = ["hello", "help", "abc"]


@pytest.fixture(scope="module")
def served(tokenizer):
    with http_serving_in_thread(tokenizer) as served:
        yield served


@pytest.fixture(scope="module", params=["grpc", "http"])
def client(request, served):
    with Client(served.grpc.address) if request.param == "grpc" else HttpClient(served.url) as client:
        yield client


def expected(ids, kind=Pooling.LAST) -> np.ndarray:
    request = dataclasses.replace(EngineRequest("", tuple(ids), max_tokens=1), pooling=kind)
    vector = np.frombuffer(pooled(request), np.float64)
    return vector / np.linalg.norm(vector)


def test_clients(client, tokenizer):
    found = client.embed(TEXTS)
    for text, vector in zip(TEXTS, found.embeddings, strict=True):
        np.testing.assert_allclose(vector, expected(tokenizer.encode(text)), rtol=1e-6)
    assert found.prompt_tokens == sum(len(tokenizer.encode(text)) for text in TEXTS)
    params = PoolingParams(pooling_type="MEAN", normalize=True, dimensions=EMBEDDING_SIZE, truncate_prompt_tokens=-1)
    (vector,) = client.embed([[7, 8, 9]], params).embeddings
    np.testing.assert_allclose(vector, expected([7, 8, 9], Pooling.MEAN), rtol=1e-6)
    assert client.embed([[7, 8, 9]], PoolingParams(truncate_prompt_tokens=2)).prompt_tokens == 2
    scores = client.score("hello", TEXTS)
    first, *_ = vectors = [expected(tokenizer.encode(text)) for text in TEXTS]
    np.testing.assert_allclose(scores.scores, [first @ one for one in vectors], atol=1e-6)
    assert scores.prompt_tokens > found.prompt_tokens
    assert client.score(TEXTS, TEXTS).scores == pytest.approx([1, 1, 1])


def test_refused(tokenizer):
    def inputs(*texts):
        return pb.EmbedInputs(inputs=[pb.EmbedInput(text=text) for text in texts])

    cases = [
        ("Embed", pb.EmbedRequest(), "inputs is empty; at least one input is needed"),
        ("Embed", pb.EmbedRequest(inputs=inputs("a", "")), "inputs[1] is empty"),
        ("Embed", pb.EmbedRequest(inputs=pb.EmbedInputs(inputs=[pb.EmbedInput()])), "inputs[0] is not set"),
        ("Embed", pb.EmbedRequest(inputs=inputs(*["a"] * 2049)), "inputs has 2049 inputs; at most 2048"),
        ("Embed", pb.EmbedRequest(inputs=inputs("a"), pooling_params={"dimensions": 161}), "dimensions is 161"),
        ("Embed", pb.EmbedRequest(inputs=inputs("a"), pooling_params={"pooling_type": 9}), "pooling_type is 9"),
        ("Embed", pb.EmbedRequest(inputs=inputs("a"), request_id="x" * 300), "request_id has 300 characters"),
        ("Score", pb.ScoreRequest(queries=inputs("a")), "documents is empty"),
        ("Score", pb.ScoreRequest(queries=inputs("a", "b"), documents=inputs("c")), "queries has 2 inputs"),
    ]

    async def test(served):
        async with grpc.aio.insecure_channel(served.address) as channel:
            stub = pb_grpc.JaxServeStub(channel)
            for method, request, words in cases:
                code, details = await status_of(getattr(stub, method)(request))
                assert code is grpc.StatusCode.INVALID_ARGUMENT, details
                assert words in details
        assert served.engine.requests == []

    run_served(test, tokenizer)


def test_a_canceled_call_aborts_its_inputs(tokenizer):
    async def test(served):
        served.engine.pause()
        async with grpc.aio.insecure_channel(served.address) as channel:
            inputs = pb.EmbedInputs(inputs=[pb.EmbedInput(text="a")] * 20)
            call = pb_grpc.JaxServeStub(channel).Embed(pb.EmbedRequest(request_id="r", inputs=inputs))
            await served.until(served.engine.wait_for_requests, 8)
            call.cancel()
            for number in range(8):
                await served.until(served.engine.wait_for_abort, f"r-{number}")
        assert served.frontend.num_open == 0

    run_served(test, tokenizer)


def test_the_gateways_service(tokenizer):
    async def test(served):
        async with grpc.aio.insecure_channel(served.address) as channel:
            stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            ids = [5, 6, 7]
            answer = await stub.Embed(vllm_pb.EmbedRequest(request_id="r", tokenized={"input_ids": ids}))
            np.testing.assert_allclose(answer.embedding, expected(ids), rtol=1e-6)
            assert (answer.prompt_tokens, answer.embedding_dim) == (3, EMBEDDING_SIZE)
            code, details = await status_of(stub.Embed(vllm_pb.EmbedRequest(request_id="r")))
            assert (code, "input_ids of tokenized is empty" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)

    run_served(test, tokenizer)


def test_command_line(served, tokenizer, capsys):
    address = ("--address", served.grpc.address)
    assert command.main(["--embeddings", "hello", *address]) == 0
    np.testing.assert_allclose(json.loads(capsys.readouterr().out), expected(tokenizer.encode("hello")), rtol=1e-6)
    assert (
        command.main(["--embeddings", "--json", "--dimensions", "4", "--pooling-type", "mean", "hello", *address]) == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert (record["prompt"], len(record["embedding"])) == ("hello", 4)
    assert record["usage"]["prompt_tokens"] == len(tokenizer.encode("hello"))
    with pytest.raises(SystemExit):
        command.main(["--dimensions", "4", "hello", *address])
    assert "dimensions is of embeddings; use --embeddings with it" in capsys.readouterr().err
