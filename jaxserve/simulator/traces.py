"""Defines request traces: arrival times, lengths, tenants, priorities and deadlines."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from jaxserve.config.checks import between


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Holds N requests in order of arrival.

    Attributes:
        arrivals: float64 [N], seconds, the first at 0.
        prompt_tokens: int64 [N], at least 1 each.
        output_tokens: int64 [N], at least 1 each; the tokens the model would generate, which no scheduler knows
            beforehand.
        max_tokens: int64 [N], as the client sets it, 0 where the trace does not give it.
        tenants: N names.
        priorities: int64 [N].
        deadlines: float64 [N], seconds after the arrival, infinite for none.
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
        """Seconds from the first arrival to the last."""
        return float(self.arrivals[-1]) if len(self) else 0.0

    @property
    def rate(self) -> float:
        """Average arrivals a second; infinite where all arrive at once."""
        return (len(self) - 1) / self.seconds if self.seconds else math.inf

    def faster(self, factor: float) -> Trace:
        """Returns the same requests at `factor` times the rate; deadlines stay as they are."""
        between("rate factor", factor, 1e-9)
        return dataclasses.replace(self, name=f"{self.name} x{factor:g}", arrivals=self.arrivals / factor)

    def part(self, start: int, stop: int) -> Trace:
        """Returns requests start to stop - 1, the first of them at 0."""
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
        """Returns the requests where `keep`, bool [N], holds; arrival times stay."""
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
    """Builds a trace from columns, sorted by arrival; a single value applies to all requests.

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


def _column(name: str, values: Any, count: int, dtype: Any) -> np.ndarray:
    column = np.asarray(values, dtype)
    if column.ndim == 0:
        return np.full(count, column)
    if column.shape != (count,):
        raise ValueError(f"{name} has {len(column)} entries; arrivals has {count}")
    return column
