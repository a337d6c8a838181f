"""Answers Prometheus, in its text format or OpenMetrics, whichever it asks for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import exposition
from prometheus_client.openmetrics import exposition as openmetrics

from jaxserve.serving import prometheus_collector
from jaxserve.serving.served_model import ServedModel

_AS_THEY_ARE = "allow-utf-8"
"""How names are escaped. Otherwise prometheus_client 0.26 replaces the colon of a name, in samples alone."""

_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def router(served: ServedModel) -> APIRouter:
    """Returns the route of the metrics. served: the model."""
    routes = APIRouter()
    formats: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}
    }
    registry = prometheus_collector.registry(served)

    @routes.get("/metrics", response_class=Response, responses=formats)
    async def metrics(request: Request) -> Response:
        """Answers with all metrics, see docs/metrics.md."""
        if "application/openmetrics-text" in request.headers.get("accept", ""):
            return _answer(openmetrics.generate_latest(registry, escaping=_AS_THEY_ARE), _OPENMETRICS)
        return _answer(exposition.generate_latest(registry, escaping=_AS_THEY_ARE), _TEXT)

    return routes


def _answer(data: bytes, content_type: str) -> Response:
    return Response(data, headers={"content-type": content_type})
