"""Scans text that arrives in pieces, for the parsers: markers, and the ends of JSON values."""

from __future__ import annotations

import re

MAX_PART = 256
"""Characters that are given to a machine at one time: dividing them takes a time that grows with their square."""

MAX_SPACE = 256
"""Characters of white space before a marker that a reply begins with."""


class MarkerReader:
    """Divides text at the first of several markers, none of which begins another one.

    Text is held back only while it may be the beginning of a marker.
    """

    def __init__(self, *markers: str):
        self._markers = markers
        self._held = ""

    def read(self, text: str) -> tuple[str, str | None, str]:
        """Takes the next text.

        Returns:
            The text before the marker, the marker, and the text behind it; without a marker the text that is certainly
            before any, None and "".
        """
        text = self._held + text
        self._held = ""
        found = [(index, marker) for marker in self._markers if (index := text.find(marker)) >= 0]
        if found:
            index, marker = min(found)
            return text[:index], marker, text[index + len(marker) :]
        end = len(text) - max(_open_length(text, marker) for marker in self._markers)
        self._held = text[end:]
        return text[:end], None, ""

    def rest(self) -> str:
        """Returns the text that is held back, which is held no longer."""
        rest, self._held = self._held, ""
        return rest


def _open_length(text: str, marker: str) -> int:
    """Returns the length of the longest end of the text with which the marker begins."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def may_begin(text: str, *markers: str) -> bool:
    """Returns whether the text, when it goes on, may begin with one of the markers, or does."""
    return any(text.startswith(marker) or marker.startswith(text) for marker in markers)


class JsonScanner:
    """Follows the brackets and strings of JSON text, without checking it."""

    _PLAIN = re.compile(r'["{}\[\]]')
    _IN_STRING = re.compile(r'["\\]')

    def __init__(self) -> None:
        self._depth = 0
        self._escaped = False
        self.in_string = False

    def end_in(self, text: str) -> int | None:
        """Takes the next text; returns the position in it behind the bracket that closes the first one, if it does."""
        position = 0
        if self._escaped and text:
            position, self._escaped = 1, False
        while (match := (self._IN_STRING if self.in_string else self._PLAIN).search(text, position)) is not None:
            position = match.end()
            character = match[0]
            if character == '"':
                self.in_string = not self.in_string
            elif character == "\\":
                position += 1
                self._escaped = position > len(text)
            elif character in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    return position
        return None
