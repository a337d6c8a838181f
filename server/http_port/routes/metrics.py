"""Answers Prometheus, in its text format or OpenMetrics, whichever it asks for."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client.exposition import choose_encoder

from jaxserve.serving import prometheus_collector
from jaxserve.serving.served_model import ServedModel


def router(served: ServedModel) -> APIRouter:
    """Returns the route of the metrics. served: the model."""
    routes = APIRouter()
    registry = prometheus_collector.registry(served)

    @routes.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """Answers with all metrics, see docs/metrics.md."""
        served.callers.identify(request.headers.get("authorization"))
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    return routes
