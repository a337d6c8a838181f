"""Makes OpenTelemetry spans of requests that have ended; needs the extra `otel`, and is imported only for tracing.

A request is one span of kind SERVER, a child of the span that its client named by traceparent, and has a span each for
its queue time, prefill and decode. Attributes follow the semantic conventions for generative AI (gen_ai.*), with vLLM's
gen_ai.latency.* beside them. Prompts and outputs are never part of a span.

All is made when the request ends, with the times that were measured, so that a request under way costs nothing.
"""

from __future__ import annotations

from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jaxserve.config.tracing_config import TracingConfig
from jaxserve.request import FinishReason
from jaxserve.telemetry.request_meter import RequestRecord

_FLUSH_MILLISECONDS = 2000
_DEFAULT_OPERATION = "text_completion"


def otlp_processor(config: TracingConfig) -> SpanProcessor:
    """Returns what sends spans to the configured collector, in a thread of its own."""
    endpoint = config.otlp_endpoint
    assert endpoint is not None
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https:")))


class RequestSpans:
    """Makes the spans of one served model; call it with each request that has ended.

    Args:
        config: where spans go.
        model: name of the model.
        version: of the service.
        processor: takes the spans; None sends them to config.otlp_endpoint.
    """

    def __init__(self, config: TracingConfig, model: str, version: str, processor: SpanProcessor | None = None):
        self._model = model
        # ended here and not by atexit, which the server does not run
        self._provider = TracerProvider(
            resource=Resource.create({SERVICE_NAME: config.service_name, SERVICE_VERSION: version}),
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(otlp_processor(config) if processor is None else processor)
        self._tracer = self._provider.get_tracer("jaxserve", version)
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, request: RequestRecord) -> None:
        """Makes the spans of one request."""
        trace = request.trace
        # An empty context and not the current one: that of the task which happens to deliver the last token.
        parent = Context() if trace is None else self._propagator.extract(dict(trace.headers), Context())
        operation = _DEFAULT_OPERATION if trace is None else trace.operation
        begin = request.ended - request.e2e_seconds
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=parent,
            kind=SpanKind.SERVER,
            attributes=self._attributes(request, operation),
            start_time=_nanoseconds(begin),
        )
        if span.is_recording():
            if request.error_type:
                span.set_status(Status(StatusCode.ERROR))
            self._phases(span, request, begin)
        span.end(_nanoseconds(request.ended))

    def close(self) -> None:
        """Sends what waits to be sent, for two seconds at most."""
        self._provider.force_flush(_FLUSH_MILLISECONDS)

    def _attributes(self, request: RequestRecord, operation: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "jaxserve",
            "gen_ai.request.model": self._model,
            "gen_ai.latency.e2e": request.e2e_seconds,
        }
        optional = {
            "gen_ai.response.id": request.request_id,
            "error.type": request.error_type,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.latency.time_in_queue": request.queue_seconds,
            "gen_ai.latency.time_to_first_token": request.ttft_seconds,
            "gen_ai.latency.time_in_model_prefill": request.prefill_seconds,
            "gen_ai.latency.time_in_model_decode": request.decode_seconds,
        }
        found |= {name: value for name, value in optional.items() if value not in (None, "")}
        if request.finish_reason:
            found |= {
                "gen_ai.response.model": self._model,
                "gen_ai.response.finish_reasons": (request.finish_reason,),
                "gen_ai.usage.input_tokens": request.prompt_tokens,
                "gen_ai.usage.output_tokens": request.output_tokens,
                "gen_ai.usage.cache_read.input_tokens": request.cached_tokens,
            }
        return found

    def _phases(self, span: Any, request: RequestRecord, begin: float) -> None:
        """Makes the children. The phases are placed around the time at which the first token was there."""
        context = set_span_in_context(span, Context())
        if request.queue_seconds is None or request.prefill_seconds is None or request.ttft_seconds is None:
            if request.finish_reason == FinishReason.ABORT.value or not request.finish_reason:
                self._phase("queue", context, begin, request.ended)
            return
        first = begin + request.ttft_seconds
        prefill = max(begin, first - request.prefill_seconds)
        self._phase("queue", context, max(begin, prefill - request.queue_seconds), prefill)
        self._phase("prefill", context, prefill, first)
        self._phase("decode", context, first, min(request.ended, first + (request.decode_seconds or 0.0)))

    def _phase(self, name: str, context: Context, begin: float, end: float) -> None:
        self._tracer.start_span(name, context=context, start_time=_nanoseconds(begin)).end(_nanoseconds(end))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def start(config: TracingConfig, model: str, version: str) -> RequestSpans:
    """Returns the spans of a server, which go to config.otlp_endpoint."""
    return RequestSpans(config, model, version)
