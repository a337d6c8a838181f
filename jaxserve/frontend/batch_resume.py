"""Indexes the results of earlier runs in a batch's output and checks them against the input.

Stale results are always reported: a line whose request has changed stops the run before it computes anything, and
results that cannot be compared, or come from other settings, are counted and mentioned.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from jaxserve.frontend.batch_errors import BatchFileError
from jaxserve.frontend.batch_lines import DIGEST_BYTES, KeyedLine, key_digest

SETTINGS_BYTES = 4

_DIGEST = re.compile(f"([0-9a-f]{{{2 * DIGEST_BYTES}}})\\.([0-9a-f]{{{2 * SETTINGS_BYTES}}})")


@dataclasses.dataclass(frozen=True)
class Digest:
    """Identifies the origin of a result.

    request: digest of the input line. settings: of the other settings that determine the tokens.
    """

    request: bytes
    settings: bytes

    def __str__(self) -> str:
        return f"{self.request.hex()}.{self.settings.hex()}"

    @classmethod
    def parse(cls, text: object) -> Digest:
        """Parses the output of `str`. Raises ValueError."""
        match = _DIGEST.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"{text!r} is no digest of a request")
        return cls(bytes.fromhex(match[1]), bytes.fromhex(match[2]))


@dataclasses.dataclass(frozen=True)
class Earlier:
    """Describes a result of an earlier run.

    line: its number in the output. digest: None from versions that wrote none.
    """

    line: int
    digest: Digest | None


class Results:
    """Indexes the results of earlier runs by key, in some 150 bytes each."""

    def __init__(self) -> None:
        self._indices: dict[bytes, int] = {}
        self._digests = bytearray()

    def __len__(self) -> int:
        return len(self._indices)

    def __contains__(self, key: str) -> bool:
        return key_digest(key) in self._indices

    def add(self, key: str, digest: Digest | None) -> None:
        """Adds the result of the output's next line."""
        self._indices[key_digest(key)] = len(self._indices)
        self._digests += bytes(DIGEST_BYTES + SETTINGS_BYTES) if digest is None else digest.request + digest.settings

    def find(self, key: str) -> Earlier | None:
        """Returns the result of a key, None when there is none."""
        index = self._indices.get(key_digest(key))
        if index is None:
            return None
        width = DIGEST_BYTES + SETTINGS_BYTES
        kept = bytes(self._digests[width * index : width * (index + 1)])
        return Earlier(index + 1, Digest(kept[:DIGEST_BYTES], kept[DIGEST_BYTES:]) if any(kept) else None)


class Resumption:
    """Compares the lines of the input with the results that the output holds.

    output: its path, for messages. settings: those of this run, as in `Digest`.
    """

    def __init__(self, output: str, done: Results, settings: bytes):
        self._output = output
        self._done = done
        self._settings = settings
        self._changed = 0
        self._first_change = ""
        self._without_digest = 0
        self._other_settings = 0
        self.lines = 0
        self.matched = 0
        """Number of lines whose result is in the output."""

    def survey(self, lines: Iterable[KeyedLine | None]) -> None:
        """Compares the whole input with the output, before anything is computed.

        Raises BatchFileError when it must not be resumed.
        """
        for line in lines:
            if line is not None:
                self._compare(line)
        self._refuse_changes()
        if self.lines and len(self._done) and not self.matched:
            raise BatchFileError(
                f"output {self._output!r} belongs to another batch: it holds {len(self._done)} results, and the input "
                "has none of their custom_ids; give another name"
            )

    def is_done(self, line: KeyedLine) -> bool:
        """Returns whether the output holds the line's result. Raises BatchFileError when that is of another request."""
        done = self._compare(line)
        self._refuse_changes()
        return done

    def notes(self) -> list[str]:
        """Returns lines for the user on kept results that may differ from what this run would produce."""
        found = []
        if self._without_digest:
            found.append(
                f"{self._without_digest} results in the output are of a version that kept no digest of the request: "
                "whether the input has changed since cannot be told; give another --output to compute them again"
            )
        if self._other_settings:
            found.append(
                f"{self._other_settings} results in the output were computed with another model, tokenizer, dtype, "
                "context or seed; they stay: give another --output to compute them again"
            )
        strangers = len(self._done) - self.matched
        if strangers:
            found.append(f"{strangers} results in the output belong to no line of the input; they stay")
        return found

    def _compare(self, line: KeyedLine) -> bool:
        self.lines += 1
        earlier = self._done.find(line.key)
        if earlier is None:
            return False
        self.matched += 1
        if earlier.digest is None:
            self._without_digest += 1
        elif earlier.digest.request != line.digest:
            self._changed += 1
            self._first_change = self._first_change or (
                f"line {line.number} of the input, custom_id {line.key!r}, is not what it was when line {earlier.line} "
                f"of output {self._output!r} answered it"
            )
        elif earlier.digest.settings != self._settings:
            self._other_settings += 1
        return True

    def _refuse_changes(self) -> None:
        if self._changed:
            others = f" ({self._changed - 1} more have changed too)" if self._changed > 1 else ""
            raise BatchFileError(
                f"{self._first_change}{others}; give the line another custom_id, give another --output, or remove its "
                "line from the output to have it computed again"
            )
