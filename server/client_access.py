"""Holds what a client shows of itself, and whom it trusts: an API key, and TLS."""

from __future__ import annotations

import dataclasses
import pathlib
import ssl
from collections.abc import Sequence
from typing import Any

import grpc


@dataclasses.dataclass(frozen=True)
class ClientAccess:
    """Configures the connections of a client.

    Attributes:
        api_key: sent with every call; None sends none.
        tls: encrypts connections, and checks the server's certificate.
        ca: PEM file with the authorities that are trusted; None trusts the system's.
        certificate, private_key: PEM files of the client's own certificate, for servers that ask for one.
    """

    api_key: str | None = None
    tls: bool = False
    ca: str | None = None
    certificate: str | None = None
    private_key: str | None = None

    def __post_init__(self) -> None:
        if self.api_key is not None and not _is_sendable(self.api_key):
            raise ValueError(
                "api_key has characters that no header can carry; it must be printable ASCII without spaces"
            )
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key belong together; give both or neither")
        for name in ("ca", "certificate"):
            if getattr(self, name) is not None and not self.tls:
                raise ValueError(
                    f"{name} is set and tls is off; it is for encrypted connections: use TLS, or leave it out"
                )

    def channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """Returns a blocking channel. Raises ValueError for files that cannot be used."""
        if self.tls:
            return grpc.secure_channel(address, self._grpc_credentials(), options=options)
        return grpc.insecure_channel(address, options=options)

    def async_channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
        """Returns a channel for asyncio. Raises ValueError for files that cannot be used."""
        if self.tls:
            return grpc.aio.secure_channel(address, self._grpc_credentials(), options=options)
        return grpc.aio.insecure_channel(address, options=options)

    def headers(self) -> dict[str, str]:
        """Returns the HTTP headers, or gRPC metadata, of every call."""
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}

    def ssl_context(self) -> ssl.SSLContext | None:
        """Returns the context of HTTPS connections; None without TLS. Raises ValueError for files that cannot be
        used.
        """
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.private_key)
        except OSError as error:  # ssl.SSLError is one
            named = ", ".join(repr(path) for path in (self.ca, self.certificate, self.private_key) if path)
            raise ValueError(f"the TLS files {named} cannot be used: {error}") from error
        return context

    def _grpc_credentials(self) -> grpc.ChannelCredentials:
        self.ssl_context()  # says what is wrong with the files, which gRPC does not
        return grpc.ssl_channel_credentials(*(_content(path) for path in (self.ca, self.private_key, self.certificate)))


def _is_sendable(key: str) -> bool:
    return bool(key) and key.isascii() and key.isprintable() and " " not in key


def _content(path: str | None) -> bytes | None:
    return None if path is None else pathlib.Path(path).read_bytes()
