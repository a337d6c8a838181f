"""Intercepts every call: reads and checks its request and writes its responses, within bounds.

Handlers are run as ones whose client streams, which is the same on the wire, so that the request message is read here.
gRPC by itself waits for ever for one that does not arrive, forgets a call without one, and answers one that does not
parse with UNKNOWN and a traceback in the server's log. Each answer is written here too, or its size noted, so that one
that the client does not take is noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from jaxserve.serving.grpc_port.calls import Call, OpenCalls, rpc_task
from jaxserve.serving.grpc_port.status import Status, status_of

_EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]  made at run time

_LARGE = 256 * 1024
"""Message size in bytes from which parsing takes milliseconds."""


class CallError(Exception):
    """Ends a call because of its client. status: the status sent to the client."""

    def __init__(self, status: Status):
        super().__init__(status.details)
        self.status = status


class CallContext:
    """Wraps gRPC's context for handlers: reads and writes are bounded, and take messages instead of bytes."""

    def __init__(self, context: Any, call: Call, calls: OpenCalls, handler: Any):
        self._context = context
        self._write = context.write
        self._call = call
        self._calls = calls
        self._parse = handler.request_deserializer
        self._serialize = handler.response_serializer

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
        try:
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
    """Opens each call in `calls` and runs its handler within the bounds. Handlers must be asynchronous."""

    def __init__(self, calls: OpenCalls):
        self._calls = calls
        self._handlers: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method, says gRPC
            return None
        method = handler_call_details.method
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

    def _bounded(self, handler: Any, method: str) -> Callable[[Any, Any], Awaitable[bytes | None]]:
        calls = self._calls
        run = _stream if handler.response_streaming else _answer

        async def bounded(_requests: Any, grpc_context: Any) -> bytes | None:
            task = asyncio.current_task()
            assert task is not None
            call = Call(method, grpc_context.peer(), task, rpc_task())
            try:
                if (refusal := calls.refusal(call)) is not None:
                    await grpc_context.abort(refusal.code, refusal.details, refusal.metadata)
                calls.opened(call)
                task.add_done_callback(lambda _: calls.closed(call))
                context = CallContext(grpc_context, call, calls, handler)
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
