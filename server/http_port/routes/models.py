"""Says which model is served, and by which version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

import jaxserve
from jaxserve.serving.http_port.errors import check_model
from jaxserve.serving.served_model import ServedModel


def router(served: ServedModel) -> APIRouter:
    """Returns the routes. served: the model."""
    routes = APIRouter(include_in_schema=False)  # openapi.py has them

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served)]}

    @routes.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        found = _model(served)
        check_model(served.name, model)
        return found

    @routes.get("/version")
    async def version() -> dict[str, Any]:
        return {"version": jaxserve.__version__}

    return routes


def _model(served: ServedModel) -> dict[str, Any]:
    """Returns the model as OpenAI describes one, with vLLM's additions. Raises UnavailableError before it is loaded."""
    limits = served.started().ready.limits
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "jaxserve",
        "root": served.name,
        "parent": None,
        "max_model_len": limits.max_model_len,
    }
