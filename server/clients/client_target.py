"""Finds the port that an address names, and opens the client of its protocol."""

from __future__ import annotations

import dataclasses
import re
import urllib.parse

from jaxserve.serving.clients.client_credentials import Credentials
from jaxserve.serving.clients.grpc_client import Client
from jaxserve.serving.clients.http_client import HttpClient

AnyClient = Client | HttpClient

_SCHEMES = {"http": ("http", False), "https": ("http", True), "grpc": ("grpc", False), "grpcs": ("grpc", True)}
_DEFAULT_PORTS = {"http": 8000, "https": 443, "grpc": 50051, "grpcs": 50051}


@dataclasses.dataclass(frozen=True)
class ServerTarget:
    """Names a port of a server.

    Attributes:
        address: as the user has given it.
        protocol: "grpc" or "http".
        host, port: where it listens; host is "" for addresses that only gRPC understands, such as unix:PATH.
        credentials: key and TLS for it.
    """

    address: str
    protocol: str
    host: str
    port: int
    credentials: Credentials

    def open(self) -> AnyClient:
        """Returns a client, which connects with its first call. Raises ValueError for files that cannot be used."""
        if self.protocol == "http":
            return HttpClient(self.url, self.credentials)
        return Client(f"{self._bracketed}:{self.port}" if self.host else self.address, self.credentials)

    @property
    def url(self) -> str:
        """The address of an HTTP port, with its scheme, port and prefix."""
        path = urllib.parse.urlsplit(self.address).path
        return f"{'https' if self.credentials.uses_tls else 'http'}://{self._bracketed}:{self.port}{path}"

    def spelled(self, protocol: str, tls: bool) -> str:
        """Returns how the same port is named with another protocol."""
        if protocol == "http":
            return f"{'https' if tls else 'http'}://{self._bracketed}:{self.port}"
        return f"grpcs://{self._bracketed}:{self.port}" if tls else f"{self._bracketed}:{self.port}"

    @property
    def _bracketed(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def parse_target(address: str, credentials: Credentials) -> ServerTarget:
    """Parses HOST:PORT and grpc://HOST:PORT (gRPC), grpcs:// (with TLS), http:// and https:// URLs.

    credentials: key and TLS; a scheme turns TLS on. Raises ValueError naming the address.
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        if re.match(r"(unix|unix-abstract|dns|ipv4|ipv6|vsock|xds):", address):
            return ServerTarget(address, "grpc", "", 0, credentials)
        scheme, rest = "grpc", address
    if scheme not in _SCHEMES:
        raise ValueError(
            f"address is {address!r}; it must be HOST:PORT or grpc://HOST:PORT for gRPC, or http://HOST:PORT for HTTP "
            "(grpcs:// and https:// with TLS)"
        )
    protocol, tls = _SCHEMES[scheme]
    try:
        parts = urllib.parse.urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"address is {address!r}; {error}") from error
    if not host or (not separator and port is None) or parts.username is not None:
        raise ValueError(f"address is {address!r}; it must be HOST:PORT, or a URL such as http://HOST:PORT")
    credentials = dataclasses.replace(credentials, tls=True) if tls else credentials
    return ServerTarget(address, protocol, host, _DEFAULT_PORTS[scheme] if port is None else port, credentials)
