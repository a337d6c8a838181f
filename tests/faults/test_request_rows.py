"""What a client sends over gRPC that is wrong, on a running server: the answer names it, and nothing stays behind.

Where what the messages of our own client cannot hold is sent as bytes. HTTP's side is in test_http_rows.py.
"""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest

from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.faults.fault_server import GREEDY, reaches, run_fault
from tests.server import raw_http2
from tests.server.fakes import READY
from tests.server.harness import MAX_MESSAGE_BYTES, Served, status_of
from tests.server.raw_http2 import JAXSERVE, message

Code = grpc.StatusCode
VOCAB_SIZE = READY.limits.vocab_size


async def generate(served: Served, request: pb.GenerateRequest | bytes) -> tuple[grpc.StatusCode, str, dict]:
    """How Generate ends: code, details and trailing metadata."""
    data = request if isinstance(request, bytes) else request.SerializeToString()
    async with grpc.aio.insecure_channel(served.address) as channel:
        call = channel.unary_stream(JAXSERVE + "Generate")(data)
        return await call.code(), await call.details() or "", dict(await call.trailing_metadata())


def refused(tokenizer, code: grpc.StatusCode, *cases: tuple[pb.GenerateRequest | bytes, str]) -> None:
    """Asserts that each request is refused with these words, before the engine hears of it."""

    async def body(served: Served) -> None:
        for request, words in cases:
            found, details, metadata = await generate(served, request)
            assert (found, words in details) == (code, True), (words, details)
            assert "grpc-retry-pushback-ms" not in metadata
        assert served.engine.requests == []

    run_fault(body, tokenizer)


def sampling(**params) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(**params))


def structured(**constraint) -> pb.GenerateRequest:
    return sampling(structured_outputs=pb.StructuredOutputs(**constraint))


def with_field(number: int, payload: bytes) -> bytes:
    """A request whose sampling parameters have a field that this version does not have."""
    own = sampling(max_tokens=1).sampling_params.SerializeToString()
    tag = _varint(number << 3 | 2) + _varint(len(payload)) + payload
    params = own + tag
    return pb.GenerateRequest(text="a").SerializeToString() + b"\x22" + _varint(len(params)) + params


def _varint(value: int) -> bytes:
    data = b""
    while value > 0x7F:
        data += bytes([value & 0x7F | 0x80])
        value >>= 7
    return data + bytes([value])


def ids(*token_ids: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids))


def test_fault_01_an_empty_prompt(tokenizer):
    refused(
        tokenizer,
        Code.INVALID_ARGUMENT,
        (pb.GenerateRequest(text=""), "text is empty"),
        (ids(), "token_ids is empty"),
        (pb.GenerateRequest(), "prompt is not set"),
    )


def test_fault_02_prompt_and_max_tokens_over_the_context(tokenizer):
    request = sampling(max_tokens=510)
    request.text = "abcd"
    words = "prompt has 5 tokens and max_tokens is 510; together 515 exceed max_model_len 512"
    refused(tokenizer, Code.INVALID_ARGUMENT, (request, words))


def test_fault_03_what_fits_the_context_and_never_the_pool(tokenizer):
    request = sampling(max_tokens=9)
    request.text = "a" * 300
    words = "prompt has 301 tokens and max_tokens is 9; together 310 exceed the page pool of 256 tokens"
    refused(tokenizer, Code.FAILED_PRECONDITION, (request, words))


def test_fault_04_max_tokens_that_is_no_number_of_tokens(tokenizer):
    cases = [(sampling(max_tokens=value), f"max_tokens is {value}") for value in (0, -1, -(2**63), 2**31)]
    refused(tokenizer, Code.INVALID_ARGUMENT, *cases)


def test_fault_05_a_field_for_many_samples(tokenizer):
    """jaxserve.v1 has no n: a field that it does not define is refused, whatever it asks for."""
    n = 1_000_000_000
    refused(tokenizer, Code.INVALID_ARGUMENT, (with_field(11, _varint(n)), "unknown field 11"))


def test_fault_06_numbers_that_are_not_finite_or_out_of_range(tokenizer):
    values = (float("nan"), float("inf"), float("-inf"), -0.5)
    names = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty")
    cases = [(sampling(**{name: value}), f"{name} is {value}") for value in values for name in names]
    cases.append((sampling(top_k=-2), "top_k is -2"))
    cases += [
        (sampling(**{name: value}), f"{name} is {value}")
        for value in (float("nan"), 2.5)
        for name in ("presence_penalty", "frequency_penalty")
    ]
    refused(tokenizer, Code.INVALID_ARGUMENT, *cases)


def test_fault_07_token_ids_out_of_the_vocabulary(tokenizer):
    refused(
        tokenizer,
        Code.INVALID_ARGUMENT,
        (ids(5, -1), "prompt_token_ids[1] is -1"),
        (ids(-(2**31)), "prompt_token_ids[0] is -2147483648"),
        (ids(VOCAB_SIZE), f"prompt_token_ids[0] is {VOCAB_SIZE}"),
        (ids(3, 4, 2**31 - 1), "prompt_token_ids[2] is 2147483647"),
        (sampling(stop_token_ids=[VOCAB_SIZE]), f"stop_token_ids has {VOCAB_SIZE}"),
        (sampling(stop_token_ids=[-1]), "stop_token_ids"),
    )


def test_fault_08_nul_bytes_invalid_utf_8_and_an_emoji_over_several_tokens(tokenizer):
    async def body(served: Served) -> None:
        for text in ("a\0b", "\0", "🍏 and 🍏", "👩‍👩‍👧"):
            chunks = [chunk async for chunk in served.client.generate(text, GREEDY)]
            assert "".join(chunk.text for chunk in chunks) == text
            assert all("\ufffd" not in chunk.text for chunk in chunks), "half a character was sent"
        emoji = tokenizer.encode("🍏")[1:]
        assert len(emoji) == 4
        served.engine.pause()
        stream = served.client.generate("🍏", GREEDY)
        texts = []
        for _ in emoji:
            served.engine.allow(1)
            texts.append((await anext(stream)).text)
        assert texts == ["", "", "", "🍏"]
        served.engine.resume()
        await stream.aclose()
        found, details, _ = await generate(served, bytes([0x12, 0x02, 0xC3, 0x28]))
        assert found is Code.INVALID_ARGUMENT
        assert "UTF-8" in details

    run_fault(body, tokenizer)


def test_fault_09_too_many_stop_strings_or_an_empty_one(tokenizer):
    refused(
        tokenizer,
        Code.INVALID_ARGUMENT,
        (sampling(stop=[str(number) for number in range(10_000)]), "stop has 10000"),
        (sampling(stop=["ok", ""]), "stop has ''"),
        (sampling(stop=["x" * 257]), "stop has a string of 257 characters"),
    )


def test_fault_10_a_logit_bias(tokenizer):
    refused(
        tokenizer,
        Code.INVALID_ARGUMENT,
        (sampling(logit_bias={-1: 1.0}), "logit_bias id is -1; it must be from 0"),
        (sampling(logit_bias={VOCAB_SIZE: 1.0}), f"logit_bias has {VOCAB_SIZE}"),
        (sampling(logit_bias={5: 1e300}), "logit_bias[5] is 1e+300; it must be at least -100 and at most 100"),
        (sampling(logit_bias=dict.fromkeys(range(1025), 1.0)), "logit_bias has 1025 ids; at most 1024 are allowed"),
    )


def test_fault_11_a_grammar(tokenizer):
    """However deep it is nested, and whatever regular expression it holds."""
    schema = '{"items":' * 3_000 + "{}" + "}" * 3_000
    refused(
        tokenizer,
        Code.INVALID_ARGUMENT,
        (structured(grammar="start: " + "(" * 60_000), "structured_outputs.grammar is refused"),
        (structured(regex="(" * 60_000), "structured_outputs.regex is refused"),
        (structured(json=schema), "structured_outputs.json is nested more than 100 deep"),
        (structured(), "structured_outputs must have exactly one of json"),
    )


def test_fault_12_many_different_schemas(tokenizer):
    """Each is checked and served; how few are kept, tests/frontend/test_grammar_checker.py tells."""

    async def body(served: Served) -> None:
        for number in range(20):
            params = SamplingParams(
                structured_outputs=StructuredOutputsParams(json={"type": "object", "title": str(number)})
            )
            chunks = [chunk async for chunk in served.client.generate("a", params)]
            assert chunks[-1].finish_reason is FinishReason.STOP
            assert f'"title": "{number}"' in served.engine.requests[-1].grammar

    run_fault(body, tokenizer)


def test_fault_13_a_message_over_the_size_limit(tokenizer):
    async def body(served: Served) -> None:
        found, _, metadata = await generate(served, pb.GenerateRequest(text="a" * MAX_MESSAGE_BYTES))
        assert found is Code.RESOURCE_EXHAUSTED
        assert "grpc-retry-pushback-ms" not in metadata
        assert served.engine.requests == []

    run_fault(body, tokenizer)


def test_fault_14_oversized_metadata(tokenizer):
    async def body(served: Served) -> None:
        for _ in range(3):
            async with raw_http2.connected(served.address) as connection:
                fields = [(b"x", b"y" * 126)] * 200
                stream = raw_http2.send(connection, JAXSERVE + "Generate", [message(b"")], fields)
                assert (await raw_http2.ended(stream))[0] is Code.RESOURCE_EXHAUSTED
        assert served.engine.requests == []

    run_fault(body, tokenizer)


def test_fault_15_a_full_queue(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        places = READY.max_num_seqs + READY.max_num_waiting
        waiting = [asyncio.ensure_future(served.client.generate_text("a", GREEDY)) for _ in range(places)]
        await served.until(served.engine.wait_for_requests, places)
        found, details, metadata = await generate(served, pb.GenerateRequest(text="one more"))
        assert found is Code.RESOURCE_EXHAUSTED
        assert str(places) in details
        assert int(metadata["grpc-retry-pushback-ms"]) > 0
        served.engine.resume()
        assert all(answer.text == "a" for answer in await asyncio.gather(*waiting))

    run_fault(body, tokenizer)


def test_fault_19_a_duplicate_request_id(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        first = asyncio.ensure_future(served.client.generate_text("a", GREEDY, request_id="twin"))
        await served.until(served.engine.wait_for_requests, 1)
        found, details, _ = await generate(served, pb.GenerateRequest(text="b", request_id="twin"))
        assert found is Code.ALREADY_EXISTS
        assert "twin" in details
        served.engine.resume()
        assert (await first).text == "a"
        assert (await served.client.generate_text("c", GREEDY, request_id="twin")).text == "c"

    run_fault(body, tokenizer)


def test_fault_20_aborting_what_is_unknown_or_has_finished(tokenizer):
    async def body(served: Served) -> None:
        await served.client.generate_text("a", GREEDY, request_id="finished")
        for name in ("unknown", "finished", "finished", "", "r" * 10_000):
            assert not await served.client.abort(name)
            code, details = await status_of(served.client._stub.Abort(pb.AbortRequest(request_id=name)))
            assert code is Code.NOT_FOUND
            assert len(details) < 600
        served.engine.pause()
        stream = served.client.generate("abc", GREEDY, request_id="r")
        served.engine.allow(1)
        await anext(stream)
        assert await served.client.abort("r")
        assert not await served.client.abort("r")

    run_fault(body, tokenizer)


def test_fault_27_another_tenants_prefix_has_another_key():
    """Content keys are made for one tenant and salt each, and only equal ones can hit."""
    tokens = list(range(64))
    keys = ContentKeys()
    names = [("", ""), ("a", ""), ("", "a"), ("b", "a"), ("a", "b")]
    found = {name: keys.link(keys.root(*name), tokens) for name in names}
    assert len(set(found.values())) == len(names)
    assert keys.link(keys.root("b", "a"), tokens) == found["b", "a"]
    other = ContentKeys()
    assert other.link(other.root("b", "a"), tokens) != found["b", "a"], "a client could compute it"


@pytest.mark.parametrize("name", ["user\nERROR forged line", "\x1b[31mred\x1b[0m", "a\rb", "tab\tand \u2028 and \x00"])
def test_fault_28_control_characters_in_names_are_escaped_in_logs(tokenizer, caplog, name):
    """Of a request whose output cannot be turned into text, and of one that ends badly: both are logged by name."""
    caplog.set_level(logging.DEBUG)

    async def body(served: Served) -> None:
        for request_id, tenant in ((name, "t"), ("plain", name)):
            request = pb.GenerateRequest(
                text="abc", request_id=request_id, tenant=tenant, sampling_params={"top_k": -9}
            )
            found, details, _ = await generate(served, request)
            assert found is Code.INVALID_ARGUMENT
            assert "\n" not in details
            request.sampling_params.ClearField("top_k")
            assert (await generate(served, request))[0] is Code.INTERNAL
        await served.client.abort(name)

    run_fault(body, tokenizer, failpoints=("detokenize=raise,times=2",))
    lines = [record.getMessage() for record in caplog.records]
    assert any("cannot be turned into text" in line for line in lines)
    for line in lines:
        assert line.isprintable() or not any(character in line for character in "\n\r\x1b\x00\u2028"), line


def test_fault_32_logprobs_are_refused_before_any_work(tokenizer):
    cases = [
        (sampling(**{name: value}), f"{name} is {value}; {words}")
        for name in ("logprobs", "prompt_logprobs")
        for value, words in ((10_000, "this server returns at most max_logprobs 20 ids"), (-2, "it must be from -1"))
    ]
    refused(tokenizer, Code.INVALID_ARGUMENT, *cases)


def test_fault_38_clients_that_retry_for_ever_are_refused_and_cost_the_others_nothing(tokenizer):
    """Three times as many as there are places, each of which asks again at once; every refusal says when to."""

    async def body(served: Served) -> None:
        served.engine.pause()
        places = READY.max_num_seqs + READY.max_num_waiting
        inside = [asyncio.ensure_future(served.client.generate_text(f"{number}", GREEDY)) for number in range(places)]
        await served.until(served.engine.wait_for_requests, places)
        refusals = [0] * (2 * places)

        async def insist(number: int) -> str:
            while True:
                call = served.client._stub.Generate(pb.GenerateRequest(text=f"{number}"))
                try:
                    return "".join([answer.text async for answer in call])
                except grpc.aio.AioRpcError as error:
                    assert error.code() is Code.RESOURCE_EXHAUSTED  # noqa: PT017
                    assert int(dict(await call.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
                    refusals[number] += 1

        outside = [asyncio.ensure_future(insist(number)) for number in range(2 * places)]
        await reaches(lambda: all(refusals))
        assert len(served.engine.requests) == places
        served.engine.resume()
        assert [answer.text for answer in await asyncio.gather(*inside)] == [f"{number}" for number in range(places)]
        assert await asyncio.gather(*outside) == [f"{number}" for number in range(2 * places)]

    run_fault(body, tokenizer)


def test_a_fault_leaves_no_call_open(tokenizer):
    """What the other tests rely on."""

    async def body(served: Served) -> None:
        await generate(served, pb.GenerateRequest(text=""))
        await reaches(lambda: served.server.calls.num_open == 0)

    run_fault(body, tokenizer)
