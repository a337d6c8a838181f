"""Predicts how many tokens a request will generate, learned online from requests that have finished.

Requests are grouped by what is known before they run, from fine to coarse; a group keeps the output lengths of its last
requests. The prediction for a request is a quantile of the lengths in the finest of its groups that has enough of them.
Whether outputs were within their predicted quantiles moves the level at which quantiles are read (adaptive conformal
inference: Gibbs and Candès, Adaptive conformal inference under distribution shift, 2021), so that a share q of all
outputs stays within the quantile q even while lengths drift.
"""

from __future__ import annotations

import bisect
import math
from array import array
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator

from jaxserve.config.scheduling import PredictionConfig
from jaxserve.request import EngineRequest
from jaxserve.scheduler.kendall import kendall_tau

MAX_GROUPS = 4096
"""Maximum number of groups kept, of all tenants together; one takes 16 bytes for each request of its window."""

ENOUGH = 16
"""Minimum number of finished requests for a group to be used."""

CORRECTION_RATE = 0.005
"""Step by which one finished request moves the level of a quantile."""

CORRECTED_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
"""Quantiles whose coverage is tracked, beside the configured one; corrections between them are interpolated."""

UNKNOWN_OUTPUT = 1024
"""Output tokens, beyond the prompt's length, that bound the prior of a request without similar predecessors."""

_UNBOUNDED = 2**62  # the output length of a request that ended because of its max_tokens


class OutputLengthPredictor:
    """Predicts output lengths. `observe` and predictions take O(log window) steps; the same calls give the same values.

    A request that ended at its max_tokens would have gone on: it is remembered as longer than any limit, and where the
    quantile falls among such, the prediction is the request's own max_tokens.
    """

    def __init__(self, config: PredictionConfig) -> None:
        self._quantile = config.prediction_quantile
        self._window = config.prediction_window
        self._groups: OrderedDict[Hashable, _Group] = OrderedDict()  # least recently used first
        self._levels = {q: q for q in sorted({*CORRECTED_QUANTILES, self._quantile})}
        self._ranked: deque[tuple[float, int]] = deque(maxlen=self._window)
        self._tau: float | None = None
        self._tau_of = 0  # num_observed that _tau belongs to
        self._num_observed = 0

    @property
    def num_observed(self) -> int:
        """Counts the finished requests observed so far."""
        return self._num_observed

    @property
    def num_groups(self) -> int:
        """Counts the groups kept now."""
        return len(self._groups)

    @property
    def kendall_tau(self) -> float | None:
        """Returns tau-b of predicted against actual lengths over the last window of finished requests.

        The predictions are those passed to `observe`, which the scheduler used. None while there is nothing to rank.
        """
        if self._tau_of != self._num_observed:
            self._tau = kendall_tau(self._ranked)
            self._tau_of = self._num_observed
        return self._tau

    def expected(self, request: EngineRequest) -> float:
        """Returns the expected output tokens of the request: the configured quantile; at least 1 and at most
        max_tokens."""
        return self.quantile(request, self._quantile)

    def quantile(self, request: EngineRequest, q: float) -> float:
        """Returns the output tokens that the request exceeds with probability 1 - q, 0 < q < 1; from 1 to
        max_tokens."""
        if not 0.0 < q < 1.0:
            raise ValueError(f"q is {q}; it must be above 0 and below 1")
        return self._predict(request, self._group(request), q, self._level(q))

    def observe(self, request: EngineRequest, output_tokens: int, expected: float | None = None) -> None:
        """Records a request that ended by itself (a stop id or its max_tokens, not an abort).

        Args:
            request: the request.
            output_tokens: the number of tokens it generated.
            expected: the value of `expected` when the request arrived, for `kendall_tau`; None leaves it out of the
                ranking.
        """
        if expected is not None:
            self._ranked.append((expected, output_tokens))
        group = self._group(request)
        least = 0.0
        for q, level in self._levels.items():
            within = output_tokens <= self._predict(request, group, q, level)
            least = min(max(level + CORRECTION_RATE * (q - within), least), 1.0)  # quantiles do not cross
            self._levels[q] = least
        length = _UNBOUNDED if output_tokens >= request.max_tokens else output_tokens
        for key in _group_keys(request):
            group = self._groups.get(key)
            if group is None:
                group = self._groups[key] = _Group(self._window)
                if len(self._groups) > MAX_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            group.add(length)
        self._num_observed += 1

    def _group(self, request: EngineRequest) -> _Group | None:
        """Returns the finest group of the request with enough observations, or else the coarsest; None when there is
        none."""
        group = None
        for key in _group_keys(request):
            group = self._groups.get(key)
            if group is not None and len(group) >= ENOUGH:
                return group
        return group

    def _level(self, q: float) -> float:
        """Returns the level at which quantile q is read, with the correction interpolated between tracked quantiles."""
        if q in self._levels:
            return self._levels[q]
        points = [(0.0, 0.0), *self._levels.items(), (1.0, 1.0)]
        right = bisect.bisect_left(points, (q, 0.0))
        (q0, level0), (q1, level1) = points[right - 1], points[right]
        return level0 + (level1 - level0) * (q - q0) / (q1 - q0)

    def _predict(self, request: EngineRequest, group: _Group | None, q: float, level: float) -> float:
        floor = max(1, request.min_tokens)
        prior = _prior(request, floor, q)
        if group is None:
            return prior
        learned = min(max(group.at(level), floor), request.max_tokens)
        if len(group) >= ENOUGH:
            return float(learned)
        trust = len(group) / ENOUGH
        blend = prior ** (1 - trust) * learned**trust
        return min(max(blend, float(floor)), float(request.max_tokens))  # rounding may carry it past them


class _Group:
    """Keeps the output lengths of the last requests of one kind, in order of finish and sorted."""

    __slots__ = ("_lengths", "_oldest", "_sorted", "_window")

    def __init__(self, window: int) -> None:
        self._window = window
        self._lengths = array("q")
        self._sorted = array("q")
        self._oldest = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, length: int) -> None:
        if len(self._lengths) < self._window:
            self._lengths.append(length)
        else:
            old = self._lengths[self._oldest]
            self._lengths[self._oldest] = length
            self._oldest = (self._oldest + 1) % self._window
            del self._sorted[bisect.bisect_left(self._sorted, old)]
        bisect.insort(self._sorted, length)

    def at(self, level: float) -> int:
        """Returns the smallest length that the next one exceeds with probability 1 - level at most; 0 and _UNBOUNDED
        lie outside."""
        rank = math.ceil(level * (len(self._sorted) + 1) - 1e-9)
        if rank > len(self._sorted):
            return _UNBOUNDED
        return self._sorted[rank - 1] if rank > 0 else 0


def _group_keys(request: EngineRequest) -> Iterator[Hashable]:
    """Yields the groups of a request, from fine to coarse: limits by powers of two, prompts by these and by
    quarters."""
    limits = (request.max_tokens.bit_length(), request.min_tokens.bit_length(), bool(request.stop_token_ids))
    quarter = int(4 * math.log2(len(request.prompt_token_ids) or 1))
    yield request.options.tenant, "quarter", quarter, limits
    yield request.options.tenant, "power", quarter // 4, limits
    yield request.options.tenant, limits
    yield "quarter", quarter, limits
    yield "power", quarter // 4, limits
    yield limits
    yield None


def _prior(request: EngineRequest, floor: int, q: float) -> float:
    """Returns the quantile of a request unlike any observed: any order of magnitude within its limits is equally
    likely."""
    if not request.stop_token_ids:
        return float(request.max_tokens)
    most = max(floor, min(request.max_tokens, UNKNOWN_OUTPUT + len(request.prompt_token_ids)))
    return min(floor * (most / floor) ** q, float(most))
