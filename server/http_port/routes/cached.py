"""Routes calls about the prefix cache: its warm-up, and its flush, for which the guard asks for an admin's key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.routing import Route

from jaxserve.config.http_config import HttpConfig
from jaxserve.config.shown import shown
from jaxserve.frontend.openai_warm_up import WARM_UP_URL
from jaxserve.serving.http_port.guard import FLUSH_URL
from jaxserve.serving.http_port.warm_up import WarmUps
from jaxserve.serving.served_model import ServedModel


def router(served: ServedModel, config: HttpConfig, max_body_bytes: int) -> APIRouter:
    """Returns the routes. Arguments are as for `WarmUps`."""
    warm_up = Route(WARM_UP_URL, WarmUps(served, config, max_body_bytes), methods=["POST"], name=WARM_UP_URL)
    routes = APIRouter(routes=[warm_up], include_in_schema=False)  # openapi.py has them

    @routes.post(FLUSH_URL)
    async def reset_prefix_cache(request: Request) -> dict[str, Any]:
        """Forgets what the prefix cache holds; running requests go on."""
        if request.query_params:
            raise ValueError(f"{shown(next(iter(request.query_params)))} is an unknown parameter of the query")
        return {"freed_pages": await served.started().flush_prefix_cache()}

    return routes
