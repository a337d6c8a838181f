"""Takes captures of what the engine does, for callers with an administrator's key."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from jaxserve.serving import engine_captures
from jaxserve.serving.problem import ForbiddenError
from jaxserve.serving.served_model import ServedModel

Seconds = Annotated[
    float, Query(ge=engine_captures.LEAST_SECONDS, le=engine_captures.MOST_SECONDS, description="How long to capture.")
]


def router(served: ServedModel) -> APIRouter:
    """Returns the routes of captures. served: the model."""
    routes = APIRouter()

    def check_admin(request: Request) -> None:
        if not served.callers.identify(request.headers.get("authorization")).is_admin:
            raise ForbiddenError("captures show every request's id and length; they need an administrator's key")

    @routes.post("/debug/timeline", response_class=Response)
    async def timeline(request: Request, seconds: Seconds = 5.0) -> Response:
        """Answers with the steps and requests of the next seconds, as JSON that Perfetto opens."""
        check_admin(request)
        data = await engine_captures.timeline(served, seconds)
        return Response(data, media_type="application/json", headers=_as_file("timeline.json"))

    @routes.post("/debug/profile", response_class=Response)
    async def profile(request: Request, seconds: Seconds = 2.0) -> Response:
        """Answers with what jax's profiler saw in the next seconds, as a zip of its directory."""
        check_admin(request)
        data = await engine_captures.profile(served, seconds)
        return Response(data, media_type="application/zip", headers=_as_file("profile.zip"))

    return routes


def _as_file(name: str) -> dict[str, str]:
    return {"content-disposition": f'attachment; filename="{name}"', "cache-control": "no-store"}
