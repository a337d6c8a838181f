"""Says what is wrong with a call that failed, on either port, and what to do about it."""

from __future__ import annotations

import dataclasses
import re
import socket
from typing import Any

import grpc

from jaxserve.serving.clients.client_probe import ProbeAnswer, probe
from jaxserve.serving.clients.client_target import ServerTarget
from jaxserve.serving.clients.http_client import HttpCallError, HttpConnectionError

FAILURES = (grpc.RpcError, HttpCallError, HttpConnectionError)
"""Errors of the clients of both ports that `failure_of` describes."""

_NO_CONNECTION = re.compile(
    "failed to connect|connection (refused|reset)|resol|socket closed|handshake|http1|goaway|broken pipe|protocol err",
    re.IGNORECASE,
)
"""What gRPC's library says of a connection, and a server of ours never does."""
_UNTRUSTED = re.compile(
    "certificate.verify.failed|self.signed|local issuer|hostname mismatch|not valid for", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Failure:
    """Describes a call that failed.

    Attributes:
        code: name of the gRPC status code that fits, on both ports.
        message: one line.
        remedy: what to do; "" where the message says it.
        retry_seconds: when to try again, where the server says so.
    """

    code: str
    message: str
    remedy: str = ""
    retry_seconds: float | None = None

    @property
    def unreachable(self) -> bool:
        """Whether further requests would fail in the same way."""
        return self.code in ("UNAVAILABLE", "UNAUTHENTICATED")

    @property
    def line(self) -> str:
        """One line for people."""
        return f"{self.message}; {self.remedy}" if self.remedy else self.message

    def record(self) -> dict[str, Any]:
        """Returns the failure as JSON has it."""
        return {"error": dataclasses.asdict(self)}


def failure_of(error: BaseException, target: ServerTarget) -> Failure:
    """Describes one of FAILURES."""
    match error:
        case HttpCallError():
            return _refused(error.code.name, str(error), error.retry_seconds)
        case grpc.RpcError():
            return _grpc_failure(error, target)
        case HttpConnectionError() if isinstance(error.__cause__, TimeoutError):
            return Failure("DEADLINE_EXCEEDED", f"{target.address} has not answered in time")
    return _unreachable(target, str(error) or type(error).__name__)


def _grpc_failure(error: Any, target: ServerTarget) -> Failure:
    code, details = error.code(), " ".join((error.details() or "").split())
    if code is grpc.StatusCode.UNAVAILABLE and _NO_CONNECTION.search(details):
        return _unreachable(target, details)
    if code is grpc.StatusCode.UNIMPLEMENTED and not details.startswith("the server"):
        return Failure(code.name, f"{code.name}: {details}", "is this a jaxserve server, and as new as the client?")
    retry = next((value for key, value in error.trailing_metadata() or () if key == "grpc-retry-pushback-ms"), "")
    return _refused(code.name, details, int(retry) / 1000 if re.fullmatch(r"\d+", str(retry)) else None)


def _refused(code: str, details: str, retry_seconds: float | None) -> Failure:
    """Describes what the server itself refused."""
    remedy = ""
    match code:
        case "UNAUTHENTICATED":
            remedy = "give a key of this server with --api-key or in JAXSERVE_API_KEY"
        case "UNAVAILABLE" if re.search("starting|not ready|loading", details, re.I):
            remedy = "wait for it with --wait SECONDS"
        case "RESOURCE_EXHAUSTED" if retry_seconds is not None and "again" not in details:
            remedy = f"try again in {retry_seconds:g} s"
    return Failure(code, f"{code}: {details}", remedy, retry_seconds)


def _unreachable(target: ServerTarget, details: str) -> Failure:
    """Describes a call that never reached a server, by what answers at its address."""
    if not target.host:
        return Failure("UNAVAILABLE", f"no server answers at {target.address}: {details}")
    if _UNTRUSTED.search(details):
        return Failure(
            "UNAVAILABLE",
            f"the certificate of {target.address} is not trusted: {details}",
            "name the authority that signed it with --ca FILE, and the host as the certificate does",
        )
    try:
        socket.getaddrinfo(target.host, target.port)
    except OSError:
        return Failure("UNAVAILABLE", f"the host {target.host} has no address", "check --address")
    answer = probe(target.host, target.port)
    if answer is None:
        return Failure(
            "UNAVAILABLE", f"no server answers at {target.address}", "start one with: python -m jaxserve.server"
        )
    return _mismatch(target, answer, details)


def _mismatch(target: ServerTarget, answer: ProbeAnswer, details: str) -> Failure:
    protocol = answer.protocol or target.protocol
    if (protocol, answer.tls) == (target.protocol, target.credentials.uses_tls):
        hint = ""
        if answer.tls:
            hint = "if the server asks for a certificate, give one with --certificate FILE and --private-key FILE"
        return Failure("UNAVAILABLE", f"UNAVAILABLE: the connection to {target.address} broke off: {details}", hint)
    if protocol != target.protocol:
        names = {"grpc": "gRPC", "http": "HTTP"}
        what = f"{target.address} is a port for {names[protocol]}, not for {names[target.protocol]}"
    elif answer.tls:
        what = f"{target.address} takes encrypted connections only (TLS)"
    else:
        what = f"{target.address} takes no encrypted connections (TLS)"
    return Failure("UNAVAILABLE", what, f"use --address {target.spelled(protocol, answer.tls)}")
