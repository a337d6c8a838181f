"""Faults in the engine, on a running server with a real model: who is told, and that nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest

from tests.faults.fault_server import GREEDY, LONG, PROMPTS, RealServed, poisoned, reaches, run_model
from tests.server.harness import health_of, status_of

Code = grpc.StatusCode
FILLERS = 8
"""As many as may run at once."""


@pytest.mark.parametrize("state", ["queued", "prefill", "decode", "finishing"])
def test_fault_17_a_client_that_goes_frees_its_pages_within_one_step(runner, tokenizer, state):
    """The step that is being dispatched when it goes, and one more at most."""

    async def body(served: RealServed) -> None:
        served.runner.hold()
        others = []
        if state == "queued":
            others = [
                asyncio.ensure_future(status_of(served.client.generate_text("abc", LONG))) for _ in range(FILLERS)
            ]
            await reaches(lambda: served.frontend.num_open == FILLERS)
        prompt = "a prompt of several steps" if state == "prefill" else "abc"
        stream = served.client.generate(prompt, LONG, request_id="gone")
        first = asyncio.ensure_future(anext(stream))
        if state == "queued":
            served.runner.allow(3)
            await reaches(lambda: len(served.runner.plans) == 4)
            assert not any("gone" in plan.request_ids for plan in served.runner.plans)
        elif state == "prefill":
            served.runner.allow(1)
            await reaches(lambda: len(served.runner.plans) == 2)
            assert served.pages_used > 0
        else:
            tokens = 3 if state == "decode" else LONG.max_tokens
            served.runner.allow(2)  # ids are read when the next step has been dispatched
            received = len((await first).token_ids)
            while received < tokens - 1:
                served.runner.allow(1)
                received += len((await anext(stream)).token_ids)
        for filler in others:
            filler.cancel()
        if not first.done():
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        await stream.aclose()
        await asyncio.gather(*others, return_exceptions=True)
        await reaches(lambda: served.frontend.num_open == 0)
        served.runner.allow(2)
        await reaches(lambda: served.pages_used == 0)

    run_model(body, tokenizer, runner)


def test_fault_21_logits_that_are_not_finite_end_their_request_alone(runner, tokenizer, undisturbed):
    async def body(served: RealServed) -> None:
        *answers, error = await served.answers((*PROMPTS, "NaN: ~"))
        assert [one.token_ids for one in answers] == [one.token_ids for one in undisturbed]
        assert isinstance(error, grpc.aio.AioRpcError)
        assert (error.code(), error.details()) == (Code.INTERNAL, "the model's logits are not finite")

    with poisoned(runner, tokenizer.encode("~")[-1]):
        run_model(body, tokenizer, runner)


@pytest.mark.parametrize("after", [0, 6, 15])
@pytest.mark.parametrize("point", ["pack", "enqueue", "execute", "collect"])
def test_fault_22_a_step_that_fails_is_recovered_from_and_changes_nobodys_tokens(
    runner, tokenizer, undisturbed, point, after
):
    async def body(served: RealServed) -> None:
        answers = await served.answers()
        assert [one.token_ids for one in answers] == [one.token_ids for one in undisturbed]
        assert (served.engine.core.stats().num_preemptions > 0) == (point in ("execute", "collect"))

    run_model(body, tokenizer, runner, f"{point}=raise,times=1,after={after}")


@pytest.mark.parametrize("point", ["allocate", "pack", "enqueue", "detokenize", "send"])
def test_fault_22_what_fails_for_one_request_ends_that_request_alone(runner, tokenizer, undisturbed, point):
    async def body(served: RealServed) -> None:
        answers = await served.answers()
        failed = answers.pop(1)
        assert isinstance(failed, grpc.aio.AioRpcError)
        assert failed.code() is Code.INTERNAL
        expected = [one.token_ids for number, one in enumerate(undisturbed) if number != 1]
        assert [one.token_ids for one in answers] == expected

    run_model(body, tokenizer, runner, f"{point}=raise,request=r1,after=1")


@pytest.mark.parametrize("point", ["execute", "collect"])
def test_fault_22_a_second_fault_ends_the_engine_and_every_stream(runner, tokenizer, point):
    """The exit code that follows is test_fault_22's in test_server_process.py."""

    async def body(served: RealServed) -> None:
        for answer in await served.answers():
            assert isinstance(answer, grpc.aio.AioRpcError)
            assert answer.code() is Code.UNAVAILABLE
            assert "s after another: InjectedFaultError" in (answer.details() or "")
        assert served.frontend.failure
        assert not served.model.is_ready
        assert (await status_of(served.client.generate_text("new", GREEDY)))[0] is Code.UNAVAILABLE

    run_model(body, tokenizer, runner, f"{point}=raise,after=4", survives=False)


def test_fault_23_a_step_that_hangs_ends_every_stream(runner, tokenizer):
    """That the server then ends is test_fault_23's in test_server_process.py."""

    async def body(served: RealServed) -> None:
        served.runner.hold()
        served.runner.allow(3)
        for answer in await served.answers():
            assert isinstance(answer, grpc.aio.AioRpcError)
            assert answer.code() is Code.UNAVAILABLE
            assert "a step has not ended for" in (answer.details() or "")
        assert not served.model.is_ready
        with contextlib.suppress(grpc.aio.AioRpcError):  # it answers, whatever it says
            await health_of(served.server.address)
            await served.client.abort("r0")

    run_model(body, tokenizer, runner, survives=False, step_timeout=0.5)
