"""Serves the page at `/`: a document, its style, scripts and icon, which come from this server alone.

They hold no secret and need no key: what the page asks for afterwards does. Paths are relative, so that the page works
behind a proxy that puts a prefix before them.
"""

from __future__ import annotations

import hashlib
import pathlib

from fastapi import APIRouter, Request
from fastapi.responses import Response

DIRECTORY = pathlib.Path(__file__).parents[1] / "page"

TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "events.js": "text/javascript; charset=utf-8",
    "plots.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""Files of the page with their content types."""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)

HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


def router() -> APIRouter:
    """Returns the routes of the page. Its files are read once."""
    routes = APIRouter()
    for name, kind in TYPES.items():
        path = "/" if name == "index.html" else f"/page/{name}"
        routes.add_api_route(
            path, _file((DIRECTORY / name).read_bytes(), kind), methods=["GET", "HEAD"], include_in_schema=False
        )
    return routes


def _file(content: bytes, kind: str):
    """Returns the behavior of a file's route."""
    headers = HEADERS | {"etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def file(request: Request) -> Response:
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return file
