"""Looks for what is no token id among many. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence

IDS_PER_PART = 16 * 1024
"""Maximum number of token ids that are handled at one time: whatever is done with them holds the interpreter lock for
a millisecond at most."""


def first_wrong_id(token_ids: Sequence[int], vocab_size: float = math.inf) -> int | None:
    """Returns the index of the first item that is no whole number from 0 to vocab_size - 1; None without one.

    vocab_size: without it, any whole number is taken.
    """
    for start in range(0, len(token_ids), IDS_PER_PART):
        part = token_ids[start : start + IDS_PER_PART]
        # Two passes in C, at a fifth of the cost of a loop; other threads run between two parts.
        if set(map(type, part)) <= {int} and (vocab_size == math.inf or (min(part) >= 0 and max(part) < vocab_size)):
            continue
        for index, token_id in enumerate(part, start):
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                return index
            if vocab_size != math.inf and not 0 <= token_id < vocab_size:
                return index
    return None
