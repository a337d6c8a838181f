"""Decides whether cached pages come back from host memory or are computed again, and counts how often that was wrong.

The choice is a pure function of predicted step times and of the measured time of a copy (`fetch_and_compute_seconds`).
It was wrong where the step that it is about then took so much longer than predicted that the other choice would have
been faster, by its prediction.
"""

from __future__ import annotations

import dataclasses

from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.preemption_costs import PreemptionCosts, configured_costs
from jaxserve.scheduler.prefix_costs import StepSeconds, chunk_shape, prefill_seconds
from jaxserve.scheduler.step_shape import shape_of

_WEIGHT = 0.1
"""Weight of a step in the correction of predictions."""


@dataclasses.dataclass(frozen=True)
class FetchChoice:
    """Describes a choice about pages of host memory. fetches: they come back. num_tokens: their tokens. margin: by how
    many predicted seconds the other choice is slower; None where nothing was predicted."""

    fetches: bool
    num_tokens: int
    margin: float | None = None


@dataclasses.dataclass
class FetchCounts:
    """Counts choices since the start. fetched, computed: requests whose pages came back, or were computed again.
    wrong: of both, those that turned out slower than the other would have been."""

    fetched: int = 0
    computed: int = 0
    wrong: int = 0


@dataclasses.dataclass(frozen=True)
class FetchPredictor:
    """Predicts both choices. seconds: of a step. page_seconds: of the copy of one page from host memory. pace: most
    tokens of one prompt in a step."""

    seconds: StepSeconds
    page_seconds: float
    buckets: Buckets
    pace: int


def fetch_and_compute_seconds(
    predictor: FetchPredictor, *, start: int, fetched: int, pages: int, own: int
) -> tuple[float, float]:
    """Predicts when a request has computed its prompt if pages come back from host memory, and if they do not.

    Args:
        predictor: of steps and copies.
        start: tokens of the prompt whose pages are on the device.
        fetched: tokens behind these whose pages are in host memory.
        pages: number of pages to copy, of all groups of layers.
        own: tokens behind these.

    Returns:
        Seconds until the last token is computed, with the pages copied and with their tokens computed again.
    """
    seconds, pace, buckets = predictor.seconds, predictor.pace, predictor.buckets
    fetch = pages * predictor.page_seconds + prefill_seconds(seconds, start + fetched, own, pace, buckets)
    return fetch, prefill_seconds(seconds, start, fetched + own, pace, buckets)


def measured_seconds(seconds: StepSeconds | None, costs: PreemptionCosts, buckets: Buckets) -> StepSeconds:
    """Returns a predictor of step times that agrees with the time of a full step of prompts as it was measured.

    seconds: gives the shape of the prediction; None takes time as proportional to a step's tokens.
    """
    tokens = buckets.tokens[-1]
    measured = costs.recompute_seconds_per_token * tokens
    if seconds is None:
        return lambda shape: costs.recompute_seconds_per_token * shape.token_bucket
    predicted = seconds(chunk_shape(0, tokens, buckets))
    factor = measured / predicted if predicted > 0 else 1.0
    return lambda shape: factor * seconds(shape)


class HostFetches:
    """Makes the choices of one scheduler. predictor: None where nothing was measured: then pages always come back."""

    @classmethod
    def configured(
        cls, config: SchedulerConfig, seconds: StepSeconds | None, costs: PreemptionCosts | None, buckets: Buckets
    ) -> HostFetches:
        """Makes the choices of a scheduler with this configuration.

        Args:
            config: may replace what was measured.
            seconds: predicts a step's time; None where nothing is known of the device but `costs`.
            costs: as measured, if they were.
            buckets: that steps are padded to.
        """
        costs = configured_costs(config.preemption, costs)
        if costs is None:
            return cls(None)
        most, threshold = config.max_num_batched_tokens, config.long_prefill_token_threshold
        pace = min(most, threshold or most)
        return cls(FetchPredictor(measured_seconds(seconds, costs, buckets), costs.fetch_seconds, buckets, pace))

    def __init__(self, predictor: FetchPredictor | None):
        self._predictor = predictor
        self._pending: list[float] = []  # margins of the choices made for the step that is planned next
        self._planned: tuple[float, list[float]] | None = None  # predicted seconds of the step planned last, margins
        self._judged: tuple[float, float, list[float]] | None = None  # of the step before, and when it began
        self._correction: float | None = None  # of predicted seconds, by those of steps before
        self.counts = FetchCounts()

    def choose(self, start: int, fetched: int, pages: int, known: int, more_seconds: float = 0.0) -> FetchChoice:
        """Chooses for a request of `known` tokens, of which `fetched` behind the first `start` are in `pages` pages of
        host memory, or will be in `more_seconds`."""
        if self._predictor is None:
            return FetchChoice(True, fetched)
        own = known - start - fetched
        fetch, compute = fetch_and_compute_seconds(self._predictor, start=start, fetched=fetched, pages=pages, own=own)
        fetch += more_seconds
        return FetchChoice(fetch < compute, fetched, abs(compute - fetch))

    def chosen(self, choice: FetchChoice) -> None:
        """Records that a request was admitted by a choice."""
        if choice.fetches:
            self.counts.fetched += 1
        else:
            self.counts.computed += 1
        if choice.margin is not None:
            self._pending.append(choice.margin)

    def planned(self, plan: StepPlan | None, now: float) -> None:
        """Records the step that was planned at `now`, or that there was none to plan.

        The engine plans a step while the one before is computed, and the next one when that has ended: a step takes the
        time between the two plannings after its own.
        """
        if self._predictor is None:
            return
        self._judge(now)
        planned, self._planned, self._judged = self._planned, None, None
        if plan is None:
            return  # the next planning may be much later
        if planned is not None:
            self._judged = now, *planned
        margins, self._pending = self._pending, []
        if plan.chunks:
            steps = self._predictor.seconds(shape_of(plan)._replace(swapped_pages=0))
            self._planned = steps + len(plan.copies) * self._predictor.page_seconds, margins

    def _judge(self, now: float) -> None:
        """Compares the time of a step that had a prompt with its prediction."""
        if self._judged is None:
            return
        begin, predicted, margins = self._judged
        ratio = (now - begin) / predicted if predicted > 0 else 1.0
        correction = ratio if self._correction is None else self._correction
        late = now - begin - correction * predicted
        self.counts.wrong += sum(late > correction * margin for margin in margins)
        ratio = min(ratio, 2 * correction)  # a longer step was held up
        self._correction = correction + _WEIGHT * (ratio - correction)
