"""Routes embeddings and scores."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.routing import Route

from jaxserve.config.http_config import HttpConfig
from jaxserve.frontend.openai_embeddings import EMBEDDINGS_URL, SCORE_URLS
from jaxserve.serving.http_port.embedding import Embeddings
from jaxserve.serving.served_model import ServedModel


def router(served: ServedModel, config: HttpConfig, max_body_bytes: int) -> APIRouter:
    """Returns the routes. Arguments are as for `Embeddings`."""
    return APIRouter(
        routes=[
            Route(url, Embeddings(url in SCORE_URLS, served, config, max_body_bytes), methods=["POST"], name=url)
            for url in (EMBEDDINGS_URL, *SCORE_URLS)
        ]
    )
