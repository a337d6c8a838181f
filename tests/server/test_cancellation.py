"""A client that goes away, is too late or reads slowly: the engine is told, and nobody else notices."""

import asyncio
import time

import grpc
import pytest

from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import AsyncClient, Client, generate_request
from tests.engine_ready import changed
from tests.server.fakes import READY, EchoEngine
from tests.server.harness import GREEDY, Served, run_served, serving_in_thread, status_of

Code = grpc.StatusCode


def test_closing_a_stream_aborts_its_request(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        stream = served.client.generate("abc", GREEDY, request_id="gone")
        served.engine.allow(1)
        await anext(stream)
        await stream.aclose()
        await served.until(served.engine.wait_for_abort, "gone")
        assert served.frontend.num_open == 0
        served.engine.resume()
        assert (await served.client.generate_text("next", GREEDY)).text == "next"

    run_served(body, tokenizer)


def test_cancelling_a_queued_request_aborts_it(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        task = asyncio.ensure_future(served.client.generate_text("abc", GREEDY, request_id="queued"))
        await served.until(served.engine.wait_for_requests, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await served.until(served.engine.wait_for_abort, "queued")

    run_served(body, tokenizer)


def test_a_client_that_loses_its_connection_aborts_all_its_requests(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        other = AsyncClient(served.address)
        names = [f"r{number}" for number in range(5)]
        tasks = [asyncio.ensure_future(other.generate_text("abc", GREEDY, request_id=name)) for name in names]
        await served.until(served.engine.wait_for_requests, 5)
        await other.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        for name in names:
            await served.until(served.engine.wait_for_abort, name)

    run_served(body, tokenizer)


def test_cancelling_while_tokens_flow(tokenizer):
    """Wherever the cancellations strike, each request is either finished or aborted, and the server is empty after."""

    async def body(served: Served) -> None:
        tasks = [
            asyncio.ensure_future(served.client.generate_text("abcdefgh" * 4, GREEDY, request_id=f"r{number}"))
            for number in range(24)
        ]
        await served.until(served.engine.wait_for_requests, 8)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(not isinstance(result, BaseException) for result in results[1::2])
        for request in served.engine.requests:
            number = int(request.request_id[1:])
            if isinstance(results[number], asyncio.CancelledError):
                await served.until(served.engine.wait_until_gone, request.request_id)
        assert (await served.client.generate_text("after", GREEDY)).text == "after"
        assert served.frontend.num_open == 0

    run_served(body, tokenizer)


def test_the_deadline_of_the_call_reaches_the_engine(tokenizer):
    async def body(served: Served) -> None:
        before = time.time()
        await served.client.generate_text("a", GREEDY, timeout=1000.0)
        deadline = served.engine.requests[0].options.deadline
        assert deadline is not None
        assert before + 900 < deadline < time.time() + 1100  # gRPC rounds long timeouts up
        await served.client.generate_text("a", GREEDY, timeout=1000.0, deadline=before + 500)
        assert served.engine.requests[1].options.deadline == before + 500
        await served.client.generate_text("a", GREEDY, timeout=1000.0, deadline=before + 5000)
        assert served.engine.requests[2].options.deadline < before + 5000

    run_served(body, tokenizer)


def test_fault_16_a_deadline_in_the_past_is_refused_before_the_engine_hears_of_it(tokenizer):
    async def body(served: Served) -> None:
        code, details = await status_of(served.client.generate_text("a", GREEDY, deadline=time.time() - 1))
        assert code is Code.DEADLINE_EXCEEDED
        assert "deadline passed" in details
        assert served.engine.requests == []

    run_served(body, tokenizer)


@pytest.mark.parametrize("of_the_call", [True, False])
def test_a_deadline_that_passes_ends_and_aborts_the_request(tokenizer, of_the_call):
    async def body(served: Served) -> None:
        served.engine.pause()
        limit = {"timeout": 0.3} if of_the_call else {"deadline": time.time() + 0.3}
        code, _ = await status_of(served.client.generate_text("abc", GREEDY, request_id="late", **limit))
        assert code is Code.DEADLINE_EXCEEDED
        if served.engine.requests:  # a slow machine may need the 0.3 s to get there
            await served.until(served.engine.wait_for_abort, "late")

    run_served(body, tokenizer)


def test_a_slow_reader_gets_everything_and_holds_up_nobody(tokenizer):
    async def body(served: Served) -> None:
        slow = served.client._stub.Generate(generate_request("x" * 100, GREEDY, request_id="slow"))
        responses = aiter(slow)
        first = await anext(responses)
        answers = await asyncio.gather(*(served.client.generate_text(f"n{number}", GREEDY) for number in range(10)))
        assert [answer.text for answer in answers] == [f"n{number}" for number in range(10)]
        await served.until(served.engine.wait_until_gone, "slow")
        assert first.text + "".join([response.text async for response in responses]) == "x" * 100

    run_served(body, tokenizer)


def test_fault_18_a_reader_that_stops_reading_loses_its_request_and_nobody_else_does(tokenizer):
    """The connection buffers some of the answer, the server 500 tokens of it; long ids make the messages large."""

    async def body(served: Served) -> None:
        name = "slow".ljust(256, "-")
        endless = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=5_000_000)
        slow = served.client._stub.Generate(generate_request("abc", endless, request_id=name))
        responses = aiter(slow)
        served.engine.pause()
        served.engine.allow(1)
        await anext(responses)
        others = asyncio.gather(*(served.client.generate_text(f"n{number}", GREEDY) for number in range(10)))
        while name not in served.engine.aborted:
            served.engine.allow(100)
            await asyncio.sleep(0.001)
        served.engine.resume()  # for those that had no step in the meantime
        assert [answer.text for answer in await others] == [f"n{number}" for number in range(10)]
        assert served.frontend.num_open == 0
        assert (await served.client.generate_text("after", GREEDY)).text == "after"

        async def read_on() -> None:
            async for _ in responses:
                pass

        code, details = await status_of(read_on())
        assert code is Code.RESOURCE_EXHAUSTED
        assert "output tokens wait to be read; at most 500 (max_unread_tokens) may: read faster" in details

    ready = changed(READY, max_model_len=6_000_000, usable_pages=400_000)
    run_served(body, tokenizer, EchoEngine(ready), max_unread_tokens=500)


def test_the_blocking_client_aborts_too(tokenizer):
    with serving_in_thread(tokenizer) as served, Client(served.address) as client:
        served.engine.pause()
        stream = client.generate("abc", GREEDY, request_id="gone")
        served.engine.allow(1)
        assert next(stream).text == "a"
        stream.close()
        served.engine.wait_for_abort("gone")
        served.engine.resume()
        assert client.generate_text("next", GREEDY).text == "next"
