"""Reads what HTTP headers and gRPC metadata say about a request: its tenant, priority and deadline."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from jaxserve.config.shown import shown
from jaxserve.request import RequestOptions
from jaxserve.serving.access.callers import Caller

TENANT, PRIORITY, TIMEOUT = "x-tenant", "x-priority", "x-request-timeout"


def options_from_headers(
    caller: Caller, headers: Mapping[str, str], now: float, call_deadline: float | None = None
) -> RequestOptions:
    """Returns the options of a request; its deadline is the earlier of the header's and the call's.

    Args:
        caller: who sends it; what is fixed for the caller takes the headers' place.
        headers: by name in lower case. x-tenant; x-priority, where a higher number is more urgent; x-request-timeout,
            in seconds from now.
        now: seconds of `time.time`.
        call_deadline: in the same; None without one.

    Raises:
        ValueError: names the header, its value and what it must be.
    """
    deadlines = [] if call_deadline is None else [call_deadline]
    if (timeout := headers.get(TIMEOUT)) is not None:
        deadlines.append(now + _seconds(timeout))
    return caller.options(
        tenant=headers.get(TENANT, ""),
        priority=_priority(headers.get(PRIORITY, "0")),
        deadline=min(deadlines, default=None),
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"{TIMEOUT} is {shown(text)}; it must be a number of seconds above 0")
    return seconds


def _priority(text: str) -> int:
    if not re.fullmatch(r"\s*[+-]?[0-9]{1,10}\s*", text):
        raise ValueError(f"{PRIORITY} is {shown(text)}; it must be a whole number; a higher one is more urgent")
    return int(text)
