"""Computes Kendall's tau-b, which measures how well two rankings agree, ties allowed. Standard library only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Returns tau-b of the pairs (x, y): 1 where y rises with x throughout, -1 where it falls, near 0 where they are
    unrelated.

    None below two pairs, and where all x or all y are equal: there is no ranking then. O(n log n): discordant pairs are
    the inversions of y in order of x (Knight, A computer method for calculating Kendall's tau with ungrouped data,
    1966), counted here with a Fenwick tree.
    """
    total = _pairs_of(len(pairs))
    tied_x = _tied(x for x, _ in pairs)
    tied_y = _tied(y for _, y in pairs)
    if tied_x == total or tied_y == total:
        return None
    discordant = _inversions([y for _, y in sorted(pairs)])
    concordant = total - tied_x - tied_y + _tied(pairs) - discordant
    return (concordant - discordant) / math.sqrt((total - tied_x) * (total - tied_y))


def _pairs_of(count: int) -> int:
    return count * (count - 1) // 2


def _tied(values: Iterable[Hashable]) -> int:
    """Counts pairs of equal values."""
    return sum(_pairs_of(count) for count in Counter(values).values())


def _inversions(values: Sequence[float]) -> int:
    """Counts pairs in which the earlier value is the greater one."""
    ranks = {value: rank for rank, value in enumerate(sorted(set(values)), start=1)}
    counts = [0] * (len(ranks) + 1)  # Fenwick tree over ranks
    inversions = 0
    for seen, value in enumerate(values):
        rank = ranks[value]
        position, not_greater = rank, 0
        while position:
            not_greater += counts[position]
            position &= position - 1
        inversions += seen - not_greater
        while rank < len(counts):
            counts[rank] += 1
            rank += rank & -rank
    return inversions
