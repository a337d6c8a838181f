"""Spans of requests: by OpenTelemetry's own SDK, with the trace that a client began."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from jaxserve.config import gin_config
from jaxserve.config.tracing_config import TracingConfig
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving import tracing
from jaxserve.serving.clients.grpc_client import generate_request
from jaxserve.serving.http_port.http_server import HttpServer
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2_grpc as pb_grpc
from jaxserve.telemetry import request_trace
from jaxserve.telemetry.otel_spans import RequestSpans
from jaxserve.telemetry.request_meter import RequestMeter, RequestRecord
from tests.server.fakes import save_tokenizer
from tests.server.harness import Served, run_served, status_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = (("traceparent", f"00-{TRACE}-{SPAN}-01"), ("tracestate", "vendor=1"))
NOT_SAMPLED = (("traceparent", f"00-{TRACE}-{SPAN}-00"),)


def traced(metrics: RequestMeter, config: TracingConfig = TracingConfig()) -> Callable[[], Sequence[ReadableSpan]]:
    """Traces requests in memory; returns what gives the spans."""
    exporter = InMemorySpanExporter()
    metrics.on_finished = RequestSpans(config, "echo", "1.0", SimpleSpanProcessor(exporter))
    return exporter.get_finished_spans


async def generate(served: Served, prompt: str, metadata: Sequence[tuple[str, str]], **params: Any) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub: Any = pb_grpc.JaxServeStub(channel)
        async for _ in stub.Generate(
            generate_request(prompt, SamplingParams(temperature=0.0, **params)), metadata=metadata
        ):
            pass


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    directory = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (directory / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    return Tokenizer(directory)


def root_of(spans: Sequence[ReadableSpan]) -> ReadableSpan:
    (root,) = [span for span in spans if span.kind is SpanKind.SERVER]
    return root


def test_a_grpc_request_continues_its_clients_trace(tokenizer):
    async def body(served: Served) -> None:
        spans = traced(served.model.metrics)
        await generate(served, "secret", SAMPLED, max_tokens=3)
        root = root_of(spans())
        assert root.name == "text_completion echo"
        assert root.context is not None
        assert root.parent is not None
        assert f"{root.context.trace_id:032x}" == TRACE
        assert f"{root.parent.span_id:016x}" == SPAN
        assert root.context.trace_state.get("vendor") == "1"
        attributes = dict(root.attributes or {})
        expected = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": "echo",
            "gen_ai.response.model": "echo",
            "gen_ai.request.max_tokens": 3,
            "gen_ai.usage.input_tokens": 7,  # <bos> and six bytes
            "gen_ai.usage.output_tokens": 3,
            "gen_ai.response.finish_reasons": ("length",),
        }
        assert {name: attributes[name] for name in expected} == expected
        assert attributes["gen_ai.response.id"] == served.engine.requests[0].request_id
        assert root.status.status_code is StatusCode.UNSET
        assert root.resource.attributes["service.name"] == "jaxserve"
        assert "secret" not in "".join(span.to_json() for span in spans())
        assert "sec" not in str(attributes)

    run_served(body, tokenizer)


@pytest.mark.parametrize(
    ("url", "prompt", "operation"),
    [
        ("/v1/completions", {"prompt": "a"}, "text_completion"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "chat"),
    ],
)
def test_an_http_request_does_too(chat_tokenizer, url, prompt, operation):
    async def body(served: Served) -> None:
        spans = traced(served.model.metrics)
        headers = {"Traceparent": SAMPLED[0][1], "authorization": "Bearer secret"}
        http = HttpServer("127.0.0.1", 0, served.model)
        await http.start()
        async with httpx.AsyncClient(base_url=f"http://{http.address}", headers=headers, timeout=60) as client:
            answer = await client.post(url, json=prompt | {"model": "echo", "max_tokens": 2})
            assert answer.status_code == 200, answer.text
            wrong = await client.post(url, json=prompt | {"max_tokenz": 2})
            assert wrong.status_code == 400
            foreign = await client.post(url, json=prompt | {"model": "other"})
            assert foreign.status_code == 404
        await http.stop()
        root = root_of([span for span in spans() if not (span.attributes or {}).get("error.type")])
        assert root.name == f"{operation} echo"
        assert root.context is not None
        assert f"{root.context.trace_id:032x}" == TRACE
        assert (root.attributes or {})["gen_ai.response.id"] == answer.json()["id"].rpartition("-")[2]
        assert "secret" not in root.to_json()
        assert served.model.metrics.rejected == {"invalid": 1, "other": 1}

    run_served(body, chat_tokenizer)


def test_who_brings_no_trace_begins_one_and_who_is_not_sampled_has_none(tokenizer):
    async def body(served: Served) -> None:
        spans = traced(served.model.metrics)
        await generate(served, "a", NOT_SAMPLED)
        await generate(served, "a", (("traceparent", "nonsense"),))
        assert root_of(spans()).parent is None
        never = traced(served.model.metrics, TracingConfig(sample_ratio=0.0))
        await generate(served, "a", ())
        assert not never()
        await generate(served, "a", SAMPLED)
        assert root_of(never()).parent is not None

    run_served(body, tokenizer)


def test_a_refused_request_is_an_error(tokenizer):
    async def body(served: Served) -> None:
        spans = traced(served.model.metrics)
        stub_call = generate(served, "a" * 600, SAMPLED)
        code, _ = await status_of(stub_call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        root = root_of(spans())
        assert root.status.status_code is StatusCode.ERROR
        assert (root.attributes or {})["error.type"] == "ValueError"

    run_served(body, tokenizer)


def finished(**changes: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "request_id": "r", "finish_reason": "stop", "error_type": "", "prompt_tokens": 5, "output_tokens": 4,
        "cached_tokens": 2, "max_tokens": 9, "ended": 1000.0, "e2e_seconds": 2.0, "ttft_seconds": 0.75,
        "queue_seconds": 0.25, "prefill_seconds": 0.5, "decode_seconds": 1.0,
    }  # fmt: skip
    return RequestRecord(**{**values, **changes})


def test_phases_are_children_with_the_times_that_were_measured():
    metrics = RequestMeter()
    spans = traced(metrics)
    metrics.ended(finished())
    root = root_of(spans())
    assert root.context is not None
    seconds = {span.name: (span.start_time / 1e9 - 998, span.end_time / 1e9 - 998) for span in spans()}
    assert seconds.pop("text_completion echo") == pytest.approx((0.0, 2.0), abs=1e-6)
    for name, expected in {"queue": (0.0, 0.25), "prefill": (0.25, 0.75), "decode": (0.75, 1.75)}.items():
        assert seconds.pop(name) == pytest.approx(expected, abs=1e-6)
    assert not seconds
    for child in spans():
        assert child is root or (child.parent is not None and child.parent.span_id == root.context.span_id)
    attributes = dict(root.attributes or {})
    assert attributes["gen_ai.latency.time_to_first_token"] == 0.75
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 2


def test_a_request_that_was_aborted_in_the_queue_has_no_other_phase():
    metrics = RequestMeter()
    spans = traced(metrics)
    nothing = dict.fromkeys(("ttft_seconds", "queue_seconds", "prefill_seconds", "decode_seconds"))
    metrics.ended(finished(finish_reason="abort", output_tokens=0, **nothing))
    assert [span.name for span in spans()] == ["queue", "text_completion echo"]


def test_spans_reach_a_collector():
    received: list[Any] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            received.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        spans = tracing.start_tracing(TracingConfig(otlp_endpoint=f"http://127.0.0.1:{port}"), "echo")
        assert spans is not None
        spans(finished())
        spans.close()
    finally:
        server.stop(0)
    names = [span.name for one in received for r in one.resource_spans for s in r.scope_spans for span in s.spans]
    assert sorted(names) == ["decode", "prefill", "queue", "text_completion echo"]


def test_off_loads_nothing(tokenizer):
    assert tracing.start_tracing(TracingConfig(), "echo") is None
    # The API alone is loaded: by fastapi, where it is installed.
    unwanted = "{'opentelemetry.sdk', 'jaxserve.telemetry.otel_spans'}"
    program = f"import jaxserve.serving.server_run, sys; sys.exit(bool({unwanted} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

    async def body(served: Served) -> None:
        assert served.model.trace(SAMPLED, "chat") is None

    run_served(body, tokenizer)


def test_without_the_extra_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jaxserve.telemetry.otel_spans", None)
    with pytest.raises(ValueError, match=r"otlp_endpoint is 'http://c:1', .*pip install 'jaxserve\[otel\]'"):
        tracing.start_tracing(TracingConfig(otlp_endpoint="http://c:1"), "echo")


def test_settings():
    config = gin_config.load("tiny.gin", ["TracingConfig.otlp_endpoint='http://localhost:4317'"])[0].tracing
    assert config.otlp_endpoint == "http://localhost:4317"
    for change, error in (
        ({"otlp_endpoint": "localhost:4317"}, "otlp_endpoint is 'localhost:4317'; it must be a URL"),
        ({"sample_ratio": 1.5}, "sample_ratio is 1.5; it must be finite and from 0 to 1"),
        ({"service_name": ""}, "service_name is ''; it must be a text"),
    ):
        with pytest.raises(ValueError, match=error):
            TracingConfig(**change)


def test_large_or_foreign_headers_are_not_kept():
    found = request_trace.request_trace([("tracestate", "x" * 2000), ("cookie", "c"), ("traceparent", "t")], "chat")
    assert found.headers == {"traceparent": "t"}


def test_an_error_of_tracing_stops_nothing(caplog):
    metrics = RequestMeter()
    metrics.on_finished = lambda request: 1 / 0
    metrics.ended(finished())
    assert "request 'r' cannot be traced" in caplog.text
