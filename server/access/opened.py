"""Opens what the settings of access name: the file of keys and the certificates."""

from __future__ import annotations

import dataclasses

from jaxserve.config.access_config import AccessConfig
from jaxserve.serving.access.api_keys import ApiKeys
from jaxserve.serving.access.callers import Anybody, Callers
from jaxserve.serving.access.refresh import Reloadable
from jaxserve.serving.access.tls import ServerTls


@dataclasses.dataclass(frozen=True)
class Access:
    """Holds who may call, and how connections are protected.

    tls: None is no TLS. reloadable: what follows changes of its files.
    """

    callers: Callers
    tls: ServerTls | None
    reloadable: tuple[Reloadable, ...]


def open_access(config: AccessConfig) -> Access:
    """Reads the files.

    Raises:
        KeyFileError: the file of keys cannot be used.
        TlsError: a certificate cannot be used.
    """
    keys = None if config.api_keys is None else ApiKeys(config.api_keys)
    tls = ServerTls(config.tls) if config.tls.enabled else None
    return Access(keys or Anybody(), tls, tuple(holder for holder in (keys, tls) if holder is not None))
