"""The two files of an offline batch: OpenAI batch lines in, results out, and what an earlier run left of them.

A line's key is its custom_id, or `malformed-line-<number>` when it has none of its own. The output holds each key
once, which is how a run that was stopped is resumed.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from jaxserve.frontend.openai import URLS
from jaxserve.request import MAX_ID_LENGTH

MAX_LINE_BYTES = 64 * 1024 * 1024
MALFORMED_PREFIX = "malformed-line-"

_FIELDS = ("custom_id", "method", "url", "body")
_BLOCK = 1024 * 1024


class BatchFileError(ValueError):
    """A file that cannot be used as it is; the text is one line."""


class LineError(ValueError):
    """What is wrong with one line. code: a word for programs. key: the line's custom_id, None when it has none."""

    def __init__(self, code: str, message: str, key: str | None = None):
        super().__init__(message)
        self.code = code
        self.key = key


@dataclasses.dataclass(frozen=True)
class BatchLine:
    """A well-formed line; the body is not yet read. number: from 1."""

    number: int
    custom_id: str
    url: str
    body: Mapping[str, Any]


def parse_line(number: int, data: bytes) -> BatchLine:
    """Reads one input line. Raises LineError."""
    if len(data) > MAX_LINE_BYTES:
        raise LineError("line_too_long", f"line has more than {MAX_LINE_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise LineError("invalid_utf8", f"line is no valid UTF-8 at byte {error.start}") from error
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise LineError("invalid_json", f"line is no valid JSON: {reason}") from error
    if not isinstance(line, dict):
        raise LineError("invalid_line", f"line is {_kind(line)}; it must be a JSON object")
    key = _parse_custom_id(line)
    unknown = sorted(set(line) - set(_FIELDS))
    if unknown:
        raise LineError(
            "invalid_line", f"line has the unknown field {unknown[0]!r}; known are {', '.join(_FIELDS)}", key
        )
    if line.get("method") != "POST":
        raise LineError("invalid_method", f"method is {line.get('method')!r}; it must be 'POST'", key)
    if line.get("url") not in URLS:
        raise LineError("invalid_url", f"url is {line.get('url')!r}; it must be one of {', '.join(URLS)}", key)
    if not isinstance(line.get("body"), dict):
        raise LineError("invalid_line", f"body is {_kind(line.get('body'))}; it must be a JSON object", key)
    return BatchLine(number, key, line["url"], line["body"])


def _parse_custom_id(line: Mapping[str, Any]) -> str:
    if "custom_id" not in line:
        raise LineError("missing_custom_id", "line has no custom_id")
    key = line["custom_id"]
    if not isinstance(key, str) or not key or len(key) > MAX_ID_LENGTH:
        raise LineError("invalid_custom_id", f"custom_id must be text of 1 to {MAX_ID_LENGTH} characters")
    if key.startswith(MALFORMED_PREFIX):
        raise LineError(
            "invalid_custom_id", f"custom_id begins with {MALFORMED_PREFIX!r}, which is kept for error lines"
        )
    return key


def _kind(value: Any) -> str:
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number")


def open_input(path: str) -> BinaryIO:
    """Raises BatchFileError when the file cannot be read."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise BatchFileError(f"input {path!r} cannot be read: {error.strerror}") from error


def count_lines(file: BinaryIO) -> int:
    """Lines of a file that are not blank; leaves the file at its start."""
    count = sum(1 for _ in read_lines(file))
    file.seek(0)
    return count


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbers and bytes of the lines that are not blank. Of a line over MAX_LINE_BYTES only the beginning is kept."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 2):
        number += 1
        end = line
        while not end.endswith(b"\n") and len(end) > MAX_LINE_BYTES:
            end = file.readline(MAX_LINE_BYTES + 2)
        if line.strip():
            yield number, line.rstrip(b"\r\n")


class Keys:
    """A set of keys that takes 16 bytes for each, however long they are."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def __contains__(self, key: str) -> bool:
        return self._digest(key) in self._digests

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, key: str) -> None:
        self._digests.add(self._digest(key))

    @staticmethod
    def _digest(key: str) -> bytes:
        return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class OutputFile:
    """The results, appended to what an earlier run wrote; `done` has the keys of that.

    A last line that a kill has torn is removed. Raises BatchFileError when the file cannot be written, is no batch
    output, or another run is writing it.
    """

    def __init__(self, path: str, input_path: str):
        if os.path.exists(path) and os.path.samefile(path, input_path):
            raise BatchFileError(f"output {path!r} is the input; give another name")
        try:
            self._file = open(path, "a+b")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise BatchFileError(f"output {path!r} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.done = self._read(path)
        except OSError as error:
            self._file.close()
            raise BatchFileError(f"output {path!r} is being written by another run") from error
        except BatchFileError:
            self._file.close()
            raise

    def _read(self, path: str) -> Keys:
        done, end = Keys(), 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                self._file.truncate(end)
                break
            end += len(line)
            try:
                done.add(json.loads(line)["custom_id"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise BatchFileError(
                    f"output {path!r} holds something else in line {number}; give another name or remove it"
                ) from error
        return done

    def write(self, result: Mapping[str, Any]) -> None:
        """Appends one line, whole, and hands it to the operating system: a kill afterwards does not lose it."""
        self._file.write(json.dumps(result).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
