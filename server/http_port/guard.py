"""Stands before every route of the HTTP port: nobody passes without a key where keys are needed.

It wraps the whole application, so that a route cannot be added without it; unknown paths, the OpenAPI document and its
pages need a key too. Health checks alone need none: probes have none. Who calls is in `scope["caller"]`.
"""

from __future__ import annotations

import http
import ipaddress
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from jaxserve.config.shown import shown
from jaxserve.serving.access.callers import Caller, require_admin
from jaxserve.serving.http_port.errors import error_answer
from jaxserve.serving.http_port.exchange import Exchange
from jaxserve.serving.problem import CallerLimitError, ForbiddenError, UnauthenticatedError
from jaxserve.serving.served_model import ServedModel

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FLUSH_URL = "/reset_prefix_cache"

ADMIN_PATHS = ("/metrics", "/debug", "/admin", FLUSH_URL)
"""Paths, and all below them, that show or change the whole server; they need an admin's key."""

PROBES = frozenset(("/health", "/health/live", "/health/ready"))
"""Paths of health checks."""

_PAGE = "/page"
"""Path below which the files of the page at `/` lie. They hold no secret; what the page asks for needs a key."""

_OPEN_METHODS = ("GET", "HEAD")
_CHALLENGE = ((b"www-authenticate", b"Bearer"), (b"www-authenticate", b'Basic realm="jaxserve", charset="UTF-8"'))
"""Ways to give a key. Basic is for browsers, which then ask for it: the password is the key."""


class HttpGuard:
    """Wraps an ASGI application.

    Args:
        app: what is guarded.
        served: the model, whose callers and limits count.
        web_origins: origins of pages, besides this server's own, whose calls are taken.
    """

    def __init__(self, app: App, served: ServedModel, web_origins: Iterable[str] = ()):
        self._app = app
        self._served = served
        self._web_origins = frozenset(web_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await self._guard(scope, receive, send)
            case "lifespan":  # of the process, and nobody's call
                await self._app(scope, receive, send)
            case _:
                await send({"type": "websocket.close", "code": 1008, "reason": "this server has no WebSockets"})

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in _OPEN_METHODS and _is_open(scope["path"]):
            scope["caller"] = Caller()
            await self._app(scope, receive, send)
            return
        try:
            caller = self._admitted(scope)
        except (UnauthenticatedError, ForbiddenError, CallerLimitError) as error:
            await _refuse(error, scope, receive, send)
            return
        try:
            scope["caller"] = caller
            await self._app(scope, receive, send)
        finally:
            self._served.limiter.closed(caller)

    def _admitted(self, scope: Scope) -> Caller:
        """Identifies the caller and counts the call with its limiter. Raises the error of a refusal."""
        credential = _only(scope, b"authorization")
        caller = self._served.callers.identify(credential)
        if not (credential or "").lower().startswith("bearer "):
            self._check_page(scope, has_key=credential is not None and bool(caller.name))
        if is_below(scope["path"], ADMIN_PATHS):
            require_admin(caller, shown(scope["path"]))
        self._served.limiter.opened(caller)
        return caller

    def _check_page(self, scope: Scope, has_key: bool) -> None:
        """Refuses what a foreign page in somebody's browser sends: the browser adds a password by itself, and where no
        keys are needed, being on the server's machine is enough.

        Raises ForbiddenError.
        """
        origin = _only(scope, b"origin")
        if origin is None or origin in self._web_origins:
            return
        named = urllib.parse.urlsplit(origin).netloc
        # A page whose name was made to point here (DNS rebinding) has the same host as the server; without a key, only
        # names that nobody else can own are believed.
        if not named or named != _only(scope, b"host") or not (has_key or _is_own(named)):
            raise ForbiddenError(
                f"origin is {shown(origin)}; pages of other servers may not call this one from a browser: add the "
                "origin to AccessConfig.web_origins"
            )


def _is_open(path: str) -> bool:
    """Tells whether a path may be read without a key."""
    return path in PROBES or path == "/" or is_below(path, (_PAGE,))


def is_below(path: str, roots: Iterable[str]) -> bool:
    """Tells whether a path is one of the roots or below one."""
    return any(path == root or path.startswith(f"{root}/") for root in roots)


def _is_own(host: str) -> bool:
    """Tells whether HOST or HOST:PORT is an address or this machine's own name for itself."""
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost"
    return True


def _only(scope: Scope, name: bytes) -> str | None:
    """Returns the value of a header that stands once in a request; one that stands twice counts as absent."""
    values = [value for key, value in scope["headers"] if key == name]
    return values[0].decode("latin-1") if len(values) == 1 else None


async def _refuse(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    answer = error_answer(error)
    exchange = Exchange(scope, receive, send, 0)
    if answer.status == http.HTTPStatus.UNAUTHORIZED:
        exchange.extra += _CHALLENGE
    await exchange.answer(answer.status, answer.body, answer.headers)
