"""Implements the steps of tokenizer decoders one token at a time: each takes text and returns the text that is
final.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Self

from tokenizers import decoders

REPLACEMENT = "\ufffd"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Stage:
    """Transforms the text of one decoder step.

    Two stages are equal when they return the same text for any continuation.
    """

    def feed(self, text: str) -> Sequence[str]:
        """Takes the next token (behind a step that joins tokens: the next text) and returns the text that is now
        final.
        """
        raise NotImplementedError

    def finish(self) -> Sequence[str]:
        """Returns the text still held back, as the input ends here."""
        return ()

    def end_prompt(self) -> Sequence[str]:
        """Returns the part of the held-back text that the prompt's own text shows, which then counts as returned.

        An incomplete character stays held back: the output may complete it.
        """
        return ()

    def copy(self) -> Self:
        """Returns an independent copy in the same state."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # its state changes


class Utf8(Stage):
    """Joins bytes to text, invalid ones as U+FFFD. Bytes come as latin-1 text, so that all stages take text."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, text: str) -> Sequence[str]:
        if not self._pending and text.isascii():
            return (text,)
        data = self._pending + text.encode("latin-1")
        certain, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return (certain,)

    def finish(self) -> Sequence[str]:
        pending, self._pending = self._pending, b""
        return (pending.decode("utf-8", "replace"),)


class ByteFallback(Stage):
    """Joins `<0xNN>` tokens: a run of them is its text when all of it is valid UTF-8, else one U+FFFD for each byte."""

    def __init__(self) -> None:
        self._run = bytearray()
        self._pending = b""  # the incomplete character at the end of the run
        self._invalid = False

    def feed(self, text: str) -> Sequence[str]:
        match = _BYTE_TOKEN.fullmatch(text)
        if match is None:
            return (*self.finish(), text) if self._run or self._invalid else (text,)
        if self._invalid:
            return (REPLACEMENT,)
        byte = bytes((int(match[1], 16),))
        self._run += byte
        self._pending += byte
        try:
            character, _ = codecs.utf_8_decode(self._pending, "strict", False)
        except UnicodeDecodeError:
            length = len(self._run)
            self._run.clear()
            self._pending, self._invalid = b"", True
            return (REPLACEMENT,) * length
        if character:
            self._pending = b""
        return ()

    def finish(self) -> Sequence[str]:
        run, valid = bytes(self._run), not self._pending
        self._run.clear()
        self._pending, self._invalid = b"", False
        if not run:
            return ()
        return (run.decode(),) if valid else (REPLACEMENT,) * len(run)

    def end_prompt(self) -> Sequence[str]:
        complete = bytes(self._run[: len(self._run) - len(self._pending)])
        self._run = bytearray(self._pending)
        return (complete.decode(),) if complete else ()

    def copy(self) -> Self:
        other = super().copy()
        other._run = self._run.copy()
        return other


def byte_of(piece: str) -> int | None:
    """Returns the byte of a byte-fallback token; None for other tokens."""
    match = _BYTE_TOKEN.fullmatch(piece)
    return None if match is None else int(match[1], 16)


class PerToken(Stage):
    """Changes one token; whether it is the text's first may matter."""

    def __init__(self, change: Callable[[str, bool], str]):
        self._change = change
        self._first = True

    def feed(self, text: str) -> Sequence[str]:
        first, self._first = self._first, False
        return (self._change(text, first),)


class WordEnd(Stage):
    """Replaces the suffix that marks the end of a word by a space (BPEDecoder), but drops that of the last token.

    Returns a token in two parts, so only a step that joins tokens may follow.
    """

    def __init__(self, suffix: str):
        self._suffix = suffix
        self._held = ""  # of the token before, from its first suffix on

    def feed(self, text: str) -> Sequence[str]:
        before = self._held.replace(self._suffix, " ")
        start = text.find(self._suffix)
        self._held = "" if start < 0 else text[start:]
        return (before, text if start < 0 else text[:start])

    def finish(self) -> Sequence[str]:
        held, self._held = self._held, ""
        return (held.replace(self._suffix, ""),)


class Ctc(Stage):
    """Drops tokens that repeat the previous one, and those that `change`, which removes padding, leaves empty."""

    def __init__(self, change: Callable[[str], str]):
        self._change = change
        self._before: str | None = None

    def feed(self, text: str) -> Sequence[str]:
        before, self._before = self._before, text
        changed = "" if text == before else self._change(text)
        return (changed,) if changed else ()


class StripStart(Stage):
    """Drops up to `count` of a character at the beginning of the joined text."""

    def __init__(self, character: str, count: int):
        self._character = character
        self._count = count

    def feed(self, text: str) -> Sequence[str]:
        if self._count and text:
            stripped = strip_start(text, self._character, self._count)
            self._count = 0 if stripped else self._count - len(text)
            return (stripped,)
        return (text,)


def strip_start(text: str, character: str, count: int) -> str:
    """Returns `text` without the first `count` of a character at its beginning, or as many as there are."""
    rest = text.lstrip(character)
    return text[min(len(text) - len(rest), count) :]


class ReplaceText(Stage):
    """Replaces a string in the joined text."""

    def __init__(self, pattern: str, content: str):
        self._pattern = pattern
        self._content = content
        self._held = ""  # the longest end of the text that the pattern may begin with
        self._shown = 0  # characters of it that the prompt has shown

    def feed(self, text: str) -> Sequence[str]:
        text, out, position = self._held + text, [], self._shown
        searched = 0
        while (start := text.find(self._pattern, searched)) >= 0:
            out += (text[position:start], self._content)
            position = searched = start + len(self._pattern)
        length = min(len(self._pattern) - 1, len(text) - searched)
        while not text.endswith(self._pattern[:length]):
            length -= 1
        self._held = text[len(text) - length :]
        self._shown = max(0, position - (len(text) - length))
        out.append(text[position : len(text) - length])
        return ("".join(out),)

    def finish(self) -> Sequence[str]:
        return self.end_prompt()

    def end_prompt(self) -> Sequence[str]:
        shown, self._shown = self._shown, len(self._held)
        return (self._held[shown:],)


class Whole(Stage):
    """Passes the rest of a chain that cannot run token by token to the library: all of the text is returned at the end.

    fused: a step before it joins the tokens.
    """

    def __init__(self, decoder: decoders.Decoder, fused: bool):
        self._decoder = decoder
        self._fused = fused
        self._pieces: list[str] = []
        self._shown = ""

    def feed(self, text: str) -> Sequence[str]:
        self._pieces.append(text)
        return ()

    def finish(self) -> Sequence[str]:
        text = self._decode()
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, self._shown, strict=False))
        return (text[sum(1 for _ in same) :],)

    def end_prompt(self) -> Sequence[str]:
        self._shown = self._decode().rstrip(REPLACEMENT)
        return (self._shown,)

    def _decode(self) -> str:
        return self._decoder.decode(["".join(self._pieces)] if self._fused else self._pieces)

    def copy(self) -> Self:
        other = super().copy()
        other._pieces = self._pieces.copy()
        return other
