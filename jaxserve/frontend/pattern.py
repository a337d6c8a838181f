"""Determines which characters the regular expressions of pre-tokenizers can match in a row, without running them.

A text may be cut between two characters where no match can take both in a row: then nothing before the cut is matched
differently because of what follows, and nothing behind it because of what came before. The follow relation of
Glushkov's automaton (The abstract theory of automata, 1961) gives the characters that a match can take in a row.
Look-aheads count as characters taken. The analysis is conservative: in unclear cases a text is not cut.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Callable

_QUANTIFIER = re.compile(r"(\*|\+|\?|\{(\d*)(,?)(\d*)\})([?+]?)")
_GROUP = re.compile(r"\?(:|i:|-i:|>|=|!|<[A-Za-z_]\w*>)")
_CATEGORY = re.compile(r"\{(\^?)(\w+)\}")
_CONTROL = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "a": "\a", "e": "\x1b", "0": "\0"}
_SPACES = " \t\n\r\f"


class UnsupportedError(ValueError):
    """A regular expression has a construct that is not analyzed here."""


def is_stable(character: str) -> bool:
    """Returns whether the character's category is the same in all versions of Unicode that a library may use."""
    return (
        character.isascii()
        or "Cn" != unicodedata.ucd_3_2_0.category(character) == unicodedata.category(character) != "Co"
    )


@dataclasses.dataclass(frozen=True)
class _Class:
    """Represents the characters that one position of an expression takes: `may` errs towards yes, `must` towards no."""

    may: Callable[[str], bool]
    must: Callable[[str], bool]

    def negated(self) -> _Class:
        return _Class(lambda c: not self.must(c), lambda c: not self.may(c))


@dataclasses.dataclass(frozen=True)
class _Part:
    """Represents a part of an expression, by the numbers of its positions.

    nullable: it may match nothing. skippable: it can always match nothing, whatever follows. alone: the positions whose
    character, by itself, it can always match, whatever follows.
    """

    nullable: bool
    skippable: bool
    first: frozenset[int] = frozenset()
    last: frozenset[int] = frozenset()
    alone: frozenset[int] = frozenset()


class Pattern:
    """Analyzes a regular expression in the syntax of Oniguruma, as in tokenizer.json.

    Raises UnsupportedError for constructs that are not analyzed: look-behind, anchors, back references, nested classes,
    options in the middle, and expressions that match the empty text.
    """

    def __init__(self, expression: str):
        self._source = expression
        self._place = 0
        self._classes: list[_Class] = []
        self._follow: set[tuple[int, int]] = set()
        self._ignore_case = False
        whole = self._alternatives()
        if self._place < len(expression):
            raise UnsupportedError(f"unbalanced parenthesis at {self._place}")
        if whole.nullable:
            raise UnsupportedError("the expression matches the empty text")
        self._alone = whole.alone

    @classmethod
    def literal(cls, text: str) -> Pattern:
        """Returns the expression that matches this text."""
        return cls(re.sub(r"([^\w\s])", r"\\\1", text))

    def joins(self, left: str, right: str) -> bool:
        """Returns whether a match or its look-ahead may take these two characters in a row."""
        return any(self._classes[a].may(left) and self._classes[b].may(right) for a, b in self._follow)

    def touches(self, character: str) -> bool:
        """Returns whether a match or its look-ahead may take this character."""
        return any(one.may(character) for one in self._classes)

    def starts_with(self, character: str) -> bool:
        """Returns whether there is certainly a match at this character, whatever follows it."""
        return any(self._classes[place].must(character) for place in self._alone)

    # ---- the parser ------------------------------------------------------------------------------------------------

    def _alternatives(self) -> _Part:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return _Part(
            any(part.nullable for part in parts),
            any(part.skippable for part in parts),
            *(frozenset().union(*sets) for sets in zip(*((p.first, p.last, p.alone) for p in parts), strict=True)),
        )

    def _sequence(self) -> _Part:
        whole = _Part(nullable=True, skippable=True)
        while self._place < len(self._source) and self._source[self._place] not in "|)":
            part = self._repeated(self._atom())
            self._follow |= {(a, b) for a in whole.last for b in part.first}
            whole = _Part(
                whole.nullable and part.nullable,
                whole.skippable and part.skippable,
                whole.first | part.first if whole.nullable else whole.first,
                whole.last | part.last if part.nullable else part.last,
                (whole.alone if part.skippable else frozenset()) | (part.alone if whole.skippable else frozenset()),
            )
        return whole

    def _repeated(self, part: _Part) -> _Part:
        while match := _QUANTIFIER.match(self._source, self._place):
            self._place = match.end()
            kind, least, comma, most, suffix = match.groups()
            low = {"*": 0, "+": 1, "?": 0}.get(kind, int(least or 0))
            high = {"*": 2, "+": 2, "?": 1}.get(kind, int(most or 2) if comma else low)
            if high > 1:
                self._follow |= {(a, b) for a in part.last for b in part.first}
            part = _Part(
                nullable=low == 0 or part.nullable,
                # A possessive repetition takes all that it can, whatever follows.
                skippable=(low == 0 or part.skippable) and suffix != "+",
                first=part.first,
                last=part.last,
                alone=part.alone if low <= 1 <= high else frozenset(),
            )
        return part

    def _atom(self) -> _Part:
        character = self._next()
        match character:
            case "(":
                return self._group()
            case "[":
                return self._position(self._bracket())
            case "\\":
                return self._position(self._escape())
            case ".":
                return self._position(_Class(lambda c: c != "\n", lambda c: c not in "\r\n" and is_stable(c)))
            case "^" | "$":
                raise UnsupportedError(f"the anchor {character}")
            case _:
                return self._position(self._one(character))

    def _group(self) -> _Part:
        kind = ":"
        if self._source.startswith("?", self._place):
            match = _GROUP.match(self._source, self._place)
            if match is None:
                raise UnsupportedError(f"the group at {self._place}")
            self._place = match.end()
            kind = match[1]
        before = self._ignore_case
        self._ignore_case = kind == "i:" or (before and kind != "-i:")
        part = self._alternatives()
        self._ignore_case = before
        if not self._take(")"):
            raise UnsupportedError("an open group")
        if kind in "=!":  # takes nothing, and nothing follows on what it saw
            return _Part(nullable=True, skippable=False, first=part.first)
        return dataclasses.replace(part, skippable=False) if kind == ">" else part

    def _bracket(self) -> _Class:
        negated = self._take("^")
        items: list[_Class] = []
        while (character := self._next()) != "]" or not items:
            if character in "[" or self._source.startswith("&&", self._place - 1):
                raise UnsupportedError("a class within a class")
            item = self._escape() if character == "\\" else None
            low = self._escaped if character == "\\" else character
            if low and self._source.startswith("-", self._place) and not self._source.startswith("-]", self._place):
                self._place += 1
                if (high := self._next()) == "\\":
                    self._escape()
                    high = self._escaped
                if not high or high == "[":
                    raise UnsupportedError("a range of classes")
                item = self._range(low, high)
            items.append(item or self._one(character))
        found = _Class(lambda c: any(one.may(c) for one in items), lambda c: any(one.must(c) for one in items))
        return found.negated() if negated else found

    def _escape(self) -> _Class:
        """Returns the class of an escape; `_escaped` is its character where it denotes a single one."""
        character = self._next()
        self._escaped = ""
        if character in "sSdDwW":
            found = _SHORT[character.lower()]
            return found if character.islower() else found.negated()
        if character in "pP":
            match = _CATEGORY.match(self._source, self._place)
            if match is None:
                raise UnsupportedError(f"the category at {self._place}")
            self._place = match.end()
            found = _category(match[2])
            return found.negated() if (character == "P") != bool(match[1]) else found
        if character in "ux":
            match = re.compile(r"\{?([0-9a-fA-F]{1,6})\}?").match(self._source, self._place)
            if match is None or (character == "u" and len(match[0]) != 4):
                raise UnsupportedError(f"the code at {self._place}")
            self._place = match.end()
            character = chr(int(match[1], 16))
        elif character in _CONTROL:
            character = _CONTROL[character]
        elif character.isalnum():
            raise UnsupportedError(f"the escape \\{character}")
        self._escaped = character
        return self._one(character)

    def _one(self, character: str) -> _Class:
        return self._range(character, character)

    def _range(self, low: str, high: str) -> _Class:
        def contains(character: str) -> bool:
            return low <= character <= high

        if not self._ignore_case:
            return _Class(contains, contains)
        if not high.isascii():  # folding differs between libraries there
            raise UnsupportedError(f"{low} to {high} in any case")
        # A character such as \ufb01 is folded to two.
        return _Class(
            lambda c: not is_stable(c) or contains(c.upper()) or any(contains(folded) for folded in c.casefold()),
            lambda c: c.isascii() and (contains(c.lower()) or contains(c.upper())),
        )

    def _position(self, characters: _Class) -> _Part:
        place = frozenset((len(self._classes),))
        self._classes.append(characters)
        return _Part(nullable=False, skippable=False, first=place, last=place, alone=place)

    def _next(self) -> str:
        if self._place >= len(self._source):
            raise UnsupportedError("the expression breaks off")
        self._place += 1
        return self._source[self._place - 1]

    def _take(self, character: str) -> bool:
        found = self._source.startswith(character, self._place)
        self._place += found
        return found


def _category(name: str) -> _Class:
    """Returns the characters of a general category, or of any other \\p property, of which nothing is known."""
    known = re.fullmatch("[LMNPSZC][a-z]?", name) is not None

    def in_category(character: str) -> bool:
        return unicodedata.category(character).startswith(name)

    return _Class(
        lambda c: not (known and is_stable(c)) or in_category(c),
        lambda c: known and is_stable(c) and in_category(c),
    )


def _may_be(categories: str, character: str) -> bool:
    """Returns whether a character beyond ASCII may belong to a class whose members have these categories."""
    return not is_stable(character) or unicodedata.category(character)[0] in categories


_SHORT = {
    # \v and what lies beyond ASCII differ between syntaxes.
    "s": _Class(lambda c: c in _SPACES + "\v" if c.isascii() else _may_be("ZC", c), lambda c: c in _SPACES),
    "d": _Class(lambda c: c.isdigit() if c.isascii() else _may_be("N", c), lambda c: c.isascii() and c.isdigit()),
    "w": _Class(
        lambda c: c.isalnum() or c == "_" if c.isascii() else _may_be("LMNPC", c),
        lambda c: c.isascii() and (c.isalnum() or c == "_"),
    ),
}
