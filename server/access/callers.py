"""Defines who calls, for every port alike."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from jaxserve.config.shown import shown
from jaxserve.request import RequestOptions
from jaxserve.serving.problem import ForbiddenError


@dataclasses.dataclass(frozen=True)
class CallerLimits:
    """Limits one caller, on both ports together; None is no limit.

    max_concurrent_requests: calls at one time. requests_per_minute: calls. tokens_per_minute: tokens of prompts and
    outputs.
    """

    max_concurrent_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def any(self) -> bool:
        """Whether anything is limited."""
        return any(getattr(self, field.name) is not None for field in dataclasses.fields(self))


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who sends a request.

    Attributes:
        name: of the caller's key; "" is everybody on a server without keys. Requests are seen and aborted only by the
            caller of the same name.
        tenant: tenant of all its requests; None leaves it to each request.
        priority: priority of all its requests; None leaves it to each request.
        is_admin: whether calls that concern the whole server are allowed.
        follows_cache: whether events of the prefix cache, which have token ids, may be subscribed to.
        limits: of its calls.
    """

    name: str = ""
    tenant: str | None = None
    priority: int | None = None
    is_admin: bool = False
    limits: CallerLimits = CallerLimits()
    follows_cache: bool = False

    def options(self, asked: RequestOptions = RequestOptions()) -> RequestOptions:
        """Returns the options of a request that asks for these; what it leaves out is as fixed for the caller.

        Args:
            asked: a tenant of "" and a priority of 0 are left out.

        Raises:
            ForbiddenError: the request asks for another tenant or priority than the caller's.
            ValueError: a value that is fixed to the caller is invalid; names the field.
        """
        tenant, priority = asked.tenant, asked.priority
        if self.tenant is not None and tenant not in ("", self.tenant):
            raise ForbiddenError(
                f"tenant is {shown(tenant)}; requests of this key belong to {shown(self.tenant)}: leave it out"
            )
        if self.priority is not None and priority not in (0, self.priority):
            raise ForbiddenError(
                f"priority is {priority}; requests of this key have {self.priority}, where a higher number is more "
                "urgent: leave it out"
            )
        return dataclasses.replace(
            asked,
            tenant=tenant if self.tenant is None else self.tenant,
            priority=priority if self.priority is None else self.priority,
        )


def require_admin(caller: Caller, what: str = "this call") -> None:
    """Raises ForbiddenError unless the caller may make calls that concern the whole server. what: begins the error."""
    if not caller.is_admin:
        raise ForbiddenError(f"{what} concerns the whole server and needs an admin's key")


class Callers(Protocol):
    """Tells who calls."""

    def identify(self, credential: str | None) -> Caller:
        """Returns the caller.

        Args:
            credential: value of the header or metadata `authorization`; None without one.

        Raises:
            UnauthenticatedError: the credential is missing or wrong.
        """
        ...


class Anybody:
    """Lets everybody call, without keys."""

    def identify(self, credential: str | None) -> Caller:
        return Caller(is_admin=True, follows_cache=True)
