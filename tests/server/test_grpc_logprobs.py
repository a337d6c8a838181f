"""Log-probabilities over gRPC, in jaxserve.v1's messages and VllmEngine's. The engine's are -position - id / 256."""

from __future__ import annotations

import json

import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm_pb

from jaxserve.models.tiny.tiny_tokenizer import BOS_ID, EOS_ID
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.client_output import JsonOutput
from jaxserve.serving.clients.client_results import TokenLogprob, join
from jaxserve.serving.clients.http_client import _chunks, generate_body
from tests.server.harness import Served, run_served
from tests.server.vllm_harness import answers, ids, request, run

WANTING = SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1)


def scored(position: int, token: int, width: int) -> TokenLogprob:
    top = tuple((other, -position - other / 256) for other in range(width))
    return TokenLogprob(token, -position - token / 256, token + 1, top)


@pytest.mark.parametrize("stop", [(), ("bc",)])
def test_each_token_has_its_own(tokenizer, stop):
    async def body(served: Served) -> None:
        params = SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1, stop=stop)
        chunks = [chunk async for chunk in served.client.generate("abc", params)]
        answer = join(chunks)
        tokens = ids("abc") if stop else [*ids("abc"), EOS_ID]
        assert answer.token_ids == tuple(tokens)
        assert answer.text == ("a" if stop else "abc")
        assert answer.logprobs == tuple(scored(place, token, 2) for place, token in enumerate(tokens, start=4))
        first, *rest = answer.prompt_logprobs
        assert first == TokenLogprob(BOS_ID)
        assert rest == [scored(place, token, 1) for place, token in enumerate(ids("abc"), start=1)]
        assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)
        plain = await served.client.generate_text("abc", SamplingParams(temperature=0.0))
        assert (plain.logprobs, plain.prompt_logprobs) == ((), ())

    run_served(body, tokenizer)


def test_a_long_prompts_come_in_several_messages(tokenizer, monkeypatch):
    monkeypatch.setattr("jaxserve.serving.grpc_port.convert._MOST_LOGPROBS", 30)

    async def body(served: Served) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2)
        chunks = [chunk async for chunk in served.client.generate([5] * 35, params)]
        assert [len(chunk.prompt_logprobs) for chunk in chunks] == [11, 10, 10, 4, 0]
        found = join(chunks).prompt_logprobs
        assert found == (TokenLogprob(5), *(scored(place, 5, 2) for place in range(1, 35)))

    run_served(body, tokenizer)


def test_a_reader_that_is_behind_finds_them_merged(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        stream = await served.frontend.submit("abcdef", WANTING)
        served.engine.allow(5)
        await served.until(served.engine.wait_for_requests, 1)
        while stream.num_unread < 5:
            await served.until(served.engine.wait_for_requests, 1)
        delta = await anext(stream)
        assert delta.token_ids == tuple(ids("abcde"))
        assert delta.logprobs is not None
        assert delta.logprobs.ranks.tolist() == [token + 1 for token in ids("abcde")]
        assert delta.prompt_logprobs is not None
        assert delta.prompt_logprobs.token_ids == (BOS_ID, *ids("abcdef"))
        served.engine.resume()
        stream.close()

    run_served(body, tokenizer)


@pytest.mark.parametrize("streams", [False, True])
def test_the_gateways_messages(tokenizer, streams):
    async def body(served: Served, stub) -> None:
        params = vllm_pb.SamplingParams(temperature=0, logprobs=1, prompt_logprobs=0)
        found = await answers(stub.Generate(request("ab", sampling_params=params, stream=streams)))
        *chunks, last = found
        tokens = [*ids("ab"), EOS_ID]
        output, given = last.complete.output_logprobs, last.complete.input_logprobs
        assert list(output.token_ids) == list(last.complete.output_ids) == tokens
        assert list(output.token_logprobs) == [-place - token / 256 for place, token in enumerate(tokens, start=2)]
        tops = [(list(top.token_ids), list(top.values)) for top in output.top_logprobs]
        assert tops == [([0], [-place]) for place in (2, 3, 4)]
        assert list(given.token_ids) == ids("ab")
        assert [one.HasField("value") for one in given.token_logprobs] == [False, True]
        assert given.token_logprobs[1].value == -1 - ids("b")[0] / 256
        streamed = [token for chunk in chunks for token in chunk.chunk.output_logprobs.token_ids]
        assert streamed == (tokens if streams else [])
        assert [chunk.chunk.HasField("input_logprobs") for chunk in chunks] == [True, *[False] * (len(chunks) - 1)][
            : len(chunks)
        ]
        plain = await answers(stub.Generate(request("ab")))
        assert not plain[-1].complete.HasField("output_logprobs")

    run(body, tokenizer)


def test_the_client_reads_what_http_answers():
    """By ids, which it asks for."""
    path, body = generate_body("abc", SamplingParams(logprobs=1))
    assert (path, body["logprobs"], body["return_tokens_as_token_ids"]) == ("/v1/completions", 1, True)
    completion = {
        "tokens": ["token_id:7"],
        "token_logprobs": [-2.0],
        "top_logprobs": [{"token_id:7": -2.0, "token_id:0": -0.5}],
    }
    entry = {"token": "token_id:7", "logprob": -2.0, "top_logprobs": [{"token": "token_id:0", "logprob": -0.5}]}
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    for logprobs, top in ((completion, ((0, -0.5), (7, -2.0))), ({"content": [entry]}, ((0, -0.5),))):
        choice = {"text": "x", "token_ids": [7], "logprobs": logprobs, "finish_reason": "length"}
        (chunk,) = _chunks(iter([{"choices": [choice], "usage": usage}]))
        assert chunk.logprobs == (TokenLogprob(7, -2.0, None, top),)


def test_json_output_has_them_where_they_are_wanted(tokenizer, capsys):
    async def body(served: Served) -> None:
        for params in (WANTING, SamplingParams(temperature=0.0)):
            JsonOutput().answer("a", await served.client.generate_text("a", params))

    run_served(body, tokenizer)
    with_them, without = map(json.loads, capsys.readouterr().out.splitlines())
    assert with_them["logprobs"][0] == {
        "token_id": 100,
        "logprob": -2 - 100 / 256,
        "rank": 101,
        "top": [[0, -2.0], [1, -2 - 1 / 256]],
    }
    assert with_them["prompt_logprobs"][0] == {"token_id": BOS_ID, "logprob": None, "rank": None, "top": []}
    assert {"logprobs", "prompt_logprobs"}.isdisjoint(without)
