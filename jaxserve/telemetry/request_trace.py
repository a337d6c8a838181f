"""Names the trace that a request belongs to: what its client sends by W3C's headers traceparent and tracestate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

TRACE_HEADERS = ("traceparent", "tracestate")
_MAX_LENGTH = 1024
"""Characters of a header beyond which it is ignored: W3C asks for 512 of a tracestate at least."""


@dataclasses.dataclass(frozen=True)
class RequestTrace:
    """Holds a request's place in a trace.

    Attributes:
        headers: those of TRACE_HEADERS that came with the request.
        operation: what was asked for, in OpenTelemetry's words: "chat", "text_completion" or "embeddings".
    """

    headers: Mapping[str, str]
    operation: str


def request_trace(pairs: Iterable[tuple[str, Any]], operation: str) -> RequestTrace:
    """Returns the trace of a request. pairs: its headers, or its gRPC metadata; names are in lower case."""
    found = {name: value for name, value in pairs if name in TRACE_HEADERS and isinstance(value, str)}
    return RequestTrace({name: value for name, value in found.items() if len(value) <= _MAX_LENGTH}, operation)
