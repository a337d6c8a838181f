"""Configures tracing of requests with OpenTelemetry. Standard library only."""

from __future__ import annotations

import dataclasses
import urllib.parse

from jaxserve.config.checks import between


@dataclasses.dataclass(frozen=True)
class TracingConfig:
    """Configures where spans of requests go.

    otlp_endpoint: URL of a collector that speaks OTLP over gRPC, as http://localhost:4317; https encrypts. None traces
    nothing and loads nothing; else the extra `otel` must be installed.
    service_name: the name of this service in traces.
    sample_ratio: share of the requests without a trace of their own that are traced; one that comes with a trace is
    traced if its client traces it.
    """

    otlp_endpoint: str | None = None
    service_name: str = "jaxserve"
    sample_ratio: float = 1.0

    def __post_init__(self) -> None:
        between("sample_ratio", self.sample_ratio, 0.0, 1.0)
        if not isinstance(self.service_name, str) or not self.service_name:
            raise ValueError(f"service_name is {self.service_name!r}; it must be a text that is not empty")
        if self.otlp_endpoint is not None:
            url = urllib.parse.urlsplit(str(self.otlp_endpoint))
            if url.scheme not in ("http", "https") or not url.hostname:
                raise ValueError(
                    f"otlp_endpoint is {self.otlp_endpoint!r}; it must be a URL such as http://localhost:4317, or None"
                )
