"""Answers probes: whether the process lives, and whether it takes requests.

Both follow the progress of steps: an engine whose step takes longer than step_timeout, or that has ended, has failed.
"""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from jaxserve.serving.served_model import ServedModel


def router(served: ServedModel) -> APIRouter:
    """Returns the routes of health. served: the model."""
    routes = APIRouter(include_in_schema=False)  # openapi.py has them

    @routes.api_route("/health", methods=["GET", "HEAD"])
    @routes.api_route("/health/ready", methods=["GET", "HEAD"])
    async def ready() -> JSONResponse:
        """Answers 200 while requests are taken, and else 503 with the reason."""
        return _answer(served, served.is_ready)

    @routes.api_route("/health/live", methods=["GET", "HEAD"])
    async def live() -> JSONResponse:
        """Answers 200 unless the engine has failed, after which the process ends."""
        return _answer(served, served.state != "failed")

    return routes


def _answer(served: ServedModel, good: bool) -> JSONResponse:
    return JSONResponse({"status": served.state}, 200 if good else 503)
