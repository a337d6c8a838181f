"""Request traces: when requests arrive, how long they are and whose they are, from files or made up.

The Azure LLM inference traces (CSV: TIMESTAMP, ContextTokens, GeneratedTokens), the Mooncake traces (JSONL: timestamp
in ms, input_length, output_length) and any CSV or JSONL file with the same columns. Either may also have `tenant`,
`priority`, `deadline` (seconds after the arrival) and `max_tokens`.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxserve.checks import between


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Names of the columns of one format, and how many of its time units are a second."""

    arrival: str
    prompt: str
    output: str
    per_second: float


AZURE = _Columns("TIMESTAMP", "ContextTokens", "GeneratedTokens", 1.0)
MOONCAKE = _Columns("timestamp", "input_length", "output_length", 1000.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """N requests in order of arrival.

    arrivals: float64 [N], seconds, the first at 0. prompt_tokens, output_tokens: int64 [N], at least 1 each;
    output_tokens is what the model would generate, which no scheduler knows beforehand.
    max_tokens: int64 [N], as the client sets it, 0 where the trace does not say.
    tenants: N names. priorities: int64 [N]. deadlines: float64 [N], seconds after the arrival, infinite for none.
    """

    name: str
    arrivals: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    max_tokens: np.ndarray
    tenants: tuple[str, ...]
    priorities: np.ndarray
    deadlines: np.ndarray

    def __len__(self) -> int:
        return len(self.arrivals)

    @property
    def seconds(self) -> float:
        """From the first arrival to the last."""
        return float(self.arrivals[-1]) if len(self) else 0.0

    @property
    def rate(self) -> float:
        """Arrivals a second, on average; infinite where all arrive at once."""
        return (len(self) - 1) / self.seconds if self.seconds else math.inf

    def faster(self, factor: float) -> Trace:
        """The same requests at `factor` times the rate; deadlines stay as they are."""
        between("rate factor", factor, 1e-9)
        return dataclasses.replace(self, name=f"{self.name} x{factor:g}", arrivals=self.arrivals / factor)

    def part(self, start: int, stop: int) -> Trace:
        """Requests start to stop - 1, the first of them at 0."""
        arrivals = self.arrivals[start:stop]
        return dataclasses.replace(
            self,
            arrivals=arrivals - (arrivals[0] if len(arrivals) else 0.0),
            tenants=self.tenants[start:stop],
            **{
                name: getattr(self, name)[start:stop]
                for name in ("prompt_tokens", "output_tokens", "max_tokens", "priorities", "deadlines")
            },
        )

    def select(self, keep: np.ndarray) -> Trace:
        """The requests where `keep`, bool [N], holds; arrival times stay."""
        return dataclasses.replace(
            self,
            arrivals=self.arrivals[keep],
            tenants=tuple(tenant for tenant, kept in zip(self.tenants, keep.tolist(), strict=True) if kept),
            **{
                name: getattr(self, name)[keep]
                for name in ("prompt_tokens", "output_tokens", "max_tokens", "priorities", "deadlines")
            },
        )


def make_trace(
    name: str,
    arrivals: Any,
    prompt_tokens: Any,
    output_tokens: Any,
    *,
    max_tokens: Any = 0,
    tenants: Any = "",
    priorities: Any = 0,
    deadlines: Any = math.inf,
) -> Trace:
    """A trace from columns, sorted by arrival; a single value stands for all requests.

    Raises ValueError where a column has another length, or a length is below 1.
    """
    times = np.atleast_1d(np.asarray(arrivals, np.float64))
    count = len(times)
    names = (tenants,) * count if isinstance(tenants, str) else tuple(tenants)
    columns: dict[str, np.ndarray] = {
        "prompt_tokens": _column("prompt_tokens", prompt_tokens, count, np.int64),
        "output_tokens": _column("output_tokens", output_tokens, count, np.int64),
        "max_tokens": _column("max_tokens", max_tokens, count, np.int64),
        "priorities": _column("priorities", priorities, count, np.int64),
        "deadlines": _column("deadlines", deadlines, count, np.float64),
    }
    if len(names) != count:
        raise ValueError(f"trace {name}: tenants has {len(names)} entries; arrivals has {count}")
    for column in ("prompt_tokens", "output_tokens"):
        if count and columns[column].min() < 1:
            raise ValueError(f"trace {name}: {column} has {columns[column].min()}; each must be at least 1")
    order = np.argsort(times, kind="stable")
    sorted_times = times[order]
    return Trace(
        name=name,
        arrivals=sorted_times - (sorted_times[0] if count else 0.0),
        tenants=tuple(names[place] for place in order.tolist()),
        **{key: values[order] for key, values in columns.items()},
    )


def read_trace(path: str | os.PathLike[str], limit: int | None = None) -> Trace:
    """Reads a .csv or .jsonl file; limit: requests at most.

    Raises ValueError naming the file, the line and the column of what cannot be read.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"trace {path.name} ends in {path.suffix!r}; it must be a .csv or a .jsonl file")
    rows = _csv_rows(path) if path.suffix == ".csv" else _jsonl_rows(path)
    columns: _Columns | None = None
    found: list[_Row] = []
    for line, fields in rows:
        if limit is not None and len(found) >= limit:
            break
        columns = columns or _columns_of(path, line, fields)
        found.append(_Reader(path, line, fields).row(columns))
    if not found:
        raise ValueError(f"trace {path.name} has no requests")
    return make_trace(
        path.stem,
        [row.arrival for row in found],
        [row.prompt_tokens for row in found],
        [row.output_tokens for row in found],
        max_tokens=[row.max_tokens for row in found],
        tenants=[row.tenant for row in found],
        priorities=[row.priority for row in found],
        deadlines=[row.deadline for row in found],
    )


@dataclasses.dataclass(frozen=True)
class _Row:
    arrival: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    tenant: str
    priority: int
    deadline: float


class _Reader:
    """Reads the fields of one line."""

    def __init__(self, path: pathlib.Path, line: int, fields: Mapping[str, Any]):
        self._where = f"trace {path.name} line {line}"
        self._fields = fields

    def row(self, columns: _Columns) -> _Row:
        return _Row(
            arrival=self._time(columns),
            prompt_tokens=self._whole(columns.prompt, 1),
            output_tokens=self._whole(columns.output, 1),
            max_tokens=self._whole("max_tokens", 1, missing=0),
            tenant=str(self._fields.get("tenant") or ""),
            priority=self._whole("priority", None, missing=0),
            deadline=self._number("deadline", missing=math.inf),
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
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for fields in reader:
            yield reader.line_num, fields


def _jsonl_rows(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open(path, encoding="utf-8") as file:
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


def _column(name: str, values: Any, count: int, dtype: Any) -> np.ndarray:
    column = np.asarray(values, dtype)
    if column.ndim == 0:
        return np.full(count, column)
    if column.shape != (count,):
        raise ValueError(f"{name} has {len(column)} entries; arrivals has {count}")
    return column
