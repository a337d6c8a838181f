"""Defines step costs: the interface between the simulated engine and a device, and costs fitted to measured step
times.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.scheduler.step_shape import StepShape


@dataclasses.dataclass(frozen=True)
class HostCosts:
    """Gives the engine loop's host time in seconds, a constant plus a rate per row of the step.

    Attributes:
        before: from the start of an iteration until the step is dispatched.
        after: to process the results of the previous step.
    """

    before: float = 2e-4
    before_per_row: float = 0.0
    after: float = 1e-4
    after_per_row: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"host cost {field.name} is {value}; it must be finite and at least 0")


class CostModel(Protocol):
    """Predicts the seconds of steps on one device."""

    @property
    def name(self) -> str:
        """One line that names the source of the figures."""
        ...

    @property
    def host(self) -> HostCosts: ...

    @property
    def preemption(self) -> PreemptionCosts:
        """Costs by which the scheduler chooses swap or recompute."""
        ...

    def seconds(self, shape: StepShape) -> float:
        """Returns the seconds of one step on the device, from its start to its last sampled id."""
        ...

    def stretch_seconds(self, shape: StepShape, steps: int) -> np.ndarray:
        """Returns the seconds of a decode-only step and of those after it with the same rows, each one token longer.

        The result is float64 [steps]. Each must equal what `seconds` returns for that step, bit by bit.
        """
        ...


class StepTime(NamedTuple):
    """Records measured steps that ran back to back: a step that samples nothing returns nothing to wait for, so its
    time is known only together with that of the steps up to the next that samples.
    """

    shapes: tuple[StepShape, ...]
    seconds: float


_REWEIGHTINGS = 3

_TERMS: tuple[str, ...] = (
    "decode_context",
    "prefill_pairs",
    "prefill_context",
    "padded_context",
    "longest",
    "prefill_steps",
    "prefill_slots",
)
"""Quantities besides its buckets with which the time of a step grows. padded_context: token_bucket x longest, for
kernels that let every row take as long as the longest. longest: for what they do once for all rows. prefill_steps,
prefill_slots: 1 and the token bucket of a step with prefill tokens, whose program also has room for tiles of more than
one token."""


@dataclasses.dataclass(frozen=True)
class FittedCosts:
    """Predicts costs fitted to measured steps: a time for each token bucket and each row bucket, and rates of
    attention.

    Attributes:
        token_seconds: by measured bucket; linear between and beyond them.
        row_seconds: by measured bucket; linear between and beyond them.
        rates: seconds a unit of each of `_TERMS`.
        error: mean of |fitted - measured| over mean measured.
    """

    name: str
    token_seconds: tuple[tuple[int, float], ...]
    row_seconds: tuple[tuple[int, float], ...]
    rates: Mapping[str, float]
    host: HostCosts
    preemption: PreemptionCosts
    swap_seconds_per_copy: float = 0.0
    error: float = 0.0
    _fixed: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def fit(
        cls,
        steps: Sequence[StepTime],
        *,
        name: str,
        host: HostCosts | None = None,
        swap_seconds_per_page: float = 0.0,
    ) -> FittedCosts:
        """Fits by non-negative least squares, so that every step costs something and more work never costs less.

        swap_seconds_per_page: a page out and in. Raises ValueError where there is no step to fit.
        """
        if not steps:
            raise ValueError("there are no measured steps; costs need at least one")
        shapes = [shape for step in steps for shape in step.shapes]
        token_sizes = sorted({shape.token_bucket for shape in shapes})
        row_sizes = sorted({shape.row_bucket for shape in shapes} - {0})
        measured = np.array([step.seconds for step in steps])
        columns = np.array([_features(step.shapes, token_sizes, row_sizes) for step in steps])
        found = _non_negative(columns, measured)
        for _ in range(_REWEIGHTINGS):
            # Weighted by what is fitted, never by what was measured: that would favor the steps that happened to be
            # fast, and the sum of all steps would come out too small.
            weight = 1 / np.sqrt(np.maximum(columns @ found, measured.mean() / 100))
            found = _non_negative(columns * weight[:, None], measured * weight)
        first, second = len(token_sizes), len(token_sizes) + len(row_sizes)
        token_seconds = tuple(zip(token_sizes, found[:first].tolist(), strict=True))
        rates = dict(zip(_TERMS, found[second:].tolist(), strict=True))
        largest, fixed = token_seconds[-1]
        per_token = fixed / largest + rates["prefill_slots"] + rates["prefill_pairs"] * largest / 2
        return cls(
            name=name,
            token_seconds=token_seconds,
            row_seconds=tuple(zip(row_sizes, found[first:second].tolist(), strict=True)),
            rates=rates,
            host=host or HostCosts(),
            preemption=PreemptionCosts(per_token, swap_seconds_per_page),
            swap_seconds_per_copy=swap_seconds_per_page / 2,
            error=float(np.abs(columns @ found - measured).mean() / measured.mean()),
        )

    def seconds(self, shape: StepShape) -> float:
        rates = self.rates
        return float(
            self._of_buckets(shape)
            + rates["prefill_pairs"] * shape.prefill_pairs
            + rates["prefill_context"] * shape.prefill_context
            + self.swap_seconds_per_copy * shape.swapped_pages
            + rates["decode_context"] * shape.decode_context
            + rates["padded_context"] * (shape.token_bucket * shape.longest)
            + rates["longest"] * shape.longest
            + (rates["prefill_steps"] + rates["prefill_slots"] * shape.token_bucket if shape.prefill_tokens else 0.0)
        )

    def stretch_seconds(self, shape: StepShape, steps: int) -> np.ndarray:
        rates, later = self.rates, np.arange(steps)
        return (
            self._of_buckets(shape)
            + rates["decode_context"] * (shape.decode_context + shape.decode_rows * later)
            + rates["padded_context"] * (shape.token_bucket * (shape.longest + later))
            + rates["longest"] * (shape.longest + later)
        )

    def _of_buckets(self, shape: StepShape) -> float:
        key = shape.token_bucket, shape.row_bucket
        seconds = self._fixed.get(key)
        if seconds is None:
            seconds = _between(self.token_seconds, key[0])
            seconds += _between(self.row_seconds, key[1]) if key[1] and self.row_seconds else 0.0
            self._fixed[key] = seconds
        return seconds


def write_costs(
    path: str | os.PathLike[str],
    steps: Sequence[StepTime],
    *,
    name: str,
    host: HostCosts,
    swap_seconds_per_page: float = 0.0,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes measured steps as a file that `read_costs` reads. about: describes where they were measured."""
    columns = {
        field: [getattr(shape, field) for step in steps for shape in step.shapes]
        for field in StepShape._fields
        if field != "swapped_pages"
    }
    counts, seconds = [len(step.shapes) for step in steps], [step.seconds for step in steps]
    document = {
        "kind": "jaxserve step times",
        "name": name,
        "about": dict(about or {}),
        "host": dataclasses.asdict(host),
        "swap_seconds_per_page": swap_seconds_per_page,
        "shapes": columns,
        "steps": {"count": counts, "seconds": seconds},
    }
    pathlib.Path(path).write_text(json.dumps(document) + "\n", encoding="utf-8")


def read_costs(path: str | os.PathLike[str]) -> FittedCosts:
    """Fits the steps of a file of `write_costs`; a ValueError names the file and what is wrong with it."""
    path = pathlib.Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        columns, steps = document["shapes"], document["steps"]
        fields = [field for field in StepShape._fields if field != "swapped_pages"]
        shapes = itertools.starmap(StepShape, zip(*(columns[field] for field in fields), strict=True))
        found = [
            StepTime(tuple(itertools.islice(shapes, count)), float(seconds))
            for count, seconds in zip(steps["count"], steps["seconds"], strict=True)
        ]
        return FittedCosts.fit(
            found,
            name=str(document["name"]),
            host=HostCosts(**document["host"]),
            swap_seconds_per_page=float(document["swap_seconds_per_page"]),
        )
    except OSError as error:
        raise ValueError(f"costs {path.name} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"costs {path.name} is not a file of measured steps: {type(error).__name__} {error}"
        ) from error


def _features(shapes: Sequence[StepShape], token_sizes: list[int], row_sizes: list[int]) -> list[float]:
    """Sums over the shapes: the count of each bucket, and each of `_TERMS`."""
    tokens = [shape.token_bucket for shape in shapes]
    rows = [shape.row_bucket for shape in shapes]
    return [
        *(float(tokens.count(size)) for size in token_sizes),
        *(float(rows.count(size)) for size in row_sizes),
        sum(shape.decode_context for shape in shapes),
        sum(shape.prefill_pairs for shape in shapes),
        sum(shape.prefill_context for shape in shapes),
        sum(shape.token_bucket * shape.longest for shape in shapes),
        sum(shape.longest for shape in shapes),
        sum(shape.prefill_tokens > 0 for shape in shapes),
        sum(shape.token_bucket for shape in shapes if shape.prefill_tokens),
    ]


def _non_negative(columns: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Solves least squares with solutions of at least 0: the most negative part is set to 0 until none is left.

    Not always the optimum that Lawson and Hanson's method finds, but close to it for these few well-separated columns.
    """
    scale = np.sqrt((columns**2).sum(axis=0))
    scale[scale == 0] = 1.0
    active = np.ones(columns.shape[1], bool)
    found = np.zeros(columns.shape[1])
    while active.any():
        found[:] = 0.0
        found[active] = np.linalg.lstsq(columns[:, active] / scale[active], wanted, rcond=None)[0]
        worst = int(found.argmin())
        if found[worst] >= -1e-12:
            break
        active[worst] = False
    return np.maximum(found, 0.0) / scale


def _between(points: Sequence[tuple[int, float]], size: int) -> float:
    """Interpolates the value at `size`; beyond the largest point it is proportional to it."""
    sizes, values = zip(*points, strict=True)
    if size > sizes[-1]:
        return values[-1] * size / sizes[-1]
    return float(np.interp(size, sizes, values))
