"""Defines request traces: arrival times, lengths, tenants, priorities, deadlines, content and sessions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.config.checks import between
from jaxserve.simulator.prompt_content import UNKNOWN_ID, Content, answer_content

ROOT = -1
"""Parent of a request that waits for no other one."""

_COLUMNS = ("prompt_tokens", "output_tokens", "max_tokens", "priorities", "deadlines", "answers", "pauses")


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Holds N requests in order of arrival, single ones and the turns of sessions.

    A turn arrives `pauses` seconds after its parent, the turn before, has ended: when that is depends on how fast it is
    served. Its entry in `arrivals` is the earliest possible time, as if answers took none.

    Attributes:
        arrivals: float64 [N], seconds, the first at 0.
        prompt_tokens: int64 [N], at least 1 each.
        output_tokens: int64 [N], at least 1 each; the tokens the model would generate, which no scheduler knows
            beforehand.
        max_tokens: int64 [N], as the client sets it, 0 where the trace does not give it.
        tenants: N names.
        priorities: int64 [N].
        deadlines: float64 [N], seconds after the arrival, infinite for none.
        prompts: content of each prompt; empty where the trace tells none.
        answers: int64 [N], content id of each answer, 0 where the trace tells none.
        parents: int64 [N], index of the request that must end first, smaller than the request's own; ROOT for none.
        pauses: float64 [N], seconds from the parent's end to the arrival.
    """

    name: str
    arrivals: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    max_tokens: np.ndarray
    tenants: tuple[str, ...]
    priorities: np.ndarray
    deadlines: np.ndarray
    prompts: tuple[Content, ...]
    answers: np.ndarray
    parents: np.ndarray
    pauses: np.ndarray

    def __len__(self) -> int:
        return len(self.arrivals)

    @property
    def seconds(self) -> float:
        """Seconds from the first arrival to the last."""
        return float(self.arrivals[-1]) if len(self) else 0.0

    @property
    def rate(self) -> float:
        """Average arrivals a second; infinite where all arrive at once."""
        return (len(self) - 1) / self.seconds if self.seconds else math.inf

    @property
    def num_sessions(self) -> int:
        """Number of requests that wait for no other one: single requests and first turns."""
        return int((self.parents == ROOT).sum())

    @property
    def has_turns(self) -> bool:
        """Tells whether some requests wait for others."""
        return self.num_sessions < len(self)

    def repeated(self, index: int) -> int:
        """Returns the number of tokens that a turn's prompt repeats of the turn before: its prompt and answer, or 0
        where the prompt begins otherwise."""
        parent = int(self.parents[index])
        if parent == ROOT or not self.prompts:
            return 0
        said = self.prompts[parent] + answer_content(int(self.answers[parent]), int(self.output_tokens[parent]))
        return len(said) if self.prompts[index].shared(said) == len(said) else 0

    def faster(self, factor: float) -> Trace:
        """Returns the same requests, of which single ones and sessions arrive at `factor` times the rate; deadlines and
        pauses stay as they are."""
        between("rate factor", factor, 1e-9)
        return self.arriving(self.arrivals / factor, f"{self.name} x{factor:g}")

    def arriving(self, arrivals: np.ndarray, name: str = "") -> Trace:
        """Returns the same requests with other arrivals, of which those of later turns are not used.

        arrivals: float64 [N], in any order.
        """
        moved = dataclasses.replace(self, name=name or self.name, arrivals=arrivals.copy())
        if self.has_turns:
            for index in np.flatnonzero(self.parents != ROOT).tolist():
                moved.arrivals[index] = moved.arrivals[self.parents[index]] + self.pauses[index]
        order = np.argsort(moved.arrivals, kind="stable")
        return moved if (order == np.arange(len(self))).all() else moved._rows(order)

    def part(self, start: int, stop: int) -> Trace:
        """Returns requests start to stop - 1, the first of them at 0. A turn without any of those before waits for
        none."""
        found = self._rows(np.arange(len(self))[start:stop])
        return dataclasses.replace(found, arrivals=found.arrivals - (found.arrivals[0] if len(found) else 0.0))

    def select(self, keep: np.ndarray) -> Trace:
        """Returns the requests where `keep`, bool [N], holds; arrival times stay. A turn whose parent is left out waits
        for the nearest turn before it that is kept."""
        return self._rows(np.flatnonzero(keep))

    def _rows(self, rows: np.ndarray) -> Trace:
        """Returns the requests of these indices, int64, in their order; a parent comes before its turns."""
        places = np.full(len(self) + 1, ROOT)  # the last entry is that of ROOT
        places[rows] = np.arange(len(rows))
        parents = self.parents[rows]
        while (lost := (parents != ROOT) & (places[parents] == ROOT)).any():
            parents = np.where(lost, self.parents[parents], parents)
        return dataclasses.replace(
            self,
            arrivals=self.arrivals[rows],
            tenants=tuple([self.tenants[row] for row in rows.tolist()]),
            prompts=tuple([self.prompts[row] for row in rows.tolist()]) if self.prompts else (),
            parents=places[parents],
            **{name: getattr(self, name)[rows] for name in _COLUMNS},
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
    prompts: Sequence[Content] = (),
    answers: Any = UNKNOWN_ID,
    parents: Any = ROOT,
    pauses: Any = 0.0,
) -> Trace:
    """Builds a trace from columns, sorted by arrival; a single value applies to all requests.

    Raises ValueError where a column has another length, a length is below 1, a prompt's content has another length than
    the prompt, or a parent does not come before its turn.
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
        "answers": _column("answers", answers, count, np.int64),
        "parents": _column("parents", parents, count, np.int64),
        "pauses": _column("pauses", pauses, count, np.float64),
    }
    if len(names) != count:
        raise ValueError(f"trace {name}: tenants has {len(names)} entries; arrivals has {count}")
    for column in ("prompt_tokens", "output_tokens"):
        if count and columns[column].min() < 1:
            raise ValueError(f"trace {name}: {column} has {columns[column].min()}; each must be at least 1")
    _check_content(name, prompts, columns["prompt_tokens"])
    _check_parents(name, columns["parents"])
    trace = Trace(name=name, arrivals=times, tenants=names, prompts=tuple(prompts), **columns).arriving(times)
    return dataclasses.replace(trace, arrivals=trace.arrivals - (trace.arrivals[0] if count else 0.0))


def _check_content(name: str, prompts: Sequence[Content], lengths: np.ndarray) -> None:
    if prompts and len(prompts) != len(lengths):
        raise ValueError(f"trace {name}: prompts has {len(prompts)} entries; arrivals has {len(lengths)}")
    for index, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=False)):
        if prompt and len(prompt) != length:
            raise ValueError(
                f"trace {name}: the content of prompt {index} has {len(prompt)} tokens; its prompt_tokens is {length}"
            )


def _check_parents(name: str, parents: np.ndarray) -> None:
    wrong = (parents < ROOT) | (parents >= np.arange(len(parents)))
    if wrong.any():
        index = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"trace {name}: parents[{index}] is {parents[index]}; it must be {ROOT} or the index of an earlier request"
        )


def _column(name: str, values: Any, count: int, dtype: Any) -> np.ndarray:
    column = np.asarray(values, dtype)
    if column.ndim == 0:
        return np.full(count, column)
    if column.shape != (count,):
        raise ValueError(f"{name} has {len(column)} entries; arrivals has {count}")
    return column
