"""Puts the routes of the HTTP port together; each of `routes/` adds its own."""

from __future__ import annotations

from fastapi import FastAPI

import jaxserve
from jaxserve.serving.http_port.routes import debug, health, live, metrics, page
from jaxserve.serving.served_model import ServedModel


def make_app(served: ServedModel) -> FastAPI:
    """Returns the application. served: the model; its state decides whether requests are taken."""
    app = FastAPI(title="jaxserve", version=jaxserve.__version__)
    routers = (health.router(served), metrics.router(served), debug.router(served), live.router(served), page.router())
    for router in routers:
        app.include_router(router)
    return app
