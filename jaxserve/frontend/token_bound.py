"""Bounds the number of tokens of a text from below by its size, to refuse what can never fit before it is encoded."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import numpy as np
import tokenizers

from jaxserve.frontend.cuts import byte_symbols, component_specs, has_all_byte_tokens

_GROWING = ("Prepend", "ByteLevel")
"""Normalizers that never shorten a text."""
_SHRINKING = {"NFC": 4, "NFD": 3, "NFKC": 4, "NFKD": 4, "Lowercase": 3}
"""Maximum bytes that each of these normalizers reduces to one: of three characters of 7 bytes, U+1FBE U+0308 U+0301,
NFC makes U+0390 of 2; NFKC makes letters of mathematical ones."""
_KEEPING = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts")
"""Pre-tokenizers that never drop a character."""

_WHOLE = 2**32
"""Fixed-point representation of one token, shared among its bytes; rounded down, the shares never exceed it."""
_BLOCK = 64 * 1024


class TokenBound:
    """Computes lower bounds of the tokens of texts, from the longest tokens of one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._longest: int | None = None
        self._shares: np.ndarray | None = None
        self._only_ascii = False
        found = _check_steps(backend)
        if found is None:
            return
        byte_level, shrink = found
        texts = _token_texts(backend, byte_level)
        longest = max(map(len, texts), default=1)
        self._longest = longest * shrink
        # Other normalizers may leave no byte of a text as it is, and normal forms leave ASCII.
        kinds = {spec["type"] for spec in component_specs(backend.normalizer, "Sequence", "normalizers")}
        if kinds <= {"NFC", "NFD", "NFKC", "NFKD"}:
            self._only_ascii = bool(kinds)
            self._shares = _shares(texts, longest)

    @property
    def bytes_per_token(self) -> int | None:
        """Maximum bytes of UTF-8 text per token; None where there is no bound."""
        return self._longest

    def of_size(self, num_bytes: int) -> int:
        """Returns the fewest tokens that a text of at least `num_bytes` bytes can have; 0 where nothing is known."""
        return -(-num_bytes // self._longest) if self._longest else 0

    def of_text(self, data: bytes) -> int:
        """Returns the fewest tokens of a UTF-8 text: letters are not in the longest tokens, which are lines and spaces.

        A token gives each of its bytes an equal share of one. No byte has less than that of the longest token that it
        is in, so the sum over a text is at most the number of its tokens.
        """
        if self._shares is None or (self._only_ascii and not data.isascii()):
            return self.of_size(len(data))
        counts = np.zeros(256, np.int64)
        for start in range(0, len(data), _BLOCK):
            counts += np.bincount(np.frombuffer(data[start : start + _BLOCK], np.uint8), minlength=256)
        return -(-int(counts @ self._shares) // _WHOLE)


def _check_steps(backend: tokenizers.Tokenizer) -> tuple[bool, int] | None:
    """Returns whether tokens are of bytes, and the maximum number of bytes that the normalizer reduces to one.

    There is no bound, None, where a text can lose characters before the model sees it (stripping, dropped whitespace,
    added tokens that take the whitespace beside them), or where the model drops unknown characters or makes one token
    of any number of them.
    """
    byte_level, shrink = False, 1
    for spec in component_specs(backend.normalizer, "Sequence", "normalizers"):
        if spec["type"] in _SHRINKING and not byte_level:  # behind ByteLevel characters stand for bytes
            shrink *= _SHRINKING[spec["type"]]
        elif not _never_shortens(spec):
            return None
        byte_level = byte_level or spec["type"] == "ByteLevel"
    for spec in component_specs(backend.pre_tokenizer, "Sequence", "pretokenizers"):
        byte_level = byte_level or spec["type"] == "ByteLevel"
        if not (spec["type"] in _KEEPING or (spec["type"] in ("Split", "Punctuation") and _keeps(spec["behavior"]))):
            return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None
    return (byte_level, shrink) if _unknown_is_bounded(backend, byte_level) else None


def _token_texts(backend: tokenizers.Tokenizer, byte_level: bool) -> list[bytes]:
    """Returns upper bounds of the texts of tokens, as bytes. A character that is unknown takes four at most."""
    vocab = backend.get_vocab(with_added_tokens=False)
    if byte_level:  # its symbols are characters that stand for a byte each
        table = _symbol_bytes()
        texts = [bytes(map(table.get, token, repeat(0))) for token in vocab]
    else:
        texts = [b"four", *(token.encode() for token in vocab)]
    for token in backend.get_added_tokens_decoder().values():
        texts.append(token.content.encode())
        if token.normalized and backend.normalizer is not None:
            texts.append(backend.normalizer.normalize_str(token.content).encode())
    return texts


def _shares(texts: list[bytes], longest: int) -> np.ndarray:
    """Returns for each byte its minimum share of a token, in parts of _WHOLE: [256] int64."""
    shares = np.full(256, _WHOLE // longest, np.int64)
    missing = set(range(256))
    for text in sorted(texts, key=len, reverse=True):
        if found := missing.intersection(text):
            shares[list(found)] = _WHOLE // len(text)
            missing -= found
    return shares


def _symbol_bytes() -> dict[str, int]:
    """Returns the byte of each symbol of a byte-level vocabulary, for bytes that occur in UTF-8."""
    codes = [*range(0xC0), *(lead << 6 for lead in range(2, 0x20)), 0x800, *(lead << 12 for lead in range(1, 0x10))]
    table: dict[str, int] = {}
    for code in (*codes, 0x10000, *(lead << 18 for lead in range(1, 5))):
        table.update(zip(byte_symbols(chr(code)), chr(code).encode(), strict=True))
    return table


def _never_shortens(spec: dict[str, Any]) -> bool:
    match spec:
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
            return len(content.encode()) >= len(pattern.encode())
    return spec["type"] in _GROWING


def _keeps(behavior: str) -> bool:
    return behavior in ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")


def _unknown_is_bounded(backend: tokenizers.Tokenizer, byte_level: bool) -> bool:
    """Returns whether every unknown character costs tokens: at least one, for four bytes at most."""
    model = backend.model
    if isinstance(model, tokenizers.models.BPE):
        if byte_level and all(
            model.token_to_id(symbol) is not None for symbol in tokenizers.pre_tokenizers.ByteLevel.alphabet()
        ):
            return not model.continuing_subword_prefix and not model.end_of_word_suffix
        if has_all_byte_tokens(backend):
            return True
        return model.unk_token is not None and not model.fuse_unk
    return isinstance(model, tokenizers.models.Unigram) and has_all_byte_tokens(backend)
