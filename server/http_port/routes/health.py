"""Answers probes: whether the process lives, and whether it takes requests."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from jaxserve.serving.served_model import ServedModel


def router(served: ServedModel) -> APIRouter:
    """Returns the routes of health. served: the model."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> JSONResponse:
        """Answers 200 while requests are taken, and else 503."""
        return JSONResponse({"status": "ready" if served.is_ready else "not ready"}, 200 if served.is_ready else 503)

    return routes
