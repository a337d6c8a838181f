"""Reads who a request is for and how urgent it is from headers, or gRPC metadata, for every port alike.

x-tenant is the tenant, x-priority a whole number, higher for what is more urgent, and x-request-timeout the seconds
from the request's arrival until its answer is of no more use.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping

from jaxserve.config.shown import shown
from jaxserve.request import RequestOptions
from jaxserve.serving.access.callers import Caller

TENANT = "x-tenant"
PRIORITY = "x-priority"
TIMEOUT = "x-request-timeout"


def request_options(
    caller: Caller,
    headers: Mapping[str, str],
    asked: RequestOptions = RequestOptions(),
    *,
    now: float | None = None,
) -> RequestOptions:
    """Returns a request's options.

    What is fixed to the caller counts before what the request itself says, and that before the headers. Of several
    deadlines the earliest counts.

    Args:
        caller: who sends it.
        headers: by lower-case name.
        asked: as the request's body says, with the earliest deadline known otherwise; a tenant of "" and a priority of
            0 leave them to the header.
        now: when the request arrived; None is the present.

    Raises:
        ValueError: a header is malformed; the error names it.
    """
    timeout, deadline = _timeout(headers), asked.deadline
    if timeout is not None:
        end = (time.time() if now is None else now) + timeout
        deadline = end if deadline is None else min(deadline, end)
    return caller.options(
        dataclasses.replace(
            asked,
            tenant=asked.tenant or headers.get(TENANT, ""),
            priority=asked.priority or _priority(headers),
            deadline=deadline,
        )
    )


def _priority(headers: Mapping[str, str]) -> int:
    text = headers.get(PRIORITY)
    if text is None:
        return 0
    digits = text.strip().removeprefix("-").removeprefix("+")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 10):
        raise ValueError(f"{PRIORITY} is {shown(text)}; it must be a whole number, higher for what is more urgent")
    return int(text)


def _timeout(headers: Mapping[str, str]) -> float | None:
    text = headers.get(TIMEOUT)
    if text is None:
        return None
    try:
        seconds = float(text) if len(text) <= 32 else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{TIMEOUT} is {shown(text)}; it must be a finite number of seconds above 0")
    return seconds
