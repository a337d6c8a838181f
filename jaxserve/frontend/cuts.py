"""Finds positions at which a text can be split so that the token ids of its pieces concatenate to those of the text.

A tokenizer passes a text through added tokens, a normalizer, a pre-tokenizer and a model. A position between two
characters is a safe cut when each step treats either side as it would without the other. Steps that are not known here
are never called safe: a text without safe cuts is encoded in one call.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import tokenizers

from jaxserve.frontend.pattern import Pattern, UnsupportedError, is_stable

_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's regular expression, by which the ByteLevel pre-tokenizer splits."""

_MAX_KNOWN = 64 * 1024
"""Maximum number of cached character pairs, some 10 MB; clients determine how many pairs there are."""


@dataclasses.dataclass(frozen=True)
class _Seam:
    """Represents a possible cut after one step. left, right: the characters beside it.

    agrees: so far, either side is split as in the whole text. apart: a word ends there in the whole text.
    """

    left: str
    right: str
    agrees: bool = True
    apart: bool = False


class Cuts:
    """Finds the safe cuts of one tokenizer. Thread-safe."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self._added = [(token, self._contents(token)) for token in backend.get_added_tokens_decoder().values()]
        self._added_pairs = frozenset(pair for _, contents in self._added for pair in _pairs(contents))
        self._greedy = [one for one in self._added if one[0].single_word or one[0].lstrip or one[0].rstrip]
        self._known: dict[str, bool] = {}
        self._dropped = ""
        try:
            self._normalizers = self._read_normalizers()
            self._splitters = [
                _splitter(spec) for spec in component_specs(backend.pre_tokenizer, "Sequence", "pretokenizers")
            ]
            self._possible = True
        except UnsupportedError:
            self._normalizers, self._splitters, self._possible = [], [], False

    def last(self, text: str, start: int, stop: int) -> int | None:
        """Returns the last safe cut in (start, stop]: the index of the character behind it. None without one."""
        return self._first_of(text, range(min(stop, len(text) - 1), start, -1))

    def first(self, text: str, start: int) -> int | None:
        """Returns the first safe cut after `start`. None without one."""
        return self._first_of(text, range(start + 1, len(text)))

    def rest(self, text: str, cut: int, stop: int) -> str:
        """Returns the text to encode for text[cut:stop], without a space that the tokenizer prepends to every text."""
        return text[cut + len(self._dropped) if cut else 0 : stop]

    def _first_of(self, text: str, places: range) -> int | None:
        if not self._possible:
            return None
        known = self._known
        for place in places:
            pair = text[place - 1 : place + 1]
            safe = known.get(pair)
            if safe is None:
                if len(known) >= _MAX_KNOWN:
                    known.clear()
                safe = known[pair] = self._allows(*pair)
            if safe and (not self._dropped or self._may_drop(text, place)):
                return place
        return None

    def _may_drop(self, text: str, place: int) -> bool:
        """Returns whether the text continues after the space at `place` as if it began there, and does not begin with
        it.
        """
        following = text[place + 1 : place + 2]
        if not following or following.isspace():
            return False
        return not any(
            text.startswith(token.content, place + 1) or text.endswith(token.content, 0, place)
            for token, _ in self._added
        )

    def _allows(self, left: str, right: str) -> bool:
        """Returns whether every text may be cut between these two characters."""
        if not self._added_allow(left, right):
            return False
        raw = _Seam(left, right)
        seam: _Seam | None = raw
        for normalize in self._normalizers:
            seam = normalize(seam.left, seam.right)
            if seam is None:
                return False
        if seam != raw and not self._added_allow(seam.left, seam.right):
            return False
        keeps = True
        for splitter in self._splitters:
            seam = splitter.split(seam)
            if seam is None:
                return False
            keeps = keeps and splitter.keeps
        if seam.agrees and seam.apart:
            return True
        if not self._is_plain_bpe:
            return False
        if not self._merges:  # every symbol is a token, however the text is split
            return (seam.agrees or keeps) and self._knows(seam.left, seam.right)
        if not seam.agrees or seam.left + seam.right in self._token_pairs:
            return False
        return self._knows(seam.left, seam.right) or has_all_byte_tokens(self._backend)

    def _added_allow(self, left: str, right: str) -> bool:
        """Returns whether no added token spans the cut, or takes characters on its other side."""
        if left + right in self._added_pairs:
            return False
        for token, contents in self._greedy:
            ends = any(content.endswith(left) for content in contents)
            starts = any(content.startswith(right) for content in contents)
            if token.single_word and (ends or starts):
                return False
            if token.rstrip and right.isspace() and (ends or left.isspace()):
                return False
            if token.lstrip and left.isspace() and (starts or right.isspace()):
                return False
        return True

    def _contents(self, token: tokenizers.AddedToken) -> Sequence[str]:
        """Returns the texts by which an added token is found."""
        normalizer = self._backend.normalizer
        if normalizer is None or not token.normalized:
            return (token.content,)
        return (token.content, normalizer.normalize_str(token.content))

    # ---- the model -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _vocab(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=False)

    @functools.cached_property
    def _merges(self) -> bool:
        """Returns whether the model may merge symbols: the first merge makes a token of two."""
        return self._backend.model.byte_fallback or any(len(token) == 2 for token in self._vocab)

    @functools.cached_property
    def _token_pairs(self) -> frozenset[str]:
        return frozenset(_pairs(token for token in self._vocab if len(token) > 1))

    @functools.cached_property
    def _is_plain_bpe(self) -> bool:
        """Returns whether merges alone decide, so that none spans two characters that are adjacent in no token."""
        model = self._backend.model
        return (
            isinstance(model, tokenizers.models.BPE)
            and not model.ignore_merges
            and not model.dropout
            and not model.continuing_subword_prefix
            and not model.end_of_word_suffix
            and not any(token.startswith("<0x") and len(token) > 6 for token in self._vocab)
        )

    def _knows(self, left: str, right: str) -> bool:
        """Returns whether the model has both symbols.

        Unknown symbols are dropped, or merge with their neighbors into one token.
        """
        return left in self._vocab and right in self._vocab

    # ---- the normalizer --------------------------------------------------------------------------------------------

    def _read_normalizers(self) -> list[Any]:
        specs = component_specs(self._backend.normalizer, "Sequence", "normalizers")
        if specs and specs[0]["type"] == "Prepend":
            # Every piece gets what the first one gets, so a piece is cut before a space that becomes just that.
            match specs:
                case [{"prepend": mark}, {"type": "Replace", "pattern": {"String": dropped}, "content": content}] if (
                    mark == content and len(dropped) == 1
                ):
                    self._dropped = dropped
                    return [lambda left, right: _Seam(left, mark) if right == dropped != left else None]
            raise UnsupportedError("Prepend")
        return [_normalizer(spec) for spec in specs]


def component_specs(component: Any, sequence: str, members: str) -> list[dict[str, Any]]:
    """Returns the settings of each step of a tokenizer's normalizer or pre-tokenizer, as in tokenizer.json."""
    if component is None:
        return []
    spec = json.loads(component.__getstate__())
    found: list[dict[str, Any]] = []
    waiting = [spec]
    while waiting:
        one = waiting.pop(0)
        if one["type"] == sequence:
            waiting = [*one[members], *waiting]
        else:
            found.append(one)
    return found


def has_all_byte_tokens(backend: tokenizers.Tokenizer) -> bool:
    """Returns whether the model has a token for every byte of characters that it does not know."""
    model = backend.model
    return bool(getattr(model, "byte_fallback", False)) and all(
        model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)
    )


def _pairs(texts: Any) -> Any:
    return (text[place : place + 2] for text in texts for place in range(len(text) - 1))


def _normalizer(spec: dict[str, Any]) -> Any:
    """Returns a function that normalizes the two characters beside a cut, or gives None where the cut is unsafe."""
    match spec:
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content} if pattern:
            return functools.partial(_replaced, pattern, content)
        case {"type": "NFC" | "NFD" | "NFKC" | "NFKD" as form}:
            return lambda left, right: _Seam(left, right) if _inert(form, left) and _inert(form, right) else None
        case {"type": "Lowercase"}:
            lower = tokenizers.normalizers.Lowercase().normalize_str
            return lambda left, right: _Seam(lower(left)[-1], lower(right)[0])
    raise UnsupportedError(spec["type"])


def _replaced(pattern: str, content: str, left: str, right: str) -> _Seam | None:
    if len(pattern) > 1:
        return None if left in pattern or right in pattern else _Seam(left, right)
    if not content and pattern in (left, right):
        return None
    return _Seam(content[-1] if left == pattern else left, content[0] if right == pattern else right)


def _inert(form: Any, character: str) -> bool:
    """Returns whether a character is neither changed by a normal form nor joined with a neighbor that is inert, too."""
    code = ord(character)
    jamo = 0x1100 <= code <= 0x11FF or 0xA960 <= code <= 0xA97F or 0xAC00 <= code <= 0xD7FF
    return (
        is_stable(character)
        and not jamo
        and not unicodedata.combining(character)
        and not unicodedata.category(character).startswith("M")
        and unicodedata.normalize(form, character) == character
    )


# ---- pre-tokenizers ----------------------------------------------------------------------------------------------


class _Splitter:
    """Models one step of a pre-tokenizer. keeps: it neither drops nor adds characters, wherever the text is cut."""

    keeps = True

    def split(self, seam: _Seam) -> _Seam | None:
        """Returns the seam after this step; None where the step makes the cut unsafe."""
        raise NotImplementedError


class _ByPattern(_Splitter):
    """Splits by a regular expression. clean: every match is a word of its own, or dropped."""

    def __init__(self, pattern: Pattern, *, clean: bool = True, keeps: bool = True):
        self._pattern = pattern
        self._clean = clean
        self.keeps = keeps

    def split(self, seam: _Seam) -> _Seam | None:
        if self._clean:
            agrees = not self._pattern.joins(seam.left, seam.right)
            apart = agrees and self._pattern.starts_with(seam.right)
        else:
            agrees = not self._pattern.touches(seam.left) and not self._pattern.touches(seam.right)
            apart = False
        return dataclasses.replace(seam, agrees=seam.agrees and agrees, apart=seam.apart or apart)


class _ByCharacter(_Splitter):
    """Splits by the kind of each character alone. apart: the kinds beside which a word ends."""

    def __init__(self, apart: Any, *, keeps: bool = True):
        self._apart = apart
        self.keeps = keeps

    def split(self, seam: _Seam) -> _Seam | None:
        if not (is_stable(seam.left) and is_stable(seam.right)):
            return None
        return dataclasses.replace(seam, apart=seam.apart or self._apart(seam.left, seam.right))


class _Bytes(_Splitter):
    """Models the ByteLevel pre-tokenizer: bytes become symbols."""

    def __init__(self, add_prefix_space: bool, use_regex: bool):
        self._add_prefix_space = add_prefix_space
        self._pattern = _ByPattern(Pattern(_BYTE_LEVEL)) if use_regex else None

    def split(self, seam: _Seam) -> _Seam | None:
        if self._add_prefix_space and seam.right != " ":
            return None
        after = seam if self._pattern is None else self._pattern.split(seam)
        assert after is not None
        return dataclasses.replace(after, left=byte_symbols(after.left)[-1], right=byte_symbols(after.right)[0])


_BYTES_ALONE = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def byte_symbols(character: str) -> str:
    """Returns the symbols of a character's bytes."""
    return "".join(piece for piece, _ in _BYTES_ALONE.pre_tokenize_str(character))


class _Marks(_Splitter):
    """Models the Metaspace pre-tokenizer: spaces become marks, before which words are split."""

    def __init__(self, mark: str, prepends: bool, split: bool):
        self._mark = mark
        self._prepends = prepends
        self._split = split

    def split(self, seam: _Seam) -> _Seam | None:
        left, right = (self._mark if character == " " else character for character in (seam.left, seam.right))
        if self._prepends and right != self._mark:
            return None
        return _Seam(left, right, seam.agrees, seam.apart or (self._split and right == self._mark))


def _splitter(spec: dict[str, Any]) -> _Splitter:
    """Builds the splitter of a step. Raises UnsupportedError for a kind that is not known here."""
    match spec:
        case {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": _}:
            found = Pattern(pattern["Regex"]) if "Regex" in pattern else Pattern.literal(pattern["String"])
            return _ByPattern(found, clean=behavior in ("Isolated", "Removed"), keeps=behavior != "Removed")
        case {"type": "ByteLevel", "add_prefix_space": prefix, "use_regex": use_regex}:
            return _Bytes(prefix, use_regex)
        case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme, "split": split}:
            return _Marks(mark, scheme != "never", split)
        case {"type": "Digits", "individual_digits": individual}:
            return _ByCharacter(
                lambda left, right: (
                    _is_number(left) or _is_number(right) if individual else _is_number(left) != _is_number(right)
                )
            )
        case {"type": "Punctuation", "behavior": "Isolated"}:
            return _ByCharacter(lambda left, right: _is_punctuation(left) or _is_punctuation(right))
        case {"type": "WhitespaceSplit"}:
            return _ByCharacter(_beside_space, keeps=False)
        case {"type": "BertPreTokenizer"}:
            return _ByCharacter(
                lambda left, right: _beside_space(left, right) or _is_punctuation(left) or _is_punctuation(right),
                keeps=False,
            )
        case {"type": "Whitespace"}:
            return _ByPattern(Pattern(r"\w+|[^\w\s]+"), keeps=False)
        case {"type": "CharDelimiterSplit", "delimiter": mark}:
            return _ByCharacter(lambda left, right: mark in (left, right), keeps=False)
    raise UnsupportedError(spec["type"])


def _is_number(character: str) -> bool:
    return unicodedata.category(character).startswith("N")


def _is_punctuation(character: str) -> bool:
    return (character.isascii() and character.isprintable() and not character.isalnum() and character != " ") or (
        unicodedata.category(character).startswith("P")
    )


def _beside_space(left: str, right: str) -> bool:
    return left in " \t\n\r" or right in " \t\n\r"
