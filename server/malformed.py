"""INVALID_ARGUMENT for requests that are not messages.

gRPC answers bytes that protobuf cannot parse (invalid UTF-8 in a string, a message that breaks off) with UNKNOWN and a
traceback in the server's log. Here they are told from a fault of the server, and logged by nobody.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError


class MalformedInterceptor(grpc.aio.ServerInterceptor):
    """Refuses requests to one service that do not parse. service: its full name."""

    def __init__(self, service: str):
        self._prefix = f"/{service}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        make = grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.unary_unary_rpc_method_handler
        return make(
            _refusing(handler.unary_stream or handler.unary_unary),
            request_deserializer=_catching(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def _catching(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """The parser, but with its error as its result."""

    def parse_or_error(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            return error

    return parse_or_error


def _refusing(behavior: Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """The RPC, but refused when its request is a parser's error."""

    async def refuse_or_behave(request: Any, context: grpc.aio.ServicerContext) -> Any:
        if isinstance(request, DecodeError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the request is malformed: {request}")
        return await behavior(request, context)

    return refuse_or_behave
