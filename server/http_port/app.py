"""Puts the routes of the HTTP port together; each of `routes/` adds its own."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

import jaxserve
from jaxserve.config.http_config import HttpConfig
from jaxserve.serving.http_port.errors import HttpError, error_answer
from jaxserve.serving.http_port.openapi import document
from jaxserve.serving.http_port.routes import (
    cached,
    debug,
    embed,
    generate,
    health,
    live,
    metrics,
    models,
    page,
    tokens,
)
from jaxserve.serving.served_model import ServedModel

MAX_BODY_BYTES = 4 * 1024 * 1024


def make_app(served: ServedModel, config: HttpConfig = HttpConfig(), max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """Returns the application.

    Args:
        served: the model; its state decides whether requests are taken.
        config: of the port.
        max_body_bytes: a larger body is refused.
    """
    # No page of documentation: those of FastAPI load scripts from elsewhere.
    app = FastAPI(title="jaxserve", version=jaxserve.__version__, docs_url=None, redoc_url=None)
    for router in (
        generate.router(served, config, max_body_bytes),
        embed.router(served, config, max_body_bytes),
        cached.router(served, config, max_body_bytes),
        models.router(served),
        tokens.router(served, max_body_bytes),
        health.router(served),
        metrics.router(served),
        debug.router(served),
        live.router(served),
        page.router(),
    ):
        app.include_router(router)
    app.add_exception_handler(HTTPException, _http_error)
    # Starlette raises again what only the last of these handles: a bug, whose traceback the log then has.
    for kind in (HttpError, ValueError, LookupError, RuntimeError, Exception):
        app.add_exception_handler(kind, _error)
    of_routes = app.openapi
    app.openapi = lambda: document(of_routes(), served, config)
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """Answers for a path or a method that does not exist, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    message = {
        404: f"path {path!r} is unknown; GET /openapi.json lists what there is",
        405: f"{method} is not allowed for {path!r}; allowed is {(error.headers or {}).get('Allow', 'another method')}",
    }.get(error.status_code, str(error.detail))
    return _answer(HttpError(error.status_code, message, error.headers))


async def _error(request: Request, error: Exception) -> Response:
    return _answer(error)


def _answer(error: Exception) -> Response:
    answer = error_answer(error)
    return Response(answer.body, answer.status, dict(answer.headers), "application/json")
