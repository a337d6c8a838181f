"""The fewest tokens that a text can have by its size: what can never fit is refused before it is encoded."""

from __future__ import annotations

from typing import Any

import tokenizers

from jaxserve.frontend.cuts import component_specs, has_all_byte_tokens

_GROWING = ("Prepend", "ByteLevel")
"""Normalizers that never shorten a text."""
_KEEPING = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts")
"""Pre-tokenizers that never drop a character."""


def bytes_per_token(backend: tokenizers.Tokenizer) -> int | None:
    """The most bytes of a text, in UTF-8, that one of its tokens can stand for; None where there is no bound.

    There is none where a text can lose characters before the model sees it (normal forms, stripping, dropped
    whitespace, added tokens that take the whitespace beside them), and none where the model drops what it does not
    know or makes one token of any amount of it.
    """
    byte_level = False
    for spec in component_specs(backend.normalizer, "Sequence", "normalizers"):
        byte_level = byte_level or spec["type"] == "ByteLevel"
        if not _never_shortens(spec):
            return None
    for spec in component_specs(backend.pre_tokenizer, "Sequence", "pretokenizers"):
        byte_level = byte_level or spec["type"] == "ByteLevel"
        if not (spec["type"] in _KEEPING or (spec["type"] in ("Split", "Punctuation") and _keeps(spec["behavior"]))):
            return None
    added = list(backend.get_added_tokens_decoder().values())
    if any(token.lstrip or token.rstrip for token in added):
        return None
    vocab = backend.get_vocab(with_added_tokens=False)
    if not _unknown_is_bounded(backend, vocab, byte_level):
        return None
    # The symbols of a byte-level vocabulary are characters that stand for a byte each.
    longest = max((len(token) if byte_level else len(token.encode()) for token in vocab), default=1)
    contents = [token.content for token in added]
    if backend.normalizer is not None:
        contents += [backend.normalizer.normalize_str(token.content) for token in added if token.normalized]
    return max(longest, 4, *(len(content.encode()) for content in contents))


def _never_shortens(spec: dict[str, Any]) -> bool:
    match spec:
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
            return len(content.encode()) >= len(pattern.encode())
    return spec["type"] in _GROWING


def _keeps(behavior: str) -> bool:
    return behavior in ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")


def _unknown_is_bounded(backend: tokenizers.Tokenizer, vocab: dict[str, int], byte_level: bool) -> bool:
    """Whether every character that the model does not know costs tokens: at least one, for four bytes at most."""
    model = backend.model
    if isinstance(model, tokenizers.models.BPE):
        if byte_level and all(symbol in vocab for symbol in tokenizers.pre_tokenizers.ByteLevel.alphabet()):
            return not model.continuing_subword_prefix and not model.end_of_word_suffix
        if has_all_byte_tokens(backend):
            return True
        return model.unk_token is not None and not model.fuse_unk
    return isinstance(model, tokenizers.models.Unigram) and has_all_byte_tokens(backend)
