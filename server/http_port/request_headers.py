"""Reads what the headers of a request say beside its body: tenant, priority, deadline, id."""

from __future__ import annotations

import uuid

from jaxserve.frontend.openai import BodyRequest
from jaxserve.request import RequestOptions, check_identity
from jaxserve.serving.access.request_headers import PRIORITY, TENANT, TIMEOUT, request_options
from jaxserve.serving.http_port.exchange import Exchange

REQUEST_ID = "x-request-id"


def request_id_of(exchange: Exchange) -> str:
    """Returns the id that the client has chosen, or a new one. Raises ValueError."""
    value = exchange.header(REQUEST_ID)
    if not value:
        return uuid.uuid4().hex
    check_identity(REQUEST_ID, value)
    return value


def options_of(exchange: Exchange, request: BodyRequest) -> RequestOptions:
    """Returns the options of a request: those of its body and headers, which must not both say one thing, and what is
    fixed for the caller.

    Raises ValueError naming the header or field.
    """
    body = request.options
    headers = {name: value for name in (TENANT, PRIORITY, TIMEOUT) if (value := exchange.header(name)) is not None}
    said = {
        TENANT: ("tenant", body.tenant),
        PRIORITY: ("priority", body.priority),
        TIMEOUT: ("deadline", body.deadline),
    }
    for name in headers:
        field, value = said[name]
        if value:
            raise ValueError(f"{field} is given in the body and in {name}; give one of them")
    return request_options(
        exchange.caller,
        headers,
        tenant=body.tenant,
        priority=body.priority,
        deadline=body.deadline,
        cache_salt=body.cache_salt,
    )
