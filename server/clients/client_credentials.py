"""Holds what a client shows a server, and how it recognizes the server."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import ssl

import grpc

KEY_VARIABLE = "JAXSERVE_API_KEY"
"""Environment variable of the API key, for clients that are given none."""


@dataclasses.dataclass(frozen=True)
class Credentials:
    """Configures a client's API key and TLS.

    api_key: None takes that of the environment variable JAXSERVE_API_KEY, "" none.
    tls: connects by TLS, and checks the server against the system's authorities; given any file below, it does so too.
    ca: PEM file of the authorities that the server is checked against instead.
    certificate, private_key: PEM files with which the client identifies itself; both or neither.
    """

    api_key: str | None = None
    tls: bool = False
    ca: str | None = None
    certificate: str | None = None
    private_key: str | None = None

    def __post_init__(self) -> None:
        for name, other in (("certificate", "private_key"), ("private_key", "certificate")):
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise ValueError(f"{name} is {getattr(self, name)!r} and {other} is not set; give both")
        if not self.key().isascii() or not self.key().isprintable():  # never shown: it may be right but for a line end
            raise ValueError("api_key has characters that no key has; copy it again, without the end of its line")

    @property
    def uses_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.tls or self.ca is not None or self.certificate is not None

    def key(self) -> str:
        """Returns the API key; "" is none."""
        return os.environ.get(KEY_VARIABLE, "") if self.api_key is None else self.api_key

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the metadata of every call."""
        return (("authorization", f"Bearer {key}"),) if (key := self.key()) else ()

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """Returns gRPC's credentials of a channel; None is clear text. Raises OSError where a file cannot be read."""
        if not self.uses_tls:
            return None
        ca, key, certificate = (
            None if path is None else pathlib.Path(path).read_bytes()
            for path in (self.ca, self.private_key, self.certificate)
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)

    def ssl_context(self) -> ssl.SSLContext | None:
        """Returns the context of HTTPS connections; None is clear text. Raises ValueError naming files that cannot be
        used.
        """
        if not self.uses_tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.private_key)
        except OSError as error:  # ssl.SSLError is one
            named = ", ".join(repr(path) for path in (self.ca, self.certificate, self.private_key) if path)
            raise ValueError(f"the TLS files {named} cannot be used: {error}") from error
        return context
