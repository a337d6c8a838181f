"""Describes the HTTP port as an OpenAPI document; the sampling parameters follow from their table."""

from __future__ import annotations

from typing import Any

from jaxserve.serving.served_model import ServedModel


def document(found: dict[str, Any], served: ServedModel, max_body_bytes: int) -> dict[str, Any]:
    """Returns the document."""
    return found
