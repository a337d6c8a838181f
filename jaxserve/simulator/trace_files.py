"""Reads trace files: the Azure LLM inference traces (CSV: TIMESTAMP, ContextTokens, GeneratedTokens), the Mooncake
traces (JSONL: timestamp in ms, input_length, output_length, hash_ids), and any CSV or JSONL file with the same columns.

Either may also have `tenant`, `priority`, `deadline` (seconds after the arrival) and `max_tokens`.

    read_trace(path) -> Trace          for the simulator, with the content of prompts whose blocks a file tells
    trace_rows(path) -> TraceRow ...   line by line, with the prompts' blocks
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import difflib
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxserve.simulator.prompt_content import FIRST_CONTENT_ID, UNKNOWN_ID, Content
from jaxserve.simulator.traces import Trace, make_trace

BLOCK = 512
"""Number of prompt tokens that one of a Mooncake trace's hash_ids stands for."""


OPTIONAL = ("tenant", "priority", "deadline", "max_tokens", "hash_ids")
"""Optional columns besides those of a file's format."""

NEAR = 0.8
"""Similarity (difflib's ratio) from which a column's name counts as a misspelling of an optional one."""


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Column names of one format, and its number of time units per second."""

    arrival: str
    prompt: str
    output: str
    per_second: float


AZURE = _Columns("TIMESTAMP", "ContextTokens", "GeneratedTokens", 1.0)
MOONCAKE = _Columns("timestamp", "input_length", "output_length", 1000.0)


@dataclasses.dataclass(frozen=True)
class TraceRow:
    """One request: arrival in seconds from any origin, lengths in tokens, deadline in seconds after the arrival.

    Attributes:
        max_tokens: 0 where the file does not give it.
        blocks: ids of the prompt's content, `BLOCK` tokens each, equal where the content is; empty where the file has
            none.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int = 0
    tenant: str = ""
    priority: int = 0
    deadline: float = math.inf
    blocks: tuple[int, ...] = ()


def read_trace(path: str | os.PathLike[str], limit: int | None = None) -> Trace:
    """Reads the trace of a .csv or .jsonl file; limit: maximum requests, the first of the file.

    Raises as `trace_rows`.
    """
    found = list(itertools.islice(trace_rows(path), limit))
    prompts, first_answer = _contents(found)
    return make_trace(
        pathlib.Path(path).stem,
        [row.arrival for row in found],
        [row.prompt_tokens for row in found],
        [row.output_tokens for row in found],
        max_tokens=[row.max_tokens for row in found],
        tenants=[row.tenant for row in found],
        priorities=[row.priority for row in found],
        deadlines=[row.deadline for row in found],
        prompts=prompts,
        answers=first_answer + np.arange(len(found)) if prompts else UNKNOWN_ID,
    )


def _contents(rows: Sequence[TraceRow]) -> tuple[list[Content], int]:
    """Returns the prompts' contents, none where no row has blocks, and the first id that no block has.

    Blocks are numbered in order of appearance: files may use hashes of 64 bits.
    """
    if not any(row.blocks for row in rows):
        return [], UNKNOWN_ID
    numbers: dict[int, int] = {}
    contents = []
    for row in rows:
        ids = [FIRST_CONTENT_ID + numbers.setdefault(block, len(numbers)) for block in row.blocks]
        full, rest = divmod(row.prompt_tokens, BLOCK)
        contents.append(Content.of(zip(ids, [BLOCK] * full + [rest] * (rest > 0), strict=False)))
    return contents, FIRST_CONTENT_ID + len(numbers)


def trace_rows(path: str | os.PathLike[str]) -> Iterator[TraceRow]:
    """Yields the requests of a .csv or .jsonl file in its order.

    Raises ValueError naming the file, the line and the column that cannot be read, or where there are no requests.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"trace {path.name} ends in {path.suffix!r}; it must be a .csv or a .jsonl file")
    columns: _Columns | None = None
    seen: tuple[str, ...] | None = None
    for line, fields in _csv_rows(path) if path.suffix == ".csv" else _jsonl_rows(path):
        columns = columns or _columns_of(path, line, fields)
        if (names := tuple(fields)) != seen:
            _check_spelling(path, line, names)
            seen = names
        yield _Reader(path, line, fields).row(columns)
    if columns is None:
        raise ValueError(f"trace {path.name} has no requests")


class _Reader:
    """Parses the fields of one line."""

    def __init__(self, path: pathlib.Path, line: int, fields: Mapping[str, Any]):
        self._where = f"trace {path.name} line {line}"
        self._fields = fields

    def row(self, columns: _Columns) -> TraceRow:
        prompt_tokens = self._whole(columns.prompt, 1)
        return TraceRow(
            arrival=self._time(columns),
            prompt_tokens=prompt_tokens,
            output_tokens=self._whole(columns.output, 1),
            max_tokens=self._whole("max_tokens", 1, missing=0),
            tenant=str(self._fields.get("tenant") or ""),
            priority=self._whole("priority", None, missing=0),
            deadline=self._number("deadline", missing=math.inf),
            blocks=self._blocks(prompt_tokens),
        )

    def _time(self, columns: _Columns) -> float:
        text = self._value(columns.arrival)
        if isinstance(text, str) and not _is_number(text):
            # Seven digits of a second: more than Python 3.11 reads, and than anyone needs.
            whole, _, part = text.partition(".")
            try:
                moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC).timestamp()
                return moment + (float(f"0.{part}") if part else 0.0)
            except ValueError as error:
                raise self._error(columns.arrival, text, "a number of seconds or a date and time") from error
        return self._number(columns.arrival) / columns.per_second

    def _blocks(self, prompt_tokens: int) -> tuple[int, ...]:
        blocks = self._fields.get("hash_ids") or []
        if not isinstance(blocks, list) or not all(type(block) is int and block >= 0 for block in blocks):
            raise self._error("hash_ids", blocks, "a list of whole numbers, at least 0 each")
        if blocks and len(blocks) * BLOCK < prompt_tokens:
            needed = -(-prompt_tokens // BLOCK)
            raise self._error("hash_ids", blocks, f"{needed} or more, {BLOCK} tokens each, for {prompt_tokens} tokens")
        return tuple(blocks)

    def _whole(self, name: str, low: int | None, missing: int | None = None) -> int:
        value = self._value(name, missing)
        try:
            number = int(value)
            if isinstance(value, bool) or number != float(value):
                raise ValueError(value)
        except (TypeError, ValueError) as error:
            raise self._error(name, value, "a whole number") from error
        if low is not None and value != missing and number < low:
            raise self._error(name, value, f"at least {low}")
        return number

    def _number(self, name: str, missing: float | None = None) -> float:
        value = self._value(name, missing)
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise self._error(name, value, "a number") from error
        if not number >= 0:
            raise self._error(name, value, "at least 0")
        return number

    def _value(self, name: str, missing: Any = None) -> Any:
        value = self._fields.get(name)
        if value is None or value == "":
            if missing is None:
                raise ValueError(f"{self._where}: column {name!r} is missing")
            return missing
        return value

    def _error(self, name: str, value: Any, wanted: str) -> ValueError:
        return ValueError(f"{self._where}: column {name!r} is {value!r}; it must be {wanted}")


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open(path, encoding="utf-8", newline="") as file, _naming(path):
        reader = csv.DictReader(file)
        for fields in reader:
            yield reader.line_num, fields


def _jsonl_rows(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open(path, encoding="utf-8") as file, _naming(path):
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                fields = json.loads(text)
            except ValueError as error:
                raise ValueError(f"trace {path.name} line {line} is not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise ValueError(f"trace {path.name} line {line} is {text.strip()[:40]}; it must be an object")
            yield line, fields


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Adds the file's name to the errors of reading it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"trace {path.name} is no UTF-8 text ({error.reason}, byte 0x{error.object[error.start]:02x}); "
            "save it in UTF-8"
        ) from error
    except csv.Error as error:
        raise ValueError(f"trace {path.name} is no CSV: {error}") from error


def _check_spelling(path: pathlib.Path, line: int, names: tuple[str, ...]) -> None:
    """Raises ValueError for an unknown column whose name resembles that of a missing optional one."""
    absent = [name for name in OPTIONAL if name not in names]
    for name in names:
        if isinstance(name, str) and name not in OPTIONAL:
            near = difflib.get_close_matches(name.strip().lower(), absent, n=1, cutoff=NEAR)
            if near:
                raise ValueError(
                    f"trace {path.name} line {line} has the unknown column {name!r}; did you mean {near[0]!r}? "
                    "Rename it, or remove it"
                )


def _columns_of(path: pathlib.Path, line: int, fields: Mapping[str, Any]) -> _Columns:
    for columns in (AZURE, MOONCAKE):
        if columns.prompt in fields or columns.arrival in fields:
            return columns
    known = " or ".join(f"{columns.arrival}, {columns.prompt}, {columns.output}" for columns in (AZURE, MOONCAKE))
    raise ValueError(f"trace {path.name} line {line} has columns {', '.join(map(str, fields))}; it needs {known}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
