"""Takes captures of what the engine does. The guard of the port asks for an administrator's key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from jaxserve.serving import engine_captures as captures
from jaxserve.serving.http_port.errors import error_answer
from jaxserve.serving.served_model import ServedModel

_TYPES = {"json": "application/json", "zip": "application/zip"}


def router(served: ServedModel) -> APIRouter:
    """Returns the routes of captures. served: the model."""
    routes = APIRouter(include_in_schema=False)  # a call takes as long as it is told to

    @routes.post("/debug/timeline")
    async def timeline(request: Request) -> Response:
        """Answers with the steps and requests of the next seconds, as JSON that Perfetto opens."""
        return await _captured(request, served, captures.timeline, captures.MOST_SECONDS, "timeline.json")

    @routes.post("/debug/profile")
    async def profile(request: Request) -> Response:
        """Answers with what jax's profiler saw in the next seconds, as a zip of its directory."""
        return await _captured(request, served, captures.profile, captures.MOST_PROFILE_SECONDS, "profile.zip")

    return routes


async def _captured(
    request: Request,
    served: ServedModel,
    capture: Callable[[ServedModel, float], Awaitable[bytes]],
    most_seconds: float,
    name: str,
) -> Response:
    try:
        seconds = captures.seconds_of(request.query_params.multi_items(), most_seconds)
        data = await capture(served, seconds)
    except Exception as error:  # in the shape of all others, and nothing of its text where it is unforeseen
        answer = error_answer(error)
        return Response(answer.body, answer.status, dict(answer.headers), "application/json")
    headers = {"content-disposition": f'attachment; filename="{name}"', "cache-control": "no-store"}
    return Response(data, headers=headers, media_type=_TYPES[name.rpartition(".")[2]])
