"""Divides a bounded resource among tenants by weight, and lends what one does not use to the others.

A tenant may always take up to its share of the whole, as long as something is free. Beyond that it may take what no
other tenant needs: for each other tenant that was refused lately all of that one's share is kept, for each other one
that has requests a unit of it. Nothing is taken back, so a tenant that was refused gets its share as the others'
requests end, which may not take the freed places again until then.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Claim:
    """Describes a tenant that has or wants something of the resource.

    weight: above 0. used: what it has. is_refused: it was refused lately. unit: what is kept for it otherwise, up to
    its share.
    """

    weight: float
    used: float
    is_refused: bool = False
    unit: float = 1.0


def share(weight: float, total_weight: float, capacity: float, least: float = 1.0) -> float:
    """Returns the tenant's share in whole units, and at least `least`."""
    return max(least, float(math.floor(capacity * weight / total_weight + 1e-9)))


def may_take(amount: float, claim: Claim, others: Sequence[Claim], capacity: float, used: float) -> bool:
    """Tells whether a tenant may take `amount` more.

    Args:
        amount: above 0.
        claim: the tenant's.
        others: claims of all other tenants that have or want something.
        capacity: of the resource.
        used: what of it is in use, by whomever.
    """
    if used + amount > capacity:
        return False
    total_weight = claim.weight + sum(other.weight for other in others)
    if claim.used + amount <= share(claim.weight, total_weight, capacity, amount):
        return True
    kept = 0.0
    for other in others:
        owed = share(other.weight, total_weight, capacity, other.unit) - other.used
        if owed > 0:
            kept += owed if other.is_refused else min(owed, other.unit)
    return used + amount + kept <= capacity
