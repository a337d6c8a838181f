"""Turns the deltas of a request into updates of the kind that it asks for."""

from __future__ import annotations

from jaxserve.frontend.delta import Delta
from jaxserve.frontend.delta_stream import merged
from jaxserve.sampling_params import RequestOutputKind

_MOST_DELTAS = 64
"""Deltas that are kept apart at most, so that what waits for the end is not one object a token."""


class OutputUpdates:
    """Makes updates of the deltas of a request, of each sample for itself; None of a delta after which there is none.

    kind: what they hold; None is DELTA.
    """

    def __init__(self, kind: RequestOutputKind | None):
        self._kind = kind or RequestOutputKind.DELTA
        self._held: dict[int, list[Delta]] = {}  # by sample

    def of(self, delta: Delta) -> Delta | None:
        """Takes the next delta of the request."""
        if self._kind is RequestOutputKind.DELTA:
            return delta
        held = self._held.setdefault(delta.index, [])
        held.append(delta)
        is_due = self._kind is RequestOutputKind.CUMULATIVE or delta.finish_reason is not None
        if is_due or len(held) > _MOST_DELTAS:
            held[:] = [merged(held)]
        return held[0] if is_due else None
