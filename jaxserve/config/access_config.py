"""Configures who may call the server and how connections are protected, as frozen dataclasses that validate themselves.

Standard library only; docs/security.md says how each setting is applied.
"""

from __future__ import annotations

import dataclasses
import ipaddress

LOOPBACK_NAME = "localhost"


@dataclasses.dataclass(frozen=True)
class TlsConfig:
    """Configures TLS for both ports.

    certificate, private_key: PEM files of the server's certificate (with its chain) and its key; both or neither,
    which is no TLS. client_ca: PEM file of the authorities that client certificates are checked against; given, every
    client of either port must present one (mutual TLS). The files are read again when they change and at SIGHUP.
    """

    certificate: str | None = None
    private_key: str | None = None
    client_ca: str | None = None

    def __post_init__(self) -> None:
        for name, other in (("certificate", "private_key"), ("private_key", "certificate")):
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise ValueError(f"{name} is {getattr(self, name)!r} and {other} is not set; TLS needs both")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError(
                f"client_ca is {self.client_ca!r} and certificate is not set; client certificates need TLS: give "
                "certificate and private_key"
            )

    @property
    def enabled(self) -> bool:
        return self.certificate is not None


@dataclasses.dataclass(frozen=True)
class AccessConfig:
    """Configures who may call.

    api_keys: file of API keys, a line each, as `python -m jaxserve.keys` writes them; given, every call but health
    checks needs a key. None lets everybody call who reaches the ports. The file must be this user's alone; it is read
    again when it changes and at SIGHUP.
    tls: TLS and client certificates. reflection: gRPC clients may ask which services there are.
    web_origins: origins (https://HOST) of pages whose calls are taken in a browser, besides pages of this server.
    log_prompts: each request's prompt is logged, at info; off, no log line holds what clients sent.
    kv_events: gateways may subscribe to what happens to pages of the prefix cache (SubscribeKvEvents), which names the
    token ids of prompts and answers; where there are API keys, with one that was made with --kv-events.
    """

    api_keys: str | None = None
    tls: TlsConfig = TlsConfig()
    reflection: bool = True
    web_origins: tuple[str, ...] = ()
    log_prompts: bool = False
    kv_events: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "web_origins", tuple(self.web_origins))
        if not isinstance(self.kv_events, bool):
            raise ValueError(f"kv_events is {self.kv_events!r}; it must be True or False")
        for origin in self.web_origins:
            if not isinstance(origin, str) or not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ValueError(f"web_origins has {origin!r}; an origin is https://HOST or https://HOST:PORT")


def is_loopback(host: str) -> bool:
    """Tells whether only this machine reaches a port that listens on `host`."""
    if host == LOOPBACK_NAME:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, whose addresses may be any
        return False


def exposure_warnings(config: AccessConfig, host: str) -> list[str]:
    """Returns a line for each way in which a server that listens on `host` is open to those who reach it."""
    if is_loopback(host):
        return []
    found = []
    if config.api_keys is None and config.tls.client_ca is None:
        found.append(
            f"host is {host} and api_keys is not set: everybody who reaches the ports may use, stop and inspect "
            "everything; set AccessConfig.api_keys (python -m jaxserve.keys makes one), or host 127.0.0.1"
        )
    if config.kv_events and config.api_keys is None and config.tls.client_ca is None:
        found.append(
            f"host is {host}, kv_events is True and api_keys is not set: everybody who reaches the gRPC port may read "
            "the token ids of all prompts and answers; set AccessConfig.api_keys, or kv_events False"
        )
    if not config.tls.enabled:
        what = "prompts and answers" if config.api_keys is None else "keys, prompts and answers"
        found.append(
            f"host is {host} and TLS is off: {what} cross the network in clear text; set TlsConfig.certificate and "
            "private_key, or let a proxy on this machine end TLS"
        )
    return found
