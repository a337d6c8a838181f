"""Defines who calls, for every port alike."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from jaxserve.request import RequestOptions


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who sends a request.

    Attributes:
        name: of the caller's key; "" is everybody on a server without keys. Requests are seen and aborted only by the
            caller of the same name.
        tenant: tenant of all its requests; None leaves it to each request.
        priority: priority of all its requests; None leaves it to each request.
        is_admin: whether calls that concern the whole server are allowed.
    """

    name: str = ""
    tenant: str | None = None
    priority: int | None = None
    is_admin: bool = False

    def options(
        self, tenant: str = "", priority: int = 0, deadline: float | None = None, cache_salt: str = ""
    ) -> RequestOptions:
        """Returns the options of a request that asks for these; what is fixed for the caller takes their place.

        Raises ValueError naming the field.
        """
        return RequestOptions(
            tenant=tenant if self.tenant is None else self.tenant,
            priority=priority if self.priority is None else self.priority,
            deadline=deadline,
            cache_salt=cache_salt,
        )


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
        return Caller(is_admin=True)
