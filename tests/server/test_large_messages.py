"""Messages just under the size limit, over gRPC: refused early, or answered in full, with nobody else held up."""

import asyncio
import random
import re
import sys

import grpc
import pytest

from jaxserve.frontend.encoding import Encoder
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.frontend.workers import MAX_BYTES, MAX_WAITING_BYTES
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.grpc_port import service
from jaxserve.serving.grpc_port.convert import refuse_unknown_bytes
from jaxserve.serving.grpc_port.oversized import check_generate
from jaxserve.serving.problem import MAX_DETAILS
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2_grpc as pb_grpc
from tests.engine_ready import changed
from tests.server import harness
from tests.server.fakes import READY, EchoEngine, save_tokenizer
from tests.server.harness import GREEDY, Served, health_of, run_served, status_of
from tests.server.process import Process

Code = grpc.StatusCode
LARGE = 4 * 1024 * 1024
TEXTS = {
    "words": "The quick brown fox. " * (LARGE // 21 - 100),
    "one letter": "x" * (LARGE - 1000),
    "emoji": "😀" * (LARGE // 4 - 1000),
    "Chinese": "没有空格" * (LARGE // 12 - 1000),
    "spaces": " " * (LARGE - 1000),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer(directory)


@pytest.fixture(autouse=True)
def _large_messages(monkeypatch):
    monkeypatch.setattr(harness, "MAX_MESSAGE_BYTES", LARGE)


async def generate_raw(served: Served, message: bytes) -> tuple[grpc.StatusCode, str]:
    """The status that Generate ends with."""
    async with grpc.aio.insecure_channel(served.address) as channel:
        call = channel.unary_stream("/jaxserve.v1.JaxServe/Generate")(message)
        return await call.code(), await call.details()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_fault_29_a_text_that_cannot_fit_is_refused_before_it_is_encoded(tokenizer, monkeypatch, text):
    parts = Encoder.parts

    def refuse_long(self, piece, add_special_tokens, apart=None):
        assert len(piece) < 100, "a long text was encoded"
        return parts(self, piece, add_special_tokens)

    monkeypatch.setattr(Encoder, "parts", refuse_long)

    async def body(served: Served) -> None:
        answers = await asyncio.gather(*(status_of(served.client.generate_text(text, GREEDY)) for _ in range(8)))
        for code, details in answers:
            assert code is Code.INVALID_ARGUMENT
            assert re.match(
                rf"prompt has {len(text.encode())} bytes, at least \d+ tokens; .* max_model_len 512: ", details
            )
        assert served.engine.requests == []
        assert (await served.client.generate_text("still here", GREEDY)).text == "still here"

    run_served(body, tokenizer)


def test_fault_29_others_are_answered_while_a_long_text_is_encoded(tokenizer):
    async def body(served: Served) -> None:
        text = "".join(random.Random(0).choices(["copy: ", "é", " x", "\n", "12"], k=600_000))
        long = [asyncio.ensure_future(served.client.tokenize(text)) for _ in range(2)]
        for _ in range(20):
            assert await health_of(served.address) == "SERVING"
            await served.client.tokenize("abc " * 10_000)
            assert (await served.client.generate_text("hi", GREEDY)).text == "hi"
        assert not any(one.done() for one in long)
        assert await long[0] == await long[1] == tokenizer._backend.encode(text).ids

    run_served(body, tokenizer)


def test_a_call_that_is_canceled_frees_its_place(tokenizer):
    async def body(served: Served) -> None:
        calls = [asyncio.ensure_future(served.client.tokenize("ab " * (LARGE // 3 - 1000))) for _ in range(8)]
        await asyncio.sleep(0.2)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        text = "ab " * 200_000  # long, too
        assert len(await served.client.tokenize(text)) == len(text) + 1

    run_served(body, tokenizer)


@pytest.mark.parametrize("rpc", ["Generate", "Tokenize", "Detokenize"])
def test_fault_29_too_much_text_that_waits_is_resource_exhausted(tokenizer, rpc):
    ready = changed(READY, max_model_len=10**6, max_prompt_len=10**6, usable_pages=10**6)

    async def body(served: Served) -> None:
        budget = served.frontend._workers._long.budget
        await budget.acquire(MAX_BYTES)
        waiting = asyncio.ensure_future(budget.acquire(MAX_WAITING_BYTES))
        await asyncio.sleep(0)
        text = "xy " * 100_000
        client = served.client
        make = {
            "Generate": lambda: client.generate_text(text, GREEDY),
            "Tokenize": lambda: client.tokenize(text),
            "Detokenize": lambda: client.detokenize([70] * 20_000),
        }[rpc]
        code, details = await status_of(make())
        assert code is Code.RESOURCE_EXHAUSTED
        assert details.startswith(
            f"{MAX_WAITING_BYTES} bytes of text wait to be tokenized; at most {MAX_WAITING_BYTES}"
        )
        assert len(await client.tokenize("abc " * 10_000)) > 10_000  # a short text does not wait for long ones
        budget.release(MAX_BYTES)
        await waiting
        budget.release(MAX_WAITING_BYTES)
        if rpc != "Generate":
            assert await make()

    run_served(body, tokenizer, EchoEngine(ready))


def test_two_million_token_ids_are_refused_by_their_number(tokenizer):
    async def body(served: Served) -> None:
        for ids in ([3] * 2_000_000, [2**31 - 1] * 500_000):
            code, details = await status_of(served.client.generate_text(ids, GREEDY))
            assert code is Code.INVALID_ARGUMENT
            assert re.match(r"prompt has \d+ bytes of token ids, at least \d+ tokens; with at least one", details)

    run_served(body, tokenizer)


def test_detokenize_gives_the_text_of_one_call_up_to_its_limit(tokenizer):
    async def body(served: Served) -> None:
        ids = random.Random(0).choices(range(tokenizer.vocab_size), k=200_000)
        assert await served.client.detokenize(ids) == tokenizer._backend.decode(ids, skip_special_tokens=True)
        code, details = await status_of(served.client.detokenize([3] * (service.MAX_DETOKENIZED + 1)))
        assert (code, details) == (Code.INVALID_ARGUMENT, "token_ids has 1048577 ids; at most 1048576 are allowed")
        code, details = await status_of(served.client.detokenize([3] * 150_000 + [-7]))
        assert (code, details[:26]) == (Code.INVALID_ARGUMENT, "token_ids[150000] is -7; t")

    run_served(body, tokenizer)


def with_params(**params):
    return pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(**params)).SerializeToString()


PLAIN = pb.GenerateRequest(text="a").SerializeToString()
TOO_MUCH = {
    "stops": (with_params(stop=[""] * 2_000_000), "sampling_params has 4000000 bytes; at most 65536 are allowed"),
    "parameters again": (with_params(stop=["x"] * 9000) * 30, "sampling_params has 810000 bytes; at most 65536"),
    "fields again": (PLAIN * 1_000_000, "it has more than 64 fields"),
    "unknown fields": (PLAIN + b"\xf8\x07\x01" * 1_000_000, "it has more than 64 fields"),
    "fewer stops": (with_params(stop=["x"] * 20_000), "stop has 20000 strings; at most 16 are allowed"),
    "stop ids": (with_params(stop_token_ids=[5] * 60_000), "stop_token_ids has 60000 ids; at most 16 are allowed"),
    "request_id": (
        pb.GenerateRequest(text="a", request_id="r" * 4_000_000).SerializeToString(),
        "request_id has 4000000",
    ),
    "tenant": (
        pb.GenerateRequest(text="a", tenant="t" * 4_000_000).SerializeToString(),
        "tenant has 4000000 characters",
    ),
    "deadline": (pb.GenerateRequest(text="a", deadline=-1e308).SerializeToString(), "deadline passed 1e+308 s before"),
}


@pytest.mark.parametrize(("message", "words"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_is_too_much_is_refused_in_short(tokenizer, message, words):
    async def body(served: Served) -> None:
        code, details = await generate_raw(served, message)
        assert code in (Code.INVALID_ARGUMENT, Code.DEADLINE_EXCEEDED)
        assert words in details
        assert len(details) < 200

    run_served(body, tokenizer)


def test_a_long_id_is_not_sent_back(tokenizer):
    async def body(served: Served) -> None:
        async with grpc.aio.insecure_channel(served.address) as channel:
            abort = pb_grpc.JaxServeStub(channel).Abort(pb.AbortRequest(request_id="x" * 1_000_000))
            code, details = await status_of(abort)
        assert code is Code.NOT_FOUND
        assert details.endswith("xxx' names no unfinished request")
        assert len(details) < 200

    run_served(body, tokenizer)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("Tokenize", pb.TokenizeRequest(text="x" * 100_000)),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[3] * 100_000)),
    ],
)
@pytest.mark.parametrize(
    ("number", "words"), [(1, "has unknown field 127; this"), (100_000, "it has more than 64 fields")]
)
def test_unknown_fields_of_large_messages_are_refused(tokenizer, method, message, number, words):
    async def body(served: Served) -> None:
        async with grpc.aio.insecure_channel(served.address) as channel:
            call = channel.unary_unary(f"/jaxserve.v1.JaxServe/{method}")
            code, details = await status_of(call(message.SerializeToString() + b"\xf8\x07\x01" * number))
        assert code is Code.INVALID_ARGUMENT
        assert words in details

    run_served(body, tokenizer)


def test_unknown_fields_of_a_large_part_are_refused():
    ids = pb.TokenIds(ids=[3] * 1_000_000)
    refuse_unknown_bytes(ids)
    ids.MergeFromString(b"\xf8\x07\x01" * 100_000)
    with pytest.raises(ValueError, match=r"^TokenIds has 300000 bytes of unknown fields; this server does not"):
        refuse_unknown_bytes(ids)


@pytest.mark.parametrize(
    "message",
    [
        pb.GenerateRequest(
            text="x" * 300_000,
            request_id="r",
            sampling_params=pb.SamplingParams(temperature=0.5, stop=["😀" * 256] * 16, stop_token_ids=[2**31 - 1] * 16),
            priority=-1,
            deadline=1.0,
        ),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[-1] * 100_000)),
    ],
    ids=["text", "ids"],
)
def test_whatever_may_be_sent_passes_the_measuring(message):
    check_generate(message.SerializeToString(), lambda *prompt: None)


def test_the_last_text_of_a_message_is_measured():
    sizes: list[tuple[int, bool]] = []

    def check(*prompt) -> None:
        sizes.append(prompt)

    texts = b"".join(pb.GenerateRequest(text="é" * count).SerializeToString() for count in (7, 9))
    check_generate(texts, check)
    assert sizes.pop() == (18, True)
    ids = pb.TokenIds(ids=[1, -1])
    check_generate(texts + pb.GenerateRequest(token_ids=ids).SerializeToString(), check)
    assert sizes.pop() == (ids.ByteSize(), False)


def test_what_is_malformed_is_left_to_the_parser():
    for data in (b"\x12", b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\xff" * 30, b"\x13\x14", b"\x0d\x00"):
        check_generate(data, lambda *prompt: None)


def test_details_fit_a_trailer(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        call = asyncio.ensure_future(status_of(served.client.generate_text("hi", GREEDY, request_id="r")))
        await served.until(served.engine.wait_for_requests, 1)
        served.engine.fail_request("r", "é" * 100_000)
        code, details = await call
        assert code is Code.INTERNAL
        assert len(details) <= MAX_DETAILS

    run_served(body, tokenizer)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_fault_29_memory_is_bounded_and_comes_back(directory):
    process = Process([sys.executable, "-m", "tests.server.echo_server", "run", str(directory)])
    try:
        port = process.until(r"ready on 127\.0\.0\.1:(\d+) ")[1]

        def memory(field):
            with open(f"/proc/{process.popen.pid}/status", encoding="utf-8") as status:
                return next(int(line.split()[1]) / 1000 for line in status if line.startswith(field))

        async def send() -> None:
            async with harness.AsyncClient(f"127.0.0.1:{port}") as client:
                await client.tokenize("ab " * 200_000)
                before = memory("VmRSS")
                for text in (TEXTS["words"], TEXTS["emoji"]):
                    await asyncio.gather(*(status_of(client.generate_text(text, SamplingParams())) for _ in range(8)))
                await asyncio.gather(*(client.tokenize("a b" * 300_000) for _ in range(8)))
                assert memory("VmHWM") - before < 200
                await asyncio.sleep(0.5)
                assert memory("VmRSS") - before < 80

        asyncio.run(send())
    finally:
        process.close()
