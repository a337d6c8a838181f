"""Turns the deltas of one output into updates of the kind that its request asks for."""

from __future__ import annotations

from jaxserve.frontend.delta import Delta
from jaxserve.frontend.delta_stream import merged
from jaxserve.request import RequestOutputKind

_MOST_DELTAS = 64
"""Deltas that are kept apart at most, so that what waits for the end is not one object a token."""


class OutputUpdates:
    """Makes updates of deltas; None of a delta after which there is no update.

    kind: what they hold; None is DELTA.
    """

    def __init__(self, kind: RequestOutputKind | None):
        self._kind = kind or RequestOutputKind.DELTA
        self._held: list[Delta] = []

    def of(self, delta: Delta) -> Delta | None:
        """Takes the next delta of the output."""
        if self._kind is RequestOutputKind.DELTA:
            return delta
        self._held.append(delta)
        if self._kind is RequestOutputKind.CUMULATIVE or delta.finish_reason is not None:
            self._held = [merged(self._held)]
            return self._held[0]
        if len(self._held) > _MOST_DELTAS:
            self._held = [merged(self._held)]
        return None
