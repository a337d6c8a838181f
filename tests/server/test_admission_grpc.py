"""What clients of the gRPC port see of admission: metadata, refusals, deadlines, and its counts."""

from __future__ import annotations

import asyncio

import grpc

from jaxserve.config.queue_limits import QueueConfig, TenantConfig
from jaxserve.frontend.admission import Admission, Engine
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import generate_request
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from jaxserve.serving.refusal_times import RefusalTimes
from tests.server.fakes import READY
from tests.server.harness import GREEDY, Served, run_served, status_of

Code = grpc.StatusCode


def admission(**queue) -> Admission:
    return Admission(QueueConfig(**queue), Engine(READY.max_num_seqs, READY.max_num_seqs + READY.max_num_waiting))


def test_metadata_says_who_a_request_is_for(tokenizer):
    async def body(served: Served) -> None:
        stub = served.client._stub
        metadata = (("x-tenant", "team"), ("x-priority", "4"), ("x-request-timeout", "100"))
        async for _ in stub.Generate(generate_request("a", GREEDY), metadata=metadata):
            pass
        async for _ in stub.Generate(generate_request("a", GREEDY, tenant="own", priority=9), metadata=metadata):
            pass
        first, second = (request.options for request in served.engine.requests)
        assert (first.tenant, first.priority) == ("team", 4)
        assert (second.tenant, second.priority) == ("own", 9)
        assert first.deadline is not None
        call = stub.Generate(generate_request("a", GREEDY), metadata=(("x-priority", "soon"),))
        code, details = await status_of(call.read())
        assert code is Code.INVALID_ARGUMENT
        assert details == "x-priority is 'soon'; it must be a whole number, higher for what is more urgent"

    run_served(body, tokenizer)


def test_fault_15_a_tenant_at_its_limit_is_told_when_to_come_back_and_others_are_served(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        waiting = asyncio.ensure_future(served.client.generate_text("a", short, tenant="a"))
        await served.until(served.engine.wait_for_requests, 1)
        call = served.client._stub.Generate(generate_request("b", GREEDY, tenant="a"))
        code, details = await status_of(call.read())
        assert code is Code.RESOURCE_EXHAUSTED
        assert details == (
            "tenant 'a' has 1 unfinished requests; at most 1 (max_requests) are allowed: wait for one to end"
        )
        assert int(dict(await call.trailing_metadata())["grpc-retry-pushback-ms"]) == 1000  # no rate is known
        served.engine.resume()
        assert (await served.client.generate_text("c", short, tenant="other")).text == "c"
        assert (await waiting).text == "a"
        found = (await served.client.server_info()).admission
        assert dict(found.rejections) == {"tenant_requests": 1}
        assert 0 < found.refusal_seconds_p50 == found.refusal_seconds_p99
        assert (found.num_waiting, found.waiting_tokens, found.max_waiting_tokens) == (0, 0, 1000)
        assert len(served.engine.requests) == 2

    short = SamplingParams(temperature=0.0, max_tokens=8)  # both may wait at one time
    tenants = {"a": TenantConfig(max_requests=1)}
    run_served(body, tokenizer, admission=admission(tenants=tenants, max_waiting_tokens=1000))


def test_a_refusal_comes_before_the_prompt_is_tokenized(tokenizer, monkeypatch):
    async def body(served: Served) -> None:
        served.engine.pause()
        first = asyncio.ensure_future(served.client.generate_text("a", GREEDY))
        await served.until(served.engine.wait_for_requests, 1)
        monkeypatch.setattr(type(tokenizer), "encode_steps", lambda *_: 1 / 0)
        code, details = await status_of(served.client.generate_text("abc", GREEDY))
        assert code is Code.RESOURCE_EXHAUSTED
        assert "max_waiting_tokens" in details
        served.engine.resume()
        await first

    run_served(body, tokenizer, admission=admission(max_waiting_tokens=1))


def test_fault_16_a_deadline_has_a_finish_reason_and_a_status(tokenizer):
    """Also one that the engine finds out of reach; what came until then is not lost."""

    async def body(served: Served) -> None:
        served.engine.pause()
        call = served.client._stub.Generate(generate_request("abc", GREEDY, request_id="r"))
        first = asyncio.ensure_future(call.read())
        await served.until(served.engine.wait_for_requests, 1)
        served.engine.allow(1)
        assert (await first).text == "a"
        served.engine.finish_request("r", FinishReason.DEADLINE)
        last = await call.read()
        assert last.finish_reason == pb.FINISH_REASON_DEADLINE
        assert (last.usage.prompt_tokens, last.usage.output_tokens) == (4, 1)
        assert (await status_of(call.read()))[0] is Code.DEADLINE_EXCEEDED

    run_served(body, tokenizer)


def test_quantiles_of_refusals_are_upper_bounds_within_a_quarter():
    times = RefusalTimes()
    assert times.quantile(0.99) == 0.0
    values = [0.001 * number for number in range(1, 1001)]
    for value in values:
        times.observe(value)
    for share in (0.01, 0.5, 0.99, 1.0):
        exact = values[round(share * 1000) - 1]
        assert exact <= times.quantile(share) <= 1.25 * exact
    assert (times.count, times.total_seconds) == (1000, sum(values))
    times.observe(1e6)
    assert times.quantile(1.0) == 1e6
