"""Who a request is for: what is fixed to the caller, what its body says, and what its headers say."""

from __future__ import annotations

import re

import pytest

from jaxserve.request import RequestOptions
from jaxserve.serving.access.callers import Caller
from jaxserve.serving.access.request_headers import request_options

HEADERS = {"x-tenant": "head", "x-priority": "-7", "x-request-timeout": "2.5"}


@pytest.mark.parametrize(
    ("caller", "headers", "body", "expected"),
    [
        (Caller(), {}, {}, RequestOptions()),
        (Caller(), HEADERS, {}, RequestOptions("head", -7, 102.5)),
        (Caller(), HEADERS, {"tenant": "body", "priority": 3}, RequestOptions("body", 3, 102.5)),
        (Caller(tenant="key", priority=4), {"x-tenant": "key"}, {"priority": 4}, RequestOptions("key", 4)),
        (Caller(tenant="key", priority=4), {}, {}, RequestOptions("key", 4)),
        (Caller(), HEADERS, {"deadline": 101.0}, RequestOptions("head", -7, 101.0)),
        (Caller(), HEADERS, {"deadline": 200.0, "cache_salt": "s"}, RequestOptions("head", -7, 102.5, "s")),
        (Caller(tenant="key"), {}, {"prefix_caching": False}, RequestOptions("key", prefix_caching=False)),
    ],
)
def test_what_counts(caller, headers, body, expected):
    assert request_options(caller, headers, RequestOptions(**body), now=100.0) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x-priority", "high", "x-priority is 'high'; it must be a whole number, higher for what is more urgent"),
        ("x-priority", "1.5", "x-priority is '1.5'; it must be a whole number, higher for what is more urgent"),
        ("x-priority", "²", "x-priority is '²'; it must be a whole number, higher for what is more urgent"),
        ("x-priority", "9999999999", "priority is 9999999999; it must be a whole number from"),
        ("x-request-timeout", "nan", "x-request-timeout is 'nan'; it must be a finite number of seconds above 0"),
        ("x-request-timeout", "0", "x-request-timeout is '0'; it must be a finite number of seconds above 0"),
        ("x-request-timeout", "1m", "x-request-timeout is '1m'; it must be a finite number of seconds above 0"),
        ("x-tenant", "x" * 257, "tenant has 257 characters; at most 256 are allowed"),
    ],
)
def test_malformed_headers(name, text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        request_options(Caller(), {name: text})
