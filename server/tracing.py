"""Switches tracing of requests on, where it is configured."""

from __future__ import annotations

import importlib
from typing import Protocol

import jaxserve
from jaxserve.config.tracing_config import TracingConfig
from jaxserve.telemetry.request_meter import RequestRecord


class Tracing(Protocol):
    """Takes each request that has ended."""

    def __call__(self, request: RequestRecord) -> None: ...

    def close(self) -> None:
        """Sends what waits to be sent; takes a few seconds at most."""
        ...


def start_tracing(config: TracingConfig, model: str) -> Tracing | None:
    """Returns what requests are traced by; None where nothing is configured.

    Raises ValueError where OpenTelemetry is not installed.
    """
    if config.otlp_endpoint is None:
        return None
    try:  # imported late: it takes a quarter of a second, and is an optional extra
        spans = importlib.import_module("jaxserve.telemetry.otel_spans")
    except ImportError as error:
        raise ValueError(
            f"otlp_endpoint is {config.otlp_endpoint!r}, but OpenTelemetry cannot be imported ({error}): "
            "pip install 'jaxserve[otel]', or set TracingConfig.otlp_endpoint to None"
        ) from error
    return spans.start(config, model, jaxserve.__version__)
