"""Routes completions and chat completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.routing import Route

from jaxserve.config.http_config import HttpConfig
from jaxserve.frontend.openai import URLS
from jaxserve.serving.http_port.generation import Generation
from jaxserve.serving.served_model import ServedModel


def router(served: ServedModel, config: HttpConfig, max_body_bytes: int) -> APIRouter:
    """Returns the routes. Arguments are as for `Generation`."""
    # ASGI applications of their own: nothing stands between an event and the connection.
    return APIRouter(
        routes=[Route(url, Generation(url, served, config, max_body_bytes), methods=["POST"], name=url) for url in URLS]
    )
