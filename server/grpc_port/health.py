"""Implements the health service, grpc.health.v1.Health.

grpc_health's own implementation holds a lock while it writes to a watcher, so a watcher that does not read its stream
blocks status changes and the server's drain; and it does not limit the number of watchers.
"""

# ruff: noqa: N802  the names of RPCs are those of the proto
from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
WATCH_SECONDS = 3600.0

Status = health_pb2.HealthCheckResponse.ServingStatus
_pb: Any = health_pb2  # its stub lacks List


class HealthService(health_pb2_grpc.HealthServicer):
    """Reports the status of services. most_watches: maximum number of concurrent Watch calls."""

    def __init__(self, most_watches: int):
        self._most_watches = most_watches
        self._num_watches = 0
        self._statuses: dict[str, Any] = {}
        self._changed = asyncio.Event()
        self._final = False

    def set(self, service: str, status: Any) -> None:
        """Sets a service's status and notifies its watchers. Has no effect after `shut_down`."""
        if not self._final:
            self._statuses[service] = status
            self._changed.set()
            self._changed = asyncio.Event()

    def shut_down(self) -> None:
        """Sets every status to NOT_SERVING permanently."""
        for service in self._statuses:
            self.set(service, Status.NOT_SERVING)
        self._final = True

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service {request.service!r} is not known")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, request: Any, context: Any) -> Any:
        return _pb.HealthListResponse(
            statuses={name: health_pb2.HealthCheckResponse(status=status) for name, status in self._statuses.items()}
        )

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        if self._num_watches >= self._most_watches:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._num_watches} calls watch health; at most {self._most_watches} (max_health_watches) may",
            )
        self._num_watches += 1
        try:
            async with asyncio.timeout(WATCH_SECONDS):
                await self._tell_changes(request.service, context)
        except TimeoutError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"watched for {WATCH_SECONDS:g} s; watch again")
        finally:
            self._num_watches -= 1

    async def _tell_changes(self, service: str, context: Any) -> None:
        told = None
        while True:
            changed = self._changed
            status = self._statuses.get(service, Status.SERVICE_UNKNOWN)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            await changed.wait()
