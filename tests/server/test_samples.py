"""Several samples of one request, over gRPC: an index in every message, an end for each, one for the call."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm_pb

from jaxserve.models.tiny.tiny_tokenizer import EOS_ID
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.client_results import join, join_samples
from jaxserve.serving.clients.grpc_client import generate_request
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from tests.server import vllm_harness
from tests.server.harness import Served, run_served, status_of

THREE = SamplingParams(n=3, seed=5, max_tokens=4)


def test_every_sample_has_its_index_and_its_usage(tokenizer):
    async def body(served: Served) -> None:
        chunks = [chunk async for chunk in served.client.generate("abcd", THREE, request_id="r")]
        found = join_samples(chunks)
        assert [(one.index, one.text, one.finish_reason) for one in found] == [
            (0, "abcd", FinishReason.LENGTH),
            (1, "bcd", FinishReason.STOP),
            (2, "cd", FinishReason.STOP),
        ]
        assert [(one.usage.prompt_tokens, one.usage.output_tokens) for one in found] == [(5, 4), (5, 4), (5, 3)]
        assert served.engine.requests[0].seed == 5
        with pytest.raises(ValueError, match="request r has several samples; join_samples takes its chunks"):
            join(chunks)
        proto = generate_request("abcd", THREE).sampling_params
        assert (proto.n, generate_request("abcd", SamplingParams()).sampling_params.n) == (3, 0), "unset is one"

    run_served(body, tokenizer)


def test_n_that_is_unset_is_one_and_zero_is_refused(tokenizer):
    async def body(served: Served) -> None:
        call = served.client._stub.Generate(pb.GenerateRequest(text="a"))
        assert [response.index async for response in call][-1:] == [0]
        zero = pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(n=0))
        code, line = await status_of(collect(served.client._stub.Generate(zero)))
        assert (code, line) == (grpc.StatusCode.INVALID_ARGUMENT, "n is 0; it must be from 1 to 16384")
        code, line = await status_of(served.client.generate_text("a", SamplingParams(n=129)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert line.startswith("n is 129; at most 128 samples of one request are allowed")

    run_served(body, tokenizer)


async def collect(call) -> list:
    return [response async for response in call]


def test_a_sample_that_fails_does_not_end_the_others(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        call = served.client._stub.Generate(generate_request("abcd", THREE, request_id="r"))
        await served.until(served.engine.wait_for_requests, 1)
        served.engine.fail_request("r/1", "its logits are not finite")
        served.engine.resume()
        responses = []
        with pytest.raises(grpc.RpcError) as failed:
            async for response in call:
                responses.append(response)  # noqa: PERF401  what came before the error counts
        assert (failed.value.code(), failed.value.details()) == (
            grpc.StatusCode.INTERNAL,
            "its logits are not finite",
        )
        ends = {response.index: response.finish_reason for response in responses if response.finish_reason}
        assert ends == {0: pb.FINISH_REASON_LENGTH, 1: pb.FINISH_REASON_ERROR, 2: pb.FINISH_REASON_STOP}
        assert "".join(response.text for response in responses if response.index == 2) == "cd"

    run_served(body, tokenizer)


@pytest.mark.parametrize("way", ["abort", "cancel"])
def test_what_ends_the_call_ends_every_sample(tokenizer, way):
    async def body(served: Served) -> None:
        served.engine.pause()
        stream = served.client.generate("abcd", THREE, request_id="r")
        first = asyncio.ensure_future(anext(stream))
        await served.until(served.engine.wait_for_requests, 1)
        served.engine.allow(1)
        chunks = [await first]
        if way == "abort":
            assert await served.client.abort("r")
            chunks += [chunk async for chunk in stream]
            assert [one.finish_reason for one in join_samples(chunks)] == [FinishReason.ABORT] * 3
        else:
            await stream.aclose()
        for name in ("r", "r/1", "r/2"):
            await served.until(served.engine.wait_for_abort, name)

    run_served(body, tokenizer)


@pytest.mark.parametrize("stream", [False, True])
def test_the_gateways_protocol_has_the_index_too(tokenizer, stream):
    async def body(served: Served, stub) -> None:
        params = vllm_pb.SamplingParams(n=3, max_tokens=4)
        request = vllm_harness.request("abcd", sampling_params=params, stream=stream)
        answers = await vllm_harness.answers(stub.Generate(request))
        ends = {one.complete.index: one.complete for one in answers if one.HasField("complete")}
        ids = [*vllm_harness.ids("abcd"), EOS_ID]
        assert {index: list(end.output_ids) for index, end in ends.items()} == {0: ids[:4], 1: ids[1:], 2: ids[2:]}
        assert [ends[index].finish_reason for index in range(3)] == ["length", "stop", "stop"]
        assert [ends[index].prompt_tokens for index in range(3)] == [4, 4, 4]
        streamed: dict[int, list[int]] = {}
        for answer in answers:
            if answer.HasField("chunk"):
                streamed.setdefault(answer.chunk.index, []).extend(answer.chunk.token_ids)
        assert streamed == ({0: ids[:4], 1: ids[1:], 2: ids[2:]} if stream else {})

    vllm_harness.run(body, tokenizer)
