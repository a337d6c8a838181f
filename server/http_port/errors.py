"""Translates problems to HTTP: a status, and a body in OpenAI's shape."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping

import msgspec

from jaxserve.config.shown import clipped, shown
from jaxserve.serving.problem import MAX_DETAILS, Code, Problem, problem_of, unforeseen

_log = logging.getLogger("jaxserve.server")

_STATUS: Mapping[Code, tuple[int, str]] = {
    Code.INVALID_ARGUMENT: (400, "invalid_request_error"),
    Code.UNAUTHENTICATED: (401, "authentication_error"),
    Code.PERMISSION_DENIED: (403, "permission_error"),
    Code.NOT_FOUND: (404, "not_found_error"),
    Code.ALREADY_EXISTS: (409, "conflict_error"),
    Code.FAILED_PRECONDITION: (400, "invalid_request_error"),
    Code.CANCELLED: (409, "conflict_error"),
    Code.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    Code.DEADLINE_EXCEEDED: (408, "timeout_error"),
    Code.UNIMPLEMENTED: (501, "not_implemented_error"),
    Code.UNAVAILABLE: (503, "service_unavailable_error"),
    Code.INTERNAL: (500, "server_error"),
}
"""Status and OpenAI's type of each kind of problem."""

_OF_HTTP: Mapping[int, tuple[str, str]] = {
    400: ("invalid_request_error", "bad_request"),
    404: ("not_found_error", "unknown_path"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "request_timeout"),
    413: ("invalid_request_error", "body_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    431: ("invalid_request_error", "headers_too_large"),
    503: ("service_unavailable_error", "unavailable"),
}
"""Type and code of what concerns HTTP itself."""

_FIELD = re.compile(
    r"(?:body has the unknown field ')?([A-Za-z_][\w.\[\]-]*)"
    r"(?:'; | (?:id )?(?:is|has|have|must|and|are|names|needs?|do)\b)"
)


class HttpError(Exception):
    """Ends a request with a status of HTTP itself. message: one line. headers: of the response, besides its own."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class UnknownModelError(LookupError):
    """The model that the client names is not the one that is served."""


def check_model(served: str, asked: str | None) -> None:
    """Raises UnknownModelError unless the model that is asked for is the one that is served; None leaves it open."""
    if asked not in (None, served):
        raise UnknownModelError(f"model {shown(asked)} is not served here; this server has {served!r}")


@dataclasses.dataclass(frozen=True)
class ErrorAnswer:
    """Holds the answer to a request that failed: its status, headers besides the usual ones, and body."""

    status: int
    body: bytes
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


def error_answer(error: Exception) -> ErrorAnswer:
    """Returns the answer to a request that ended with `error`. An unforeseen one is logged and says nothing."""
    if isinstance(error, HttpError):
        kind, code = _OF_HTTP.get(error.status, ("invalid_request_error", "http_error"))
        return ErrorAnswer(error.status, _body(str(error), kind, code, None), error.headers)
    if isinstance(error, UnknownModelError):
        return ErrorAnswer(404, _body(str(error), "not_found_error", "model_not_found", "model"))
    problem = problem_of(error)
    if problem is None:
        _log.error("a request failed with an unforeseen error", exc_info=error)
        problem = unforeseen(error)
    return problem_answer(problem)


def problem_answer(problem: Problem) -> ErrorAnswer:
    """Returns the answer that says what the problem is."""
    status, kind = _STATUS[problem.code]
    param = _field_of(problem.details) if status == 400 else None
    headers = {}
    if problem.retry_seconds is not None:
        headers["retry-after"] = str(math.ceil(problem.retry_seconds))
    code = (
        "invalid_api_key" if problem.code is Code.UNAUTHENTICATED else problem.code.value
    )  # which OpenAI's clients know
    return ErrorAnswer(status, _body(problem.details, kind, code, param), headers)


def _body(message: str, kind: str, code: str, param: str | None) -> bytes:
    line = " ".join(clipped(message, MAX_DETAILS).split())
    return msgspec.json.encode({"error": {"message": line, "type": kind, "param": param, "code": code}})


def _field_of(details: str) -> str | None:
    """Returns the field that a message is about: the errors of all checks begin with its name."""
    match = _FIELD.match(details)
    return match[1] if match else None
