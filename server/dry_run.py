"""Checks everything that a start checks, without serving: `python -m jaxserve.server --dry-run`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from jaxserve.config.access_config import exposure_warnings
from jaxserve.config.changed import changed_settings
from jaxserve.config.settings import ServerConfig
from jaxserve.frontend.tokenizer import load_tokenizer
from jaxserve.serving.access.api_keys import ApiKeys
from jaxserve.serving.access.opened import open_access
from jaxserve.serving.bind import address_of, check_free
from jaxserve.serving.grpc_port.connections import connection_limit


def dry_run(config: ServerConfig) -> Iterator[str]:
    """Yields a line for each thing found to be right, the cheapest first.

    Raises ValueError, OSError or MemoryError, in one line, for the first thing that would make the start fail.
    """
    yield f"configuration: {len(list(changed_settings(config)))} settings differ from their defaults"
    access = open_access(config.access)
    if isinstance(access.callers, ApiKeys):
        yield f"keys: {access.callers.num_keys} in {config.access.api_keys}"
    else:
        yield "keys: none, everybody who reaches the ports may call"
    if access.tls is None:
        yield "TLS: off"
    else:
        mutual = ", and clients must present certificates" if config.access.tls.client_ca is not None else ""
        yield f"TLS: {', '.join(access.tls.files)} fit together{mutual}"
    for line in exposure_warnings(config.access, config.host):
        yield f"warning: {line}"
    for name, port in (("gRPC", config.port), ("HTTP", config.http_port)):
        if port == 0 and name == "HTTP":
            continue
        check_free(config.host, port)
        yield f"{name} port: {address_of(config.host, port)} can be bound" if port else f"{name} port: any free one"
    yield f"open files: enough for {connection_limit(config.limits.max_connections):,} connections"
    tokenizer = load_tokenizer(config.engine)
    if tokenizer is None:
        yield "tokenizer: none"
    else:
        yield f"tokenizer: loaded, {'with' if tokenizer.has_chat_template else 'without'} a chat template"
    # Imported late: it brings jax, which takes seconds, and what is checked above should be known before.
    yield from importlib.import_module("jaxserve.runner.preflight").check_engine(config.engine)
