"""Derives content keys of pages: a chain of keyed hashes over salt and tokens."""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections.abc import Sequence

KEY_BYTES = 16


class ContentKeys:
    """Makes the content keys of one process.

    The keys and values in a page depend on every token before it, so a page's key covers them all: it hashes the key
    of the page before it and its own tokens, and the first link hashes the salt. The same tokens at another position,
    after another prefix or under another salt therefore have another key.

    Keys are 128 bits of BLAKE2b (RFC 7693) under a random key drawn per process, so that a client can neither predict
    nor construct a collision. Equal keys are taken as equal content without comparing tokens: among 2^40 pages two
    different ones share a key with a probability of about 2^-49.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(hashlib.blake2b.MAX_KEY_SIZE)

    def root(self, salt: str) -> bytes:
        """Returns the key that the first page of every sequence under `salt` is linked to."""
        # `person` separates the two uses: no salt, whatever its bytes, can equal the key of a page.
        text = salt.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, digest_size=KEY_BYTES, key=self._secret, person=b"salt").digest()

    def link(self, previous: bytes, tokens: Sequence[int]) -> bytes:
        """Returns the key of a full page of `tokens` that follows the page (or root) with the key `previous`."""
        text = previous + array("q", tokens).tobytes()
        return hashlib.blake2b(text, digest_size=KEY_BYTES, key=self._secret, person=b"page").digest()
