"""Derives content keys of pages: a chain of keyed hashes over tenant, salt and tokens."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import secrets
from array import array
from collections.abc import Sequence

from jaxserve.config.settings import CacheConfig

KEY_BYTES = 16
"""Length of a content key, in bytes."""

MIN_SECRET_BYTES, MAX_SECRET_BYTES = 16, hashlib.blake2b.MAX_KEY_SIZE


def read_secret(path: str) -> bytes:
    """Reads the secret of content keys from a file; raises ValueError where it cannot be read, is too short to be one,
    or too long."""
    try:
        with open(path, "rb") as file:
            secret = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise ValueError(
            f"prefix_caching_secret_file is {path!r}, which cannot be read: {error.strerror}; write "
            f"{MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} random bytes to it, or unset it"
        ) from error
    if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
        size = f"more than {MAX_SECRET_BYTES}" if len(secret) > MAX_SECRET_BYTES else str(len(secret))
        raise ValueError(
            f"prefix_caching_secret_file is {path!r}, which has {size} bytes; a secret has {MIN_SECRET_BYTES} to "
            f"{MAX_SECRET_BYTES} random bytes"
        )
    return secret


def cache_secret(config: CacheConfig) -> bytes | None:
    """Returns the configured secret of content keys, or that of the directory of the cache, which its first use draws;
    None where each process draws its own."""
    if config.prefix_caching_secret_file is not None:
        return read_secret(config.prefix_caching_secret_file)
    if config.disk_cache_dir is None:
        return None
    path = pathlib.Path(config.disk_cache_dir).expanduser() / "secret"
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_name(f"secret.{secrets.token_hex(8)}")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(MAX_SECRET_BYTES))
        try:
            os.link(partial, path)  # whoever is first; another process may be starting
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    return read_secret(str(path))


class ContentKeys:
    """Makes the content keys of one process, or of several that share a secret.

    The keys and values in a page depend on every token before it, so a page's key covers them all: it hashes the key
    of the page before it and its own tokens, and the first link hashes model, tenant and salt. The same tokens at
    another position, after another prefix, of another tenant or under another salt therefore have another key.

    Keys are 128 bits of BLAKE2b (RFC 7693) under a secret, so that a client can neither predict nor construct a
    collision. Equal keys are taken as equal content without comparing tokens: among 2^40 pages two different ones
    share a key with a probability of about 2^-49.
    """

    def __init__(self, secret: bytes | None = None, model: str = ""):
        """Creates the keys.

        Args:
            secret: 1 to MAX_SECRET_BYTES bytes; None draws one, which no other process has.
            model: names what computes the pages, where processes of several models share a secret.
        """
        self._secret = secrets.token_bytes(MAX_SECRET_BYTES) if secret is None else secret
        self._model = model
        self.root = functools.lru_cache(maxsize=1024)(self._root)
        self._page = hashlib.blake2b(digest_size=KEY_BYTES, key=self._secret, person=b"page")  # to begin with

    def _root(self, tenant: str, salt: str) -> bytes:
        """Returns the key that the first page of every sequence of a tenant under `salt` is linked to."""
        # Lengths in front keep ("a", "bc") and ("ab", "c") apart. `person` separates the two uses: no names, whatever
        # their bytes, can equal the key of a page.
        names = [name.encode("utf-8", "surrogatepass") for name in (self._model, tenant, salt)]
        text = b"".join(len(name).to_bytes(8, "little") + name for name in names)
        return hashlib.blake2b(text, digest_size=KEY_BYTES, key=self._secret, person=b"root").digest()

    def link(self, previous: bytes, tokens: Sequence[int]) -> bytes:
        """Returns the key of a full page of `tokens` that follows the page (or root) with the key `previous`."""
        return self.links(previous, tokens, len(tokens))[0]

    def links(self, previous: bytes, tokens: Sequence[int], page_size: int) -> list[bytes]:
        """Returns the keys of full pages of `tokens`, one after the other, of which the first follows `previous`."""
        content, size = array("i", tokens).tobytes(), page_size * array("i").itemsize
        begin, keys = self._page.copy, []
        for place in range(0, len(content), size):
            page = begin()
            page.update(previous + content[place : place + size])
            previous = page.digest()
            keys.append(previous)
        return keys
