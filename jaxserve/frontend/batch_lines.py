"""Parses the lines of a batch's input: OpenAI batch lines, each with a key and a digest of its request.

A line's key is its custom_id, or `malformed-line-<number>` when it has none of its own. No key occurs twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from jaxserve.config.checks import did_you_mean
from jaxserve.config.shown import shown
from jaxserve.frontend.batch_errors import BatchFileError, LineError
from jaxserve.frontend.openai import URLS
from jaxserve.frontend.openai_embeddings import EMBEDDINGS_URL
from jaxserve.request import MAX_ID_LENGTH

MAX_LINE_BYTES = 64 * 1024 * 1024
"""Maximum bytes of a line; a longer line becomes an error line."""

MAX_UNENDED_BYTES = 1024 * 1024 * 1024
"""Bytes after which a line without an end stops the run: its source may never write a newline."""

MAX_NESTING = 100
"""Maximum nesting depth of objects and lists."""

MALFORMED_PREFIX = "malformed-line-"
DIGEST_BYTES = 16

BATCH_URLS = (*URLS, EMBEDDINGS_URL)
"""What a line may ask for."""

_FIELDS = ("custom_id", "method", "url", "body")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LineSource(Protocol):
    """Source of lines."""

    def readline(self, size: int, /) -> bytes:
        """Returns the next line, or `size` bytes of it where it is longer; empty at the end."""
        ...


@dataclasses.dataclass(frozen=True)
class BatchLine:
    """Holds a well-formed line; its body is not yet parsed. number: from 1."""

    number: int
    custom_id: str
    url: str
    body: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class KeyedLine:
    """Holds a line of the input, well-formed (`line`) or not (`fault`).

    Attributes:
        number: from 1.
        digest: of the line's whole content except its custom_id, independent of the layout of its JSON.
    """

    number: int
    key: str
    digest: bytes
    line: BatchLine | None
    fault: LineError | None


class Keys:
    """Stores a set of keys in 16 bytes each, however long they are."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def __contains__(self, key: str) -> bool:
        return key_digest(key) in self._digests

    def add(self, key: str) -> None:
        self._digests.add(key_digest(key))


def key_digest(key: str) -> bytes:
    """Returns a 16-byte digest of a key."""
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def read_lines(file: LineSource, ready: Callable[[], bool] = lambda: True) -> Iterator[tuple[int, bytes] | None]:
    """Yields numbers and bytes of the lines that are not blank; None when no line is available.

    Only the beginning of a line over MAX_LINE_BYTES is kept.

    Args:
        file: the source of lines.
        ready: returns whether reading another line, which may block, is allowed now.

    Raises:
        BatchFileError: a line does not end.
    """
    number = 0
    while True:
        while not ready():
            yield None
        line = file.readline(MAX_LINE_BYTES + 2)
        if not line:
            return
        number += 1
        end, length = line, len(line)
        while end and not end.endswith(b"\n") and len(end) > MAX_LINE_BYTES:
            end = file.readline(MAX_LINE_BYTES + 2)
            length += len(end)
            if length > MAX_UNENDED_BYTES:
                raise BatchFileError(f"line {number} of the input has not ended after {length} bytes; is it a batch?")
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if line.strip():
            yield number, line.rstrip(b"\r\n")


def count_lines(file: LineSource) -> int:
    """Counts the lines that are not blank, up to the end of the file."""
    return sum(1 for _ in read_lines(file))


def keyed_lines(lines: Iterable[tuple[int, bytes] | None]) -> Iterator[KeyedLine | None]:
    """Parses the lines that `read_lines` yields. A custom_id that an earlier line has used is a fault."""
    seen = Keys()
    for item in lines:
        if item is None:
            yield None
            continue
        number, data = item
        line, fault, digest = _read(number, data)
        key = line.custom_id if line is not None else fault.key if fault is not None else None
        if key is not None and key in seen:
            fault = fault or LineError("duplicate_custom_id", f"custom_id {key!r} was used by an earlier line")
            line, key = None, None
        if key is None:
            key = f"{MALFORMED_PREFIX}{number}"
        seen.add(key)
        yield KeyedLine(number, key, digest, line, fault)


def parse_line(number: int, line: Any) -> BatchLine:
    """Checks the JSON value of an input line. A field that is null counts as absent. Raises LineError."""
    if not isinstance(line, dict):
        raise LineError("invalid_line", f"line is {_kind(line)}; it must be a JSON object")
    key = _parse_custom_id(line)
    unknown = sorted(name for name, value in line.items() if name not in _FIELDS and value is not None)
    if unknown:
        raise LineError(
            "invalid_line", f"line has the unknown field {shown(unknown[0])}; {did_you_mean(unknown[0], _FIELDS)}", key
        )
    if line.get("method") != "POST":
        raise LineError("invalid_method", f"method is {line.get('method')!r}; it must be 'POST'", key)
    if line.get("url") not in BATCH_URLS:
        raise LineError("invalid_url", f"url is {line.get('url')!r}; it must be one of {', '.join(BATCH_URLS)}", key)
    if not isinstance(line.get("body"), dict):
        raise LineError("invalid_line", f"body is {_kind(line.get('body'))}; it must be a JSON object", key)
    return BatchLine(number, key, line["url"], line["body"])


def _read(number: int, data: bytes) -> tuple[BatchLine | None, LineError | None, bytes]:
    """Returns a line or its fault, and its digest: that of its bytes where they are no JSON object."""
    digest = _digest(b"bytes", data)
    try:
        value = _load(data)
        if isinstance(value, dict):
            digest = _digest(b"json", _canonical(value))
        return parse_line(number, value), None, digest
    except LineError as error:
        return None, error, digest


def _load(data: bytes) -> Any:
    """Parses the JSON value of a line. Raises LineError."""
    if len(data) > MAX_LINE_BYTES:
        raise LineError("line_too_long", f"line has more than {MAX_LINE_BYTES} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise LineError("invalid_utf8", f"line is no valid UTF-8 at byte {error.start}") from error
    try:
        value = json.loads(text, object_pairs_hook=_unambiguous)
        if data.count(b"[") + data.count(b"{") > MAX_NESTING:
            _check_nesting(value)
    except (ValueError, RecursionError) as error:
        too_deep = isinstance(error, RecursionError)
        words = f"it is nested more than {MAX_NESTING} deep" if too_deep else str(error)
        raise LineError("invalid_json", f"line is no valid JSON: {words}") from error
    return value


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds an object; refuses duplicate names, because JSON does not define which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {twice!r} twice")
    return found


def _check_nesting(value: Any) -> None:
    """Raises RecursionError. The interpreter's own limit depends on the caller's depth, and the digest must not."""
    level = [value]
    for _ in range(MAX_NESTING):
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for items in children for child in items if isinstance(child, dict | list)]
        if not level:
            return
    raise RecursionError


def _canonical(line: Mapping[str, Any]) -> bytes:
    """Serializes a line's content except its custom_id, independent of its layout. Absent and null are the same."""
    said = {name: value for name, value in line.items() if name != "custom_id" and value is not None}
    if isinstance(said.get("body"), dict):
        said["body"] = {name: value for name, value in said["body"].items() if value is not None}
    return json.dumps(said, sort_keys=True, separators=(",", ":")).encode()


def _digest(kind: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES, person=kind).digest()


def _parse_custom_id(line: Mapping[str, Any]) -> str:
    key = line.get("custom_id")
    if key is None:
        raise LineError("missing_custom_id", "line has no custom_id")
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
