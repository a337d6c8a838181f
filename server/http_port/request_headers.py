"""Reads what the headers of a request say beside its body: tenant, priority, deadline, id."""

from __future__ import annotations

import math
import time
import uuid

from jaxserve.config.shown import shown
from jaxserve.frontend.openai import BodyRequest
from jaxserve.request import RequestOptions, check_identity
from jaxserve.serving.http_port.exchange import Exchange

REQUEST_ID = "x-request-id"
TENANT = "x-tenant"
PRIORITY = "x-priority"
TIMEOUT = "x-request-timeout"


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
    tenant = exchange.header(TENANT)
    if tenant is not None and body.tenant:
        raise ValueError(f"tenant is given in the body and in {TENANT}; give one of them")
    priority = _priority_of(exchange)
    if priority is not None and body.priority:
        raise ValueError(f"priority is given in the body and in {PRIORITY}; give one of them")
    deadline = _deadline_of(exchange)
    if deadline is not None and body.deadline is not None:
        raise ValueError(f"deadline is given in the body, and {TIMEOUT} too; give one of them")
    return exchange.caller.options(
        tenant=body.tenant if tenant is None else tenant,
        priority=body.priority if priority is None else priority,
        deadline=body.deadline if deadline is None else deadline,
        cache_salt=body.cache_salt,
    )


def _priority_of(exchange: Exchange) -> int | None:
    value = exchange.header(PRIORITY)
    if value is None:
        return None
    digits = value.strip().removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 10):
        raise ValueError(f"{PRIORITY} is {shown(value)}; it must be a whole number: higher is more urgent")
    return int(value)


def _deadline_of(exchange: Exchange) -> float | None:
    """Returns the deadline in Unix seconds; the header has the seconds until then."""
    value = exchange.header(TIMEOUT)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{TIMEOUT} is {shown(value)}; it must be a number of seconds above 0")
    return time.time() + seconds
