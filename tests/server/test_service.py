"""Every RPC and every status code, over a real connection."""

import asyncio
import gc
import time
import weakref

import grpc
import pytest
from google.protobuf.message import DecodeError

from jaxserve.engine.messages import EngineStats
from jaxserve.frontend.delta import Cause, Delta
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import generate_request, join
from jaxserve.serving.grpc_port.call_interceptor import CallContext
from jaxserve.serving.grpc_port.service import errors_as_status
from jaxserve.serving.problem import check_delta
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2_grpc as pb_grpc
from tests.server.fakes import READY
from tests.server.harness import GREEDY, MAX_MESSAGE_BYTES, Served, run_served, status_of

Code = grpc.StatusCode


def ids(text: str) -> list[int]:
    """Token ids of a text of plain ASCII, without <bos>."""
    return [byte + 3 for byte in text.encode()]


def test_generate_streams_ids_text_reason_and_usage(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        stream = served.client.generate("abc", GREEDY)
        served.engine.allow(1)
        first = await anext(stream)
        assert (first.token_ids, first.text) == ((ids("a")[0],), "a")
        assert first.finish_reason is None
        assert first.usage is None
        served.engine.resume()
        answer = join([first, *[chunk async for chunk in stream]])
        assert answer.text == "abc"
        assert list(answer.token_ids) == [*ids("abc"), 2]
        assert answer.finish_reason is FinishReason.STOP
        usage = answer.usage
        assert (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens) == (4, 4, 1)

    run_served(body, tokenizer)


def test_every_field_of_a_request_reaches_the_engine(tokenizer):
    params = SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.75,
        min_p=0.125,
        seed=11,
        max_tokens=5,
        min_tokens=2,
        stop_token_ids=(9,),
        ignore_eos=True,
    )

    async def body(served: Served) -> None:
        deadline = time.time() + 1000
        answer = await served.client.generate_text(
            [5, 6, 7],
            params,
            request_id="mine",
            tenant="t",
            priority=-3,
            deadline=deadline,
            cache_salt="s",
        )
        assert answer.request_id == "mine"
        assert answer.token_ids == (5, 6, 7, 2, 5)
        assert answer.finish_reason is FinishReason.LENGTH
        (request,) = served.engine.requests
        assert request.prompt_token_ids == (5, 6, 7)
        assert (request.temperature, request.top_k, request.top_p, request.min_p) == (0.5, 7, 0.75, 0.125)
        assert (request.seed, request.max_tokens, request.min_tokens) == (11, 5, 2)
        assert request.stop_token_ids == (9,)
        assert (request.options.tenant, request.options.priority, request.options.cache_salt) == ("t", -3, "s")
        assert request.options.deadline == deadline

    run_served(body, tokenizer)


def test_unset_fields_have_their_defaults(tokenizer):
    async def body(served: Served) -> None:
        answer = await served.client.generate_text("ab")
        assert len(answer.request_id) >= 16
        (request,) = served.engine.requests
        assert request.temperature == 1.0
        assert request.max_tokens == READY.limits.pool_tokens - 3 + 1  # <bos>, a, b; the last needs no page
        assert request.options.deadline is None
        assert request.stop_token_ids == (2,)

    run_served(body, tokenizer)


def test_stop_string_ends_the_text_and_the_request(tokenizer):
    async def body(served: Served) -> None:
        answer = await served.client.generate_text("hello", SamplingParams(temperature=0.0, stop=("ll",)))
        assert (answer.text, answer.finish_reason) == ("he", FinishReason.STOP)

    run_served(body, tokenizer)


def test_nul_bytes_and_emoji_come_back_whole(tokenizer):
    async def body(served: Served) -> None:
        text = "a\x00b 😀 é"
        chunks = [chunk async for chunk in served.client.generate(text, GREEDY)]
        assert join(chunks).text == text
        assert not any("\ufffd" in chunk.text for chunk in chunks)

    run_served(body, tokenizer)


def test_many_streams_at_once_each_have_their_own_answer(tokenizer):
    async def body(served: Served) -> None:
        texts = [f"stream {number}" for number in range(30)]
        answers = await asyncio.gather(*(served.client.generate_text(text, GREEDY) for text in texts))
        assert [answer.text for answer in answers] == texts
        assert len({answer.request_id for answer in answers}) == len(texts)

    run_served(body, tokenizer)


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("", GREEDY, "text is empty"),
        ([], GREEDY, "token_ids is empty"),
        ([1, -1], GREEDY, "prompt_token_ids[1] is -1"),
        ([READY.limits.vocab_size], GREEDY, f"prompt_token_ids[0] is {READY.limits.vocab_size}"),
        ("a" * 600, GREEDY, f"max_model_len {READY.limits.max_model_len}"),
        ("abcd", SamplingParams(max_tokens=510), "prompt has 5 tokens and max_tokens is 510; together 515"),
        ("a", SamplingParams(stop_token_ids=(READY.limits.vocab_size,)), "stop_token_ids"),
    ],
)
def test_invalid_argument_names_field_value_and_limit(tokenizer, prompt, params, words):
    async def body(served: Served) -> None:
        code, details = await status_of(served.client.generate_text(prompt, params))
        assert code is Code.INVALID_ARGUMENT
        assert words in details
        assert served.engine.requests == []

    run_served(body, tokenizer)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.GenerateRequest(), "prompt is not set"),
        (pb.GenerateRequest(text="a", sampling_params={"max_tokens": 0}), "max_tokens is 0"),
        (pb.GenerateRequest(text="a", sampling_params={"max_tokens": 2**31}), "max_tokens is 2147483648"),
        (pb.GenerateRequest(text="a", sampling_params={"temperature": float("nan")}), "temperature is nan"),
        (pb.GenerateRequest(text="a", sampling_params={"stop": [""]}), "stop has ''"),
        (pb.GenerateRequest(text="a", deadline=float("inf")), "deadline is inf"),
        (pb.GenerateRequest(text="a", tenant="t" * 257), "tenant has 257 characters"),
        (pb.GenerateRequest(text="a", request_id="r" * 257), "request_id has 257 characters"),
        (pb.GenerateRequest(text="a", cache_salt="s" * 257), "cache_salt has 257 characters"),
    ],
)
def test_what_the_stubs_would_not_send_is_refused_too(tokenizer, request_, words):
    async def body(served: Served) -> None:
        async with grpc.aio.insecure_channel(served.address) as channel:
            code, details = await status_of(_first(pb_grpc.JaxServeStub(channel).Generate(request_)))
        assert code is Code.INVALID_ARGUMENT
        assert words in details

    run_served(body, tokenizer)


def test_unknown_fields_and_bytes_that_are_no_message(tokenizer):
    async def body(served: Served) -> None:
        unknown = pb.GenerateRequest(text="a").SerializeToString() + bytes([0xF8, 0x07, 0x01])
        assert (await _raw(served, unknown))[0] is Code.INVALID_ARGUMENT
        invalid_utf8, breaks_off = bytes([0x12, 0x02, 0xC3, 0x28]), bytes([0x12, 0x7F, 0x41])
        code, details = await _raw(served, invalid_utf8)
        assert code is Code.INVALID_ARGUMENT
        assert "UTF-8" in details
        assert (await _raw(served, breaks_off))[0] is Code.INVALID_ARGUMENT
        assert served.engine.requests == []
        assert (await served.client.generate_text("still here", GREEDY)).text == "still here"

    run_served(body, tokenizer)


def test_a_request_that_never_fits_the_pool_is_a_failed_precondition(tokenizer):
    async def body(served: Served) -> None:
        code, details = await status_of(served.client.generate_text("a" * 300, SamplingParams(max_tokens=9)))
        assert code is Code.FAILED_PRECONDITION
        assert "page pool of 256 tokens" in details

    run_served(body, tokenizer)


def test_a_message_over_the_limit_is_resource_exhausted_without_pushback(tokenizer):
    async def body(served: Served) -> None:
        call = served.client._stub.Tokenize(pb.TokenizeRequest(text="a" * MAX_MESSAGE_BYTES))
        code, _ = await status_of(call)
        assert code is Code.RESOURCE_EXHAUSTED
        assert "grpc-retry-pushback-ms" not in dict(await call.trailing_metadata())

    run_served(body, tokenizer)


def test_a_full_queue_is_resource_exhausted_with_pushback(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        places = READY.max_num_seqs + READY.max_num_waiting
        waiting = [asyncio.ensure_future(served.client.generate_text("a", GREEDY)) for _ in range(places)]
        await served.until(served.engine.wait_for_requests, places)
        call = served.client._stub.Generate(generate_request("one more"))
        code, details = await status_of(_first(call))
        assert code is Code.RESOURCE_EXHAUSTED
        assert str(places) in details
        assert int(dict(await call.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        served.engine.resume()
        assert all(answer.text == "a" for answer in await asyncio.gather(*waiting))

    run_served(body, tokenizer)


def test_a_request_id_in_use_already_exists(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        first = asyncio.ensure_future(served.client.generate_text("a", GREEDY, request_id="twin"))
        await served.until(served.engine.wait_for_requests, 1)
        code, details = await status_of(served.client.generate_text("b", GREEDY, request_id="twin"))
        assert code is Code.ALREADY_EXISTS
        assert "twin" in details
        served.engine.resume()
        assert (await first).text == "a"
        assert (await served.client.generate_text("c", GREEDY, request_id="twin")).text == "c"

    run_served(body, tokenizer)


def test_a_failed_request_is_internal_and_its_neighbor_goes_on(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        good = asyncio.ensure_future(served.client.generate_text("good", GREEDY, request_id="good"))
        bad = asyncio.ensure_future(status_of(served.client.generate_text("bad", GREEDY, request_id="bad")))
        await served.until(served.engine.wait_for_requests, 2)
        served.engine.fail_request("bad", "logits are not finite")
        assert await bad == (Code.INTERNAL, "logits are not finite")
        served.engine.resume()
        assert (await good).text == "good"

    run_served(body, tokenizer)


def test_abort_ends_the_stream_and_is_not_found_afterwards(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        stream = served.client.generate("abc", GREEDY, request_id="r")
        served.engine.allow(1)
        first = await anext(stream)
        assert await served.client.abort("r")
        answer = join([first, *[chunk async for chunk in stream]])
        assert (answer.text, answer.finish_reason, answer.usage.output_tokens) == ("a", FinishReason.ABORT, 1)
        await served.until(served.engine.wait_for_abort, "r")
        assert not await served.client.abort("r")
        code, details = await status_of(served.client._stub.Abort(pb.AbortRequest(request_id="nobody")))
        assert code is Code.NOT_FOUND
        assert "nobody" in details

    run_served(body, tokenizer)


def test_an_unforeseen_error_is_internal_and_tells_no_more_than_its_kind(tokenizer, monkeypatch, caplog):
    async def body(served: Served) -> None:
        def submit(*_: object, **__: object) -> None:
            raise ZeroDivisionError("secret")

        monkeypatch.setattr(served.frontend, "submit", submit)
        code, details = await status_of(served.client.generate_text("a", GREEDY))
        assert (code, details) == (Code.INTERNAL, "internal error: ZeroDivisionError")
        assert "unforeseen" in caplog.text

    run_served(body, tokenizer)


@pytest.mark.parametrize("error", [grpc.aio.InternalError("write failed"), ValueError("refused")])
def test_a_client_that_is_gone_before_grpc_notices_is_a_cancellation(error):
    """Neither a write nor a status reaches it any more; gRPC logs nothing for a call that was canceled."""

    class Gone:
        async def abort(self, *_: object) -> None:
            raise grpc.aio.InternalError("the status cannot be sent")

    @errors_as_status
    async def behavior(*_: object) -> None:
        raise error

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(behavior(None, None, Gone()))


def test_a_call_that_fails_lets_go_of_its_message_at_once(tokenizer, monkeypatch):
    """Messages may be large; what gRPC keeps of a failed call waits for the garbage collector."""
    kept = []

    class Large:
        """Stands for what the behavior of a call holds."""

    def refuse(*_: object) -> None:
        large = Large()
        kept.append(weakref.ref(large))
        raise ValueError("refused")

    async def body(served: Served) -> None:
        monkeypatch.setattr("jaxserve.serving.grpc_port.service.check_count", refuse)
        gc.disable()
        try:
            for _ in range(3):
                assert await status_of(served.client.detokenize([1])) == (Code.INVALID_ARGUMENT, "refused")
            await asyncio.sleep(0.1)
            assert [reference() for reference in kept] == [None] * 3
        finally:
            gc.enable()

    run_served(body, tokenizer)


@pytest.mark.parametrize("kind", ["one answer", "a stream", "malformed"])
def test_a_refused_call_lets_go_of_what_it_read_at_once(tokenizer, monkeypatch, kind):
    """Through the interceptor, too: no frame that the error passes holds the message."""
    kept = []

    class Message:
        """Stands for a message, to which nothing can refer weakly."""

        def __init__(self, message):
            self._message = message

        def __getattr__(self, name):
            return getattr(self._message, name)

    def parse(data: bytes) -> Message:
        message = Message(pb.GenerateRequest.FromString(data) if kind == "a stream" else pb.DetokenizeRequest())
        kept.append(weakref.ref(message))
        if kind == "malformed":
            raise DecodeError("no message")
        return message

    def refuse(*_: object) -> None:
        raise ValueError("refused")

    make = CallContext.__init__

    def make_with_parse(self, *arguments) -> None:
        make(self, *arguments)
        self._parse = parse

    async def body(served: Served) -> None:
        monkeypatch.setattr("jaxserve.serving.grpc_port.service.check_count", refuse)
        monkeypatch.setattr("jaxserve.serving.grpc_port.convert.params_from_proto", refuse)
        monkeypatch.setattr(CallContext, "__init__", make_with_parse)
        gc.disable()
        try:
            for _ in range(3):
                call = served.client.generate_text([1], GREEDY) if kind == "a stream" else served.client.detokenize([1])
                assert (await status_of(call))[0] is Code.INVALID_ARGUMENT
            await asyncio.sleep(0.1)
            assert [reference() for reference in kept] == [None] * 3
        finally:
            gc.enable()

    run_served(body, tokenizer)


@pytest.mark.parametrize(
    ("reason", "cause", "error"),
    [
        (FinishReason.DEADLINE, Cause.DEADLINE, "DeadlineError"),
        (FinishReason.ERROR, Cause.ENGINE, "UnavailableError"),
        (FinishReason.ERROR, Cause.CLOSING, "UnavailableError"),
        (FinishReason.ERROR, Cause.REQUEST, "RequestFailedError"),
        (FinishReason.ABORT, Cause.CLIENT, None),
        (FinishReason.STOP, None, None),
        (None, None, None),
    ],
)
def test_what_a_last_delta_stands_for(reason, cause, error):
    raised = None
    try:
        check_delta(Delta("r", finish_reason=reason, error="why", cause=cause))
    except Exception as caught:
        raised = type(caught).__name__
    assert raised == error


def test_tokenize_and_detokenize(tokenizer):
    async def body(served: Served) -> None:
        token_ids = await served.client.tokenize("copy: hé😀\n")
        assert token_ids == tokenizer.encode("copy: hé😀\n")
        assert token_ids[0] == 1  # <bos>, as in a prompt
        assert await served.client.detokenize(token_ids) == "copy: hé😀\n"
        assert await served.client.tokenize("") == [1]
        assert await served.client.detokenize([]) == ""
        for bad in (-1, READY.limits.vocab_size):
            code, details = await status_of(served.client.detokenize([3, bad]))
            assert code is Code.INVALID_ARGUMENT
            assert f"token_ids[1] is {bad}" in details

    run_served(body, tokenizer)


def test_without_a_tokenizer_ids_are_served_and_text_is_refused():
    async def body(served: Served) -> None:
        assert (await served.client.generate_text([5, 6], GREEDY)).token_ids == (5, 6, 2)
        assert (await status_of(served.client.generate_text("a", GREEDY)))[0] is Code.INVALID_ARGUMENT
        assert (await status_of(served.client.tokenize("a")))[0] is Code.UNIMPLEMENTED
        assert (await status_of(served.client.detokenize([5])))[0] is Code.UNIMPLEMENTED
        assert not (await served.client.model_info()).has_tokenizer

    run_served(body, None)


def test_model_info(tokenizer):
    async def body(served: Served) -> None:
        info = await served.client.model_info()
        assert info == pb.GetModelInfoResponse(
            name="echo",
            architecture="EchoForCausalLM",
            num_parameters=1234,
            dtype="float32",
            vocab_size=READY.limits.vocab_size,
            max_model_len=512,
            max_prompt_len=511,
            eos_token_ids=[2],
            has_tokenizer=True,
        )

    run_served(body, tokenizer)


def test_server_info(tokenizer):
    async def body(served: Served) -> None:
        await served.client.generate_text("abc", GREEDY)
        info = await served.client.server_info()
        assert (info.page_size, info.num_pages, info.max_num_seqs, info.max_num_waiting) == (16, 16, 8, 32)
        assert (info.platform, info.attention, info.num_executables) == ("cpu", "none", 7)
        assert (info.compile_seconds, info.start_seconds) == (1.5, 2.5)
        assert info.version
        assert info.uptime_seconds >= 0
        assert not info.draining
        assert info.stats.generation_tokens == 4

    run_served(body, tokenizer)


def test_the_counts_on_the_wire_are_the_engines():
    wire = set(pb.EngineStats.DESCRIPTOR.fields_by_name)
    assert wire <= set(EngineStats.__struct_fields__)


async def _first(call):
    async for response in call:
        return response


async def _raw(served: Served, data: bytes) -> tuple[grpc.StatusCode, str]:
    """The status of a Generate call whose request is these bytes."""
    async with grpc.aio.insecure_channel(served.address) as channel:
        call = channel.unary_stream(
            "/jaxserve.v1.JaxServe/Generate",
            request_serializer=lambda payload: payload,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        return await status_of(_first(call(data)))
