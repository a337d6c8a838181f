"""Requests of a gateway, over a real connection."""

import time

import grpc
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.models.tiny.tiny_tokenizer import EOS_ID
from jaxserve.serving.access.callers import Caller
from jaxserve.serving.problem import UnauthenticatedError
from tests.engine_ready import changed
from tests.server.fakes import READY, EchoEngine
from tests.server.harness import Served, status_of
from tests.server.vllm_harness import SERVICE, answers, completed, failure, ids, request, run

Code = grpc.StatusCode


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
        code, details = await failure(stub.Generate(request("a", sampling_params=pb.SamplingParams(n=300))))
        assert (code, details[:26]) == (Code.INVALID_ARGUMENT, "n is 300; at most 128 samp")
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
            code, details = await raw("Abort", many)
            assert (code, "it has more than 64 fields" in details) == (Code.INVALID_ARGUMENT, True)
        assert served.engine.requests == []

    run(body, tokenizer)


def test_who_is_not_known_gets_health_alone(tokenizer):
    class Nobody:
        def identify(self, credential):
            if credential != "Bearer key":
                raise UnauthenticatedError("the key is missing or wrong")
            return Caller("name", tenant="fixed")

    async def body(served: Served, stub) -> None:
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
        metadata = (("authorization", "Bearer key"), ("x-tenant", "fixed"))
        await completed(stub.Generate(request("a"), metadata=metadata))
        assert served.engine.requests[0].options.tenant == "fixed"

    run(body, tokenizer, callers=Nobody())
