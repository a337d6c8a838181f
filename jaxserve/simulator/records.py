"""Records the steps and tokens of a simulated engine compactly: columns of steps, and token times of runs of steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STEP_COLUMNS = (
    "begin",
    "start",
    "end",
    "prefill_tokens",
    "decode_tokens",
    "rows",
    "token_bucket",
    "row_bucket",
    "pages_used",
    "pages_cached",
    "pages_swapped",
    "waiting",
    "running",
    "swapped",
    "preempted_recompute",
    "preempted_swap",
)
"""Columns of the step log. begin: of the iteration that created the step; start, end: on the device; seconds.
preempted_*: sequences, as the step was decided. The others: as in `StepRecorded`."""


class StepLog:
    """Stores a row of `STEP_COLUMNS` for each step, single or fast-forwarded."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._rows: list[Sequence[float]] = []

    def add(self, row: Sequence[float]) -> None:
        self._rows.append(row)

    def add_many(self, *columns: np.ndarray | float) -> None:
        """Adds consecutive steps; a number applies to all of them. The first column is an array."""
        self._seal()
        block = np.empty((len(np.asarray(columns[0])), len(STEP_COLUMNS)))
        for place, column in enumerate(columns):
            block[:, place] = column
        self._blocks.append(block)

    def columns(self) -> dict[str, np.ndarray]:
        """Returns float64 [steps] for each column."""
        self._seal()
        table = np.concatenate(self._blocks) if self._blocks else np.empty((0, len(STEP_COLUMNS)))
        self._blocks = [table]
        return {name: table[:, place] for place, name in enumerate(STEP_COLUMNS)}

    def _seal(self) -> None:
        if self._rows:
            self._blocks.append(np.array(self._rows, np.float64))
            self._rows = []


class TokenLog:
    """Stores the times of each request's tokens.

    Decoding requests get one token in each of many steps, mostly the same requests as in the previous step: for these
    the log keeps one time a step, and one list of requests for as long as it stays the same object.
    """

    def __init__(self) -> None:
        self._times: list[np.ndarray] = []
        self._single: list[float] = []
        self._count = 0
        self._epochs: list[tuple[Sequence[str], int]] = []  # requests, and the number of times before
        self._others: dict[int, list[float]] = {}

    def add(self, request_ids: Sequence[str], time: float) -> None:
        """Adds a token for each of the requests."""
        self._epoch(request_ids)
        self._single.append(time)
        self._count += 1

    def add_many(self, request_ids: Sequence[str], times: np.ndarray) -> None:
        """Adds a token for each of the requests at each of the times."""
        self._epoch(request_ids)
        self._seal()
        self._times.append(times)
        self._count += len(times)

    def add_one(self, index: int, time: float) -> None:
        """Adds a token for the request of that index alone."""
        self._others.setdefault(index, []).append(time)

    def token_times(self, count: int) -> list[np.ndarray]:
        """Returns the token times of requests 0 to count - 1, float64, ascending."""
        self._seal()
        times = np.concatenate([*self._times, np.empty(0)])
        spans: list[list[list[int]]] = [[] for _ in range(count)]
        ends = [*(start for _, start in self._epochs[1:]), self._count]
        for (request_ids, start), end in zip(self._epochs, ends, strict=False):  # without epochs there is no first
            for request_id in request_ids:
                mine = spans[int(request_id)]
                if mine and mine[-1][1] == start:
                    mine[-1][1] = end
                else:
                    mine.append([start, end])
        found = []
        for index, mine in enumerate(spans):
            parts = [times[start:end] for start, end in mine]
            parts.append(np.array(self._others.get(index, ())))
            found.append(np.sort(np.concatenate(parts)))
        return found

    def _epoch(self, request_ids: Sequence[str]) -> None:
        if not self._epochs or self._epochs[-1][0] is not request_ids:
            self._epochs.append((request_ids, self._count))

    def _seal(self) -> None:
        if self._single:
            self._times.append(np.array(self._single))
            self._single = []
