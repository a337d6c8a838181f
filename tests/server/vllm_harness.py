"""Requests of a gateway, by the stubs of its own package, to the server of `harness`."""

from __future__ import annotations

import contextlib

import grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from tests.server.harness import Served, run_served, status_of

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
