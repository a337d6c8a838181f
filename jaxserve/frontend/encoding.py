"""Encodes texts in pieces of bounded size, with exactly the token ids of the whole text.

One call for a whole text of 4 MB takes seconds and a gigabyte. A piece takes milliseconds and a few megabytes; other
work runs between two pieces, and encoding stops once a text turns out to be too long.
"""

from __future__ import annotations

from collections.abc import Iterator

import tokenizers

from jaxserve.config.id_checks import IDS_PER_PART
from jaxserve.frontend.cuts import Cuts
from jaxserve.frontend.token_bound import TokenBound
from jaxserve.frontend.tokenizer_process import TokenizerProcess

PIECE_CHARACTERS = 64 * 1024
"""Maximum characters that are encoded in one call, where the text can be cut: 256 kB at most."""

SHORT_TEXT = 4096
"""Text length in characters up to which holding the interpreter lock costs other threads less than releasing it."""


class Encoder:
    """Encodes texts to token ids.

    Thread-safe. piece_characters: see PIECE_CHARACTERS. bound: the fewest tokens of a text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, piece_characters: int = PIECE_CHARACTERS):
        self._backend = backend
        self._piece_characters = piece_characters
        self._cuts = Cuts(backend)
        self.bound = TokenBound(backend)
        self._around = _around(backend)

    def pieces(self, text: str) -> Iterator[tuple[str, int]]:
        """Yields the pieces to encode in place of the whole text, each with the number of characters that follow it.

        A piece is longer than piece_characters only where there is no safe cut.
        """
        start = 0
        while self._around is not None and len(text) - start > self._piece_characters:
            cut = self._cuts.last(text, start, start + self._piece_characters)
            if cut is None:
                cut = self._cuts.first(text, start + self._piece_characters)
            if cut is None:
                break
            yield self._cuts.rest(text, start, cut), len(text) - cut
            start = cut
        yield self._cuts.rest(text, start, len(text)), 0

    def parts(self, text: str, add_special_tokens: bool, apart: TokenizerProcess | None = None) -> Iterator[list[int]]:
        """Yields the token ids of one text or piece, in parts of at most IDS_PER_PART. apart: encodes it, unless it
        fails.
        """
        found = None if apart is None else apart.encode(text, add_special_tokens)
        if found is not None:
            yield from found
            return
        token_ids = self.encode(text, add_special_tokens)
        for start in range(0, len(token_ids), IDS_PER_PART):
            yield token_ids[start : start + IDS_PER_PART]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Returns the token ids of one text or piece; with add_special_tokens, with the special tokens around a
        text.
        """
        if len(text) <= SHORT_TEXT:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        # Unlike `encode`, it lets go of the interpreter lock, and it computes no offsets.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """Returns the special tokens before and after every text. Only for a text of several pieces."""
        assert self._around is not None
        return self._around


def _around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]] | None:
    """Returns the special tokens put before and after a text, or None where they cannot be determined."""
    probe = backend.encode("a", add_special_tokens=True)
    plain = backend.encode("a", add_special_tokens=False).ids
    inner = [place for place, special in enumerate(probe.special_tokens_mask) if not special]
    if not inner or probe.ids[inner[0] : inner[-1] + 1] != plain:
        return None
    return probe.ids[: inner[0]], probe.ids[inner[-1] + 1 :]
