"""Collects how long clients wait: for the first tokens of an answer, and from one delivery of tokens to the next."""

from __future__ import annotations

import dataclasses

MAX_VALUES = 4096
"""Values of a kind that are kept until they are taken; further ones are counted."""


@dataclasses.dataclass
class Latencies:
    """Holds the latencies in seconds since the last `take`.

    Attributes:
        first_tokens: from the arrival of a request to its first tokens.
        gaps: from one delivery of a request's tokens to the next; tokens that arrive together are one delivery.
        num_dropped: values beyond MAX_VALUES of a kind.
    """

    first_tokens: list[float] = dataclasses.field(default_factory=list)
    gaps: list[float] = dataclasses.field(default_factory=list)
    num_dropped: int = 0

    def add(self, values: list[float], seconds: float) -> None:
        """Adds a value to one of the two lists."""
        if len(values) < MAX_VALUES:
            values.append(seconds)
        else:
            self.num_dropped += 1

    def take(self) -> Latencies:
        """Returns what was collected, and begins anew."""
        taken = Latencies(self.first_tokens, self.gaps, self.num_dropped)
        self.first_tokens, self.gaps, self.num_dropped = [], [], 0
        return taken
