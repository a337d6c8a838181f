"""Identifies callers by API keys, and takes over changes of their file while serving."""

from __future__ import annotations

import base64
import binascii
import logging
import time
from collections.abc import Callable

from jaxserve.serving.access.callers import Caller
from jaxserve.serving.access.key_file import Key, KeyFileError, find_key, read_keys
from jaxserve.serving.problem import UnauthenticatedError

_log = logging.getLogger("jaxserve.server")

_MAX_KEY_BYTES = 512


class ApiKeys:
    """Implements Callers by a file of API keys.

    Args:
        path: of the file.
        clock: seconds as `time.time` gives them, which expiry dates are compared with.

    Raises:
        KeyFileError: the file cannot be used.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.time):
        self._path = path
        self._clock = clock
        self._keys: tuple[Key, ...] = read_keys(path)

    @property
    def num_keys(self) -> int:
        return len(self._keys)

    def identify(self, credential: str | None) -> Caller:
        """Returns the caller of a bearer key, or of the password of Basic credentials, which browsers send.

        Raises UnauthenticatedError.
        """
        given = key_of(credential)
        key = find_key(self._keys, given)
        if key is None:
            raise UnauthenticatedError(
                "the API key is missing; send it as authorization: Bearer KEY"
                if not given
                else "the API key is wrong; send one that this server knows as authorization: Bearer KEY"
            )
        if key.expires is not None and key.expires <= self._clock():
            raise UnauthenticatedError("the API key has expired; ask for another one")
        return key.caller

    @property
    def files(self) -> tuple[str, ...]:
        """Files whose changes `reload` takes over."""
        return (self._path,)

    def reload(self) -> None:
        """Reads the file again. A file that cannot be used changes nothing, and the log says so."""
        try:
            keys = read_keys(self._path)
        except KeyFileError as error:
            _log.error("the API keys stay as they were: %s", error)
            return
        self._keys = keys
        _log.info("%d API keys read again from %s", len(keys), self._path)


def key_of(credential: str | None) -> bytes:
    """Returns the key in the value of an `authorization` header, or b"" where there is none."""
    scheme, _, value = (credential or "").strip().partition(" ")
    data = value.strip().encode("utf-8", "surrogateescape")
    match scheme.lower():
        case "bearer":
            key = data
        case "basic":
            try:
                key = base64.b64decode(data, validate=True).partition(b":")[2]
            except binascii.Error:
                key = b""
        case _:
            key = b""
    return key[: _MAX_KEY_BYTES + 1]
