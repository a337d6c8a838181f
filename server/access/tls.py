"""Loads certificates for both ports, and takes over changes of their files for new connections."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import ssl
from typing import Any

import grpc

from jaxserve.config.access_config import TlsConfig
from jaxserve.programs.aot.trust import UntrustedError, read_trusted

_log = logging.getLogger("jaxserve.server")


class TlsError(ValueError):
    """A certificate cannot be used; the text is one line that names the setting, the file and the reason."""


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """Holds certificates that fit together: a context for HTTP, and their PEM texts for gRPC."""

    context: ssl.SSLContext
    certificate: bytes
    private_key: bytes
    client_ca: bytes | None

    def for_grpc(self) -> Any:
        pairs = [(self.private_key, self.certificate)]
        return grpc.ssl_server_certificate_configuration(pairs, self.client_ca)


class ServerTls:
    """Protects the ports of one server.

    config: names the files; TLS must be enabled. Raises TlsError when they cannot be used.
    """

    def __init__(self, config: TlsConfig):
        self._config = config
        self._loaded = _load(config)
        self._taken_by_grpc = self._loaded
        self._context = _context(config)
        self._context.sni_callback = self._choose  # called for every client, whether or not it names a server

    @property
    def files(self) -> tuple[str, ...]:
        """Files whose changes `reload` takes over."""
        config = self._config
        return tuple(path for path in (config.certificate, config.private_key, config.client_ca) if path is not None)

    def reload(self) -> None:
        """Reads the files again, for new connections. Files that cannot be used change nothing, and the log says so."""
        try:
            loaded = _load(self._config)
        except TlsError as error:
            _log.error("TLS stays as it was: %s", error)
            return
        self._loaded = loaded
        _log.info("TLS certificates read again from %s", ", ".join(self.files))

    def ssl_context(self) -> ssl.SSLContext:
        """Returns the context of the HTTP port, which always uses the latest certificates."""
        return self._context

    def grpc_credentials(self) -> Any:
        """Returns the credentials of the gRPC port, which always use the latest certificates."""
        self._taken_by_grpc = self._loaded
        return grpc.dynamic_ssl_server_credentials(
            self._loaded.for_grpc(), self._changed_for_grpc, self._config.client_ca is not None
        )

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._loaded.context

    def _changed_for_grpc(self) -> Any:
        """Returns the certificates for a new connection, or None where those that gRPC has are the latest."""
        loaded = self._loaded
        if loaded is self._taken_by_grpc:
            return None
        self._taken_by_grpc = loaded
        return loaded.for_grpc()


def _context(config: TlsConfig) -> ssl.SSLContext:
    """Returns a context with the certificates that the files hold now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    assert config.certificate is not None  # TLS is enabled
    # A key with a passphrase is refused: it would be asked for at the terminal.
    context.load_cert_chain(config.certificate, config.private_key, password=_no_passphrase)
    if config.client_ca is not None:
        context.load_verify_locations(config.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _no_passphrase() -> str:
    raise ValueError("it has a passphrase, which nobody can type; store the key without one")


def _load(config: TlsConfig) -> _Loaded:
    """Loads the files, all of them or none. Raises TlsError."""
    data = {}
    for field in dataclasses.fields(config):
        path = getattr(config, field.name)
        if path is None:
            data[field.name] = None
            continue
        try:
            data[field.name] = read_trusted(pathlib.Path(path), secret=field.name == "private_key")
        except UntrustedError as error:
            raise TlsError(f"{field.name} {path} {error}") from error
        except OSError as error:
            raise TlsError(f"{field.name} {path} cannot be read: {error.strerror}") from error
    try:
        context = _context(config)
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        named = f"certificate {config.certificate} and private_key {config.private_key}"
        if config.client_ca is not None:
            named += f", or client_ca {config.client_ca},"
        raise TlsError(f"{named} cannot be used: {' '.join(reason.split())}; give PEM files that fit") from error
    return _Loaded(context, data["certificate"], data["private_key"], data["client_ca"])
