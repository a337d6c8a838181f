"""Tracks what each tenant has, and compares the service of tenants with their weights. No clock, no input or output."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jaxserve.config.queue_limits import TenantConfig
from jaxserve.frontend.rates import Allowance, Average, RateMeter

_REMEMBERED = 4
"""Requests that are remembered in the comparison of service with weights, for each place."""

_GAIN = 3.0
"""Exponent of a correction: what is left of a constant error is its fourth root."""

_MOST_CORRECTION = 4.0

_LARGEST_UNIT = 1e9


class Tenant:
    """Tracks one tenant's requests."""

    def __init__(self, name: str, config: TenantConfig, now: float):
        self.name = name
        self.config = config
        self.num_open = self.num_waiting = self.waiting_tokens = 0
        self.refused_until = -1.0  # its share is kept for it; ends when it is let in
        self.wants_until = -1.0  # it counts among those that want more
        self.next_return = -math.inf  # when the client that was refused last was told to come back
        self.served = 0.0  # in the units of `Fairness`
        self.service = Average()  # of a request
        self.run = Average()  # seconds from first output to end
        self.output = Average()  # tokens of a request that was complete
        self.most_output = Average()  # what it might have had
        self.tokens = Average()  # that a request reserves
        self.starts = RateMeter()
        self.request_allowance = _allowance(config.requests_per_minute, now)
        self.token_allowance = _allowance(config.tokens_per_minute, now)

    def is_idle(self, now: float) -> bool:
        """Whether nothing is lost when it is forgotten."""
        allowances = (self.request_allowance, self.token_allowance)
        full = all(one is None or one.is_full(now) for one in allowances)
        return not self.num_open and now >= self.wants_until and full


def _allowance(per_minute: float | None, now: float) -> Allowance | None:
    return None if per_minute is None else Allowance(per_minute, now)


class Fairness:
    """Compares the service that tenants had of late with their weights.

    max_open: unfinished requests, of which a few times as many are remembered.
    """

    def __init__(self, max_open: int):
        self._growth = 1 + 1 / max(_REMEMBERED * max_open, 100)
        self._unit = 1.0

    def add(self, tenant: Tenant, service: float, tenants: Iterable[Tenant]) -> None:
        """Counts the service of a request that has ended; all that was counted before fades a little."""
        self._unit *= self._growth
        tenant.served += self._unit * service
        if self._unit > _LARGEST_UNIT:
            for each in {tenant, *tenants}:
                each.served /= self._unit
            self._unit = 1.0

    def lift(self, tenant: Tenant, active: Iterable[Tenant]) -> None:
        """Gives a tenant that comes back what the others had meanwhile, so that a pause saves nothing."""
        served, weights = self._sums(active)
        if weights:
            tenant.served = max(tenant.served, tenant.config.weight * served / weights)

    def corrections(self, tenants: Iterable[Tenant], now: float) -> dict[Tenant, float]:
        """Returns by how much each tenant's share should differ from its weight.

        Above 1 for one that had too little. Those that were not refused lately have what they want, and do not count.
        """
        wanting = [each for each in tenants if now < each.wants_until]
        served, weights = self._sums(wanting)
        found = dict.fromkeys(tenants, 1.0)
        if served:
            for each in wanting:
                due = each.config.weight * served / weights
                correction = (due / max(each.served, 1e-9)) ** _GAIN
                found[each] = min(max(correction, 1 / _MOST_CORRECTION), _MOST_CORRECTION)
        return found

    @staticmethod
    def _sums(tenants: Iterable[Tenant]) -> tuple[float, float]:
        pairs = [(each.served, each.config.weight) for each in tenants]
        return sum(served for served, _ in pairs), sum(weight for _, weight in pairs)
