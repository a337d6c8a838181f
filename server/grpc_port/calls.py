"""Bounds the open calls: their number, and how long each may wait for its client.

A call waits for its client in two places. Its request message may never arrive completely, and its response may never
be read: the message then stays in gRPC's flow control, and whatever awaits the write stays with it. gRPC bounds
neither, and cannot report the second to the client: the status is queued behind the message. Such a call is canceled.
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
import dataclasses
import logging
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import grpc

from jaxserve.config.client_limits import LimitsConfig
from jaxserve.serving.grpc_port.status import Status
from jaxserve.serving.sweeping import GRACE_SECONDS, LOG_SECONDS, sweep_regularly

_log = logging.getLogger("jaxserve.server")

HEALTH_PREFIX = "/grpc.health.v1.Health/"
GATEWAY_HEALTH = "/vllm.grpc.engine.VllmEngine/HealthCheck"
PROBES = (HEALTH_PREFIX, GATEWAY_HEALTH)
"""Beginnings of methods whose calls count neither as open nor as use of their connection, so that probes are
admitted."""

_RETRY_PUSHBACK = (("grpc-retry-pushback-ms", "1000"),)


@dataclasses.dataclass(eq=False, slots=True)
class Call:
    """Tracks one open call.

    Attributes:
        peer: its connection, as gRPC names it.
        handler: the task that runs the handler.
        rpc: gRPC's own task around it, which holds the call.
        size: bytes of the message that waits for the client.
        backlog: returns the bytes queued behind that message.
        refusal: the reason it was ended while its request message was awaited.
        received: when it was opened, in seconds of `time.perf_counter`.
    """

    method: str
    peer: str
    handler: asyncio.Task[Any]
    rpc: asyncio.Task[Any] | None
    size: int = 0
    backlog: Callable[[], int] = lambda: 0
    refusal: Status | None = None
    received: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def is_probe(self) -> bool:
        """Whether it is a health check."""
        return self.method.startswith(PROBES)

    def bytes_unread(self) -> int:
        """Bytes of responses that wait for the client."""
        return self.size + self.backlog()

    def cancel(self) -> None:
        """Ends the call, including what gRPC still holds of it."""
        self.handler.cancel()
        if self.rpc is not None:
            self.rpc.cancel()


class OpenCalls:
    """Tracks the open calls of one server. limits: the bounds. most_peers: connections that calls may occupy."""

    def __init__(self, limits: LimitsConfig, most_peers: int):
        self._limits = limits
        self._most_peers = most_peers
        self._num_open = 0
        self._peers: collections.Counter[str] = collections.Counter()
        self._used: set[str] = set()
        self._reading: dict[Call, float] = {}  # since when, in this order
        self._writing: dict[Call, float] = {}
        # Calls that were ended, by the setting that ended them.
        self._unlogged: collections.Counter[str] = collections.Counter()
        self._num_logged: collections.Counter[str] = collections.Counter()
        self._last_log = -LOG_SECONDS
        self.parsing = asyncio.Lock()  # held while one large message is parsed

    # ---- what the interceptor says ----

    def refusal(self, call: Call) -> Status | None:
        """Returns the reason why the call must not be opened, or None."""
        limits = self._limits
        if call.is_probe:
            return None
        if self._num_open >= limits.max_open_calls:
            reason = f"{self._num_open} calls are open; at most {limits.max_open_calls} (max_open_calls) may be"
        elif call.peer not in self._peers and len(self._peers) >= self._most_peers:
            reason = (
                f"calls of {len(self._peers)} connections are open; others than health checks may come from at most "
                f"{self._most_peers} (max_connections, less those kept for probes)"
            )
        else:
            return None
        return Status(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{reason}; try again later", _RETRY_PUSHBACK)

    def opened(self, call: Call) -> None:
        """Registers a call that is not refused."""
        self._used.add(call.peer)
        if not call.is_probe:
            self._num_open += 1
            self._peers[call.peer] += 1

    def closed(self, call: Call) -> None:
        """Removes a call whose task has ended, for any reason."""
        self._reading.pop(call, None)
        self._writing.pop(call, None)
        if not call.is_probe:
            self._num_open -= 1
            self._peers[call.peer] -= 1
            if not self._peers[call.peer]:
                del self._peers[call.peer]

    def reads(self, call: Call) -> None:
        """Marks the call as waiting for a message of its client."""
        self._reading[call] = time.monotonic()

    def has_read(self, call: Call) -> None:
        self._reading.pop(call, None)

    def writes(self, call: Call, size: int) -> None:
        """Marks the call as waiting until its client has read a message of `size` bytes."""
        call.size = size
        self._writing[call] = time.monotonic()

    def has_written(self, call: Call) -> None:
        self._writing.pop(call, None)

    # ---- what others ask ----

    @property
    def num_ended(self) -> collections.Counter[str]:
        """Returns the number of calls ended so far, by the setting that ended them."""
        return self._num_logged + self._unlogged

    @property
    def num_open(self) -> int:
        """Number of open calls, except health checks."""
        return self._num_open

    def has_calls(self, peer: str) -> bool:
        """Returns whether a connection has open calls, except health checks."""
        return peer in self._peers

    def take_used(self) -> set[str]:
        """Returns the connections on which calls were opened since the last call of this method."""
        used, self._used = self._used, set()
        return used

    async def watch(self) -> None:
        """Enforces the bounds, until canceled."""
        await sweep_regularly(self.sweep, "open calls")

    def sweep(self) -> None:
        """Ends the calls that exceed a bound."""
        now, ended = time.monotonic(), self._unlogged
        for call, setting in self._overdue(self._reading, "max_receive_seconds", "max_receiving_calls", now):
            call.refusal = self._late(setting)
            call.handler.cancel()
            ended[setting] += 1
        for call, setting in self._overdue(self._writing, "max_unread_seconds", "max_unread_calls", now):
            call.cancel()
            ended[setting] += 1
        for call in self._over_bytes(now):
            del self._writing[call]
            call.cancel()
            ended["max_unread_bytes"] += 1
        if ended and now - self._last_log >= LOG_SECONDS:
            self._last_log = now
            for setting, count in ended.items():
                self._num_logged[setting] += count
                _log.warning(
                    "%d calls ended by %s = %s (%d so far): their clients %s",
                    count,
                    setting,
                    getattr(self._limits, setting),
                    self._num_logged[setting],
                    "did not send their requests" if setting.startswith("max_receiv") else "did not read the answers",
                )
            ended.clear()

    def _overdue(
        self, waiting: dict[Call, float], age_setting: str, number_setting: str, now: float
    ) -> Iterator[tuple[Call, str]]:
        """Removes and returns the calls that have waited too long or, where too many wait, longest, with the setting
        exceeded.
        """
        seconds, most = getattr(self._limits, age_setting), getattr(self._limits, number_setting)
        while waiting:
            call, since = next(iter(waiting.items()))
            if now - since >= seconds:
                setting = age_setting
            elif len(waiting) > most and now - since >= GRACE_SECONDS:
                setting = number_setting
            else:
                return
            del waiting[call]
            yield call, setting

    def _over_bytes(self, now: float) -> list[Call]:
        """Selects the calls to end so that unread responses take no more than max_unread_bytes."""
        excess = sum(call.bytes_unread() for call in self._writing) - self._limits.max_unread_bytes
        found = []
        for call, since in self._writing.items():
            if excess <= 0 or now - since < GRACE_SECONDS:
                break
            found.append(call)
            excess -= call.bytes_unread()
        return found

    def _late(self, setting: str) -> Status:
        """Returns the status for a client whose request does not arrive."""
        limit = getattr(self._limits, setting)
        if setting == "max_receive_seconds":
            reason = f"the request message has not arrived in whole within {limit:g} s ({setting})"
            return Status(grpc.StatusCode.DEADLINE_EXCEEDED, f"{reason}; send it faster")
        reason = f"more than {limit} calls ({setting}) wait for their request messages, this one for longest"
        return Status(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{reason}; send it faster", _RETRY_PUSHBACK)


_rpc_task: contextvars.ContextVar[weakref.ref[asyncio.Task[Any]] | None] = contextvars.ContextVar(
    "_rpc_task", default=None
)


def rpc_task() -> asyncio.Task[Any] | None:
    """Returns gRPC's own task around the handler that runs in this task, or None where `note_rpc_tasks` does not know
    it.
    """
    reference = _rpc_task.get()
    return None if reference is None else reference()


def note_rpc_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Lets `rpc_task` find the tasks of calls that servers on this loop take from now on.

    grpc.aio offers no way to cancel a call from the server's side. It holds each one in a task, which waits for the
    call's end and runs the handler in a second task; the call is canceled when both are. (Two calls may outlast that
    until their connection closes: grpc.aio keeps the first one of the method registered last, and the latest of all.)
    """
    previous = loop.get_task_factory()
    if getattr(previous, "notes_rpc_tasks", False):
        return

    def make_task(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any) -> Any:
        if getattr(coro, "__name__", "") == "_handle_exceptions" and (outer := asyncio.current_task(loop)) is not None:
            options["context"] = options.get("context") or contextvars.copy_context()
            options["context"].run(_rpc_task.set, weakref.ref(outer))
        return asyncio.Task(coro, loop=loop, **options) if previous is None else previous(loop, coro, **options)

    make_task.notes_rpc_tasks = True  # type: ignore[attr-defined]
    loop.set_task_factory(make_task)  # pyright: ignore[reportArgumentType]
