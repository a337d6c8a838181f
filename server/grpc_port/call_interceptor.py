"""Intercepts every call: reads and checks its request and writes its responses, within bounds.

Handlers are run as ones whose client streams, which is the same on the wire, so that the request message is read here.
gRPC by itself waits for ever for one that does not arrive, forgets a call without one, and answers one that does not
parse with UNKNOWN and a traceback in the server's log. Each answer is written here too, or its size noted, so that one
that the client does not take is noticed. And each caller is identified here, so that no service, however it is added,
can be called without a key where keys are needed; only health checks can.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from jaxserve.serving.access.callers import Anybody, Caller, Callers
from jaxserve.serving.access.limiter import CallLimiter
from jaxserve.serving.grpc_port.calls import GATEWAY_HEALTH, HEALTH_PREFIX, Call, OpenCalls, rpc_task
from jaxserve.serving.grpc_port.oversized import check_few_fields
from jaxserve.serving.grpc_port.status import Status, status_of
from jaxserve.serving.problem import CallerLimitError, UnauthenticatedError

_EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]  made at run time

OPEN_METHODS = frozenset({HEALTH_PREFIX + "Check", HEALTH_PREFIX + "Watch", GATEWAY_HEALTH})
"""Methods that may be called without a key: probes have none."""

_LARGE = 256 * 1024
"""Message size in bytes from which parsing takes milliseconds."""


class CallError(Exception):
    """Ends a call because of its client. status: the status sent to the client."""

    def __init__(self, status: Status):
        super().__init__(status.details)
        self.status = status


class CallContext:
    """Wraps gRPC's context for handlers: reads and writes are bounded, and take messages instead of bytes.

    Attributes:
        caller: who calls.
        message_bytes: size of the message that was read last.
    """

    def __init__(self, context: Any, call: Call, calls: OpenCalls, handler: Any, caller: Caller):
        self.caller = caller
        self._context = context
        self._write = context.write
        self._call = call
        self._calls = calls
        self._parse = handler.request_deserializer
        self._serialize = handler.response_serializer
        self.message_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    @property
    def received(self) -> float:
        """When the call was opened, in seconds of `time.perf_counter`."""
        return self._call.received

    def set_backlog(self, backlog: Callable[[], int]) -> None:
        """Sets a function that returns the number of bytes queued behind a message that the client does not read."""
        self._call.backlog = backlog

    async def read(self) -> Any:
        """Returns the client's next message, or grpc.aio.EOF.

        Raises CallError when it is malformed or does not arrive.
        """
        self._calls.reads(self._call)
        try:
            data = await self._context.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._call.refusal is None or task is None:
                raise
            task.uncancel()
            raise CallError(self._call.refusal) from None
        finally:
            self._calls.has_read(self._call)
        if data is _EOF:
            return data
        self.message_bytes = len(data)
        try:
            check_few_fields(data)
            if len(data) < _LARGE:
                return self._parse(data)
            async with self._calls.parsing:  # other calls run between two large ones
                await asyncio.sleep(0)
                return self._parse(data)
        except DecodeError as error:
            raise CallError(_malformed(str(error))) from error
        except ValueError as error:
            raise CallError(status_of(error) or _malformed(str(error))) from error

    async def write(self, message: Any) -> None:
        """Sends a message; returns when the client has read it."""
        data = self._serialize(message)
        self._calls.writes(self._call, len(data))
        try:
            await self._write(data)
        finally:
            self._calls.has_written(self._call)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        """Ends the call with a status."""
        self._calls.writes(self._call, 0)  # until the task is done
        await self._context.abort(code, details, tuple(trailing_metadata))

    async def requests(self) -> AsyncIterator[Any]:
        """Yields the messages of a streaming client."""
        while (message := await self.read()) is not _EOF:
            yield message

    async def request(self) -> Any:
        """Returns the only message of a client that does not stream. Raises CallError where there is none."""
        message = await self.read()
        if message is _EOF:
            raise CallError(_malformed("the call ended without a whole message"))
        return message


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Opens each call in `calls` and runs its handler within the bounds. Handlers must be asynchronous.

    Args:
        calls: tracks the open calls.
        callers: tells who calls.
        limiter: keeps the callers' limits.
    """

    def __init__(self, calls: OpenCalls, callers: Callers = Anybody(), limiter: CallLimiter | None = None):
        self._calls = calls
        self._callers = callers
        self._limiter = CallLimiter() if limiter is None else limiter
        self._handlers: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            # gRPC says that there is no such method, but not to those who may not know.
            refused = self._refused(method, handler_call_details.invocation_metadata)
            return None if refused is None else grpc.unary_unary_rpc_method_handler(refused)
        known, bounded = self._handlers.get(method, (None, None))
        if known is not handler:
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.response_streaming
                else grpc.stream_unary_rpc_method_handler
            )
            bounded = make(self._bounded(handler, method))
            self._handlers[method] = (handler, bounded)
        return bounded

    def _refused(self, method: str, metadata: Any) -> Callable[[Any, Any], Awaitable[bytes]] | None:
        """Returns a handler that refuses a call without a key, or None where it has one or needs none."""
        try:
            self._identify(method, metadata)
        except UnauthenticatedError as error:
            answer = status_of(error)
            assert answer is not None

            async def refuse(_request: Any, context: Any) -> bytes:
                await context.abort(answer.code, answer.details)
                return b""

            return refuse
        return None

    def _identify(self, method: str, metadata: Any) -> Caller:
        """Returns who calls. Raises UnauthenticatedError."""
        if method in OPEN_METHODS:
            return Caller()
        credential = next((value for name, value in metadata or () if name == "authorization"), None)
        return self._callers.identify(credential if isinstance(credential, str) else None)

    def _admitted(self, call: Call, metadata: Any) -> Caller | Status:
        """Identifies a call's caller and counts the call as open; or returns why it is refused."""
        try:
            caller = self._identify(call.method, metadata)
            if (refusal := self._calls.refusal(call)) is not None:
                return refusal
            self._limiter.opened(caller)
        except (UnauthenticatedError, CallerLimitError) as error:
            answer = status_of(error)
            assert answer is not None
            return answer
        self._calls.opened(call)
        return caller

    def _bounded(self, handler: Any, method: str) -> Callable[[Any, Any], Awaitable[bytes | None]]:
        calls = self._calls
        run = _stream if handler.response_streaming else _answer

        async def bounded(_requests: Any, grpc_context: Any) -> bytes | None:
            task = asyncio.current_task()
            assert task is not None
            call = Call(method, grpc_context.peer(), task, rpc_task())
            try:
                caller = self._admitted(call, grpc_context.invocation_metadata())
                if isinstance(caller, Status):
                    await grpc_context.abort(caller.code, caller.details, caller.metadata)
                    return None
                task.add_done_callback(lambda _: self._closed(call, caller))
                context = CallContext(grpc_context, call, calls, handler, caller)
                last = failed = None
                try:
                    holder = [context.requests() if handler.request_streaming else await context.request()]
                    last = await run(handler, holder, context)
                except CallError as error:
                    failed = error.status
                # gRPC keeps the error that `abort` raises until the garbage collector finds the circle, and with it
                # the frames that it passed and the error before it. So none of these may hold the message, which may
                # be large.
                if failed is not None:
                    await context.abort(failed.code, failed.details, failed.metadata)
            except grpc.aio.InternalError as error:  # gRPC's word for a client that was gone before it noticed
                raise asyncio.CancelledError("the client is gone") from error  # which it does not log
            calls.writes(call, len(last or b""))  # gRPC sends it, and the status, when this returns
            return last

        return bounded

    def _closed(self, call: Call, caller: Caller) -> None:
        self._calls.closed(call)
        self._limiter.closed(caller)


async def _answer(handler: Any, holder: list[Any], context: CallContext) -> bytes:
    """Runs a unary handler and returns its response serialized; handlers of large responses may serialize by
    themselves.

    Args:
        handler: the handler of the RPC.
        holder: holds the request, or the requests, which are removed from it.
        context: of the call.
    """
    behavior = handler.stream_unary if handler.request_streaming else handler.unary_unary
    answer = await behavior(holder.pop(), context)
    return answer if isinstance(answer, bytes) else handler.response_serializer(answer)


async def _stream(handler: Any, holder: list[Any], context: CallContext) -> None:
    """Runs a handler with any number of responses, which it yields or writes itself. holder: as for `_answer`."""
    behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream
    answers = behavior(holder.pop(), context)
    if not hasattr(answers, "__aiter__"):
        await answers
        return
    async with contextlib.aclosing(answers):
        async for message in answers:
            await context.write(message)


def _malformed(reason: str) -> Status:
    return Status(grpc.StatusCode.INVALID_ARGUMENT, f"the request is malformed: {' '.join(reason.split())}")
