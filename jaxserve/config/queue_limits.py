"""Bounds what may wait in front of the engine, as frozen dataclasses that validate themselves. Standard library only.

jaxserve/frontend/admission.py keeps the bounds; docs/admission.md says what a client sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxserve.config.checks import at_least, between


@dataclasses.dataclass(frozen=True)
class TenantConfig:
    """Configures what one tenant may have; None is no limit of its own.

    weight: its share of the waiting room, and of service under policy "fair", against the weights of the other tenants
    that have requests.
    max_requests: unfinished requests. max_waiting_requests: requests without output yet. max_waiting_tokens: their
    prompts' tokens and the output tokens that they may take.
    requests_per_minute, tokens_per_minute: rates, with what a minute allows as the burst; tokens are those of prompts
    and of output.
    """

    weight: float = 1.0
    max_requests: int | None = None
    max_waiting_requests: int | None = None
    max_waiting_tokens: int | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None

    def __post_init__(self) -> None:
        between("weight", self.weight, 1e-6, 1e6)
        for name in ("max_requests", "max_waiting_requests", "max_waiting_tokens"):
            if (value := getattr(self, name)) is not None:
                at_least(name, value, 1)
        for name in ("requests_per_minute", "tokens_per_minute"):
            if (value := getattr(self, name)) is not None:
                between(name, value, 1.0)


@dataclasses.dataclass(frozen=True)
class QueueConfig:
    """Configures the waiting room of a server, beside SchedulerConfig.max_num_waiting.

    max_waiting_tokens: tokens of the prompts of all requests without output, and the output tokens that they may take.
    A request that exceeds it alone is let in while nothing else waits.
    max_waiting_seconds: a request is refused when it would wait longer for its first token, as predicted from the rate
    at which requests start; None never. drop_unreachable: one whose deadline cannot be met by that prediction ends with
    DEADLINE_EXCEEDED instead of waiting. Both count only while more requests are unfinished than can run, under the
    policies "fcfs" and "fair".
    min_retry_seconds, max_retry_seconds: bounds of the time after which a refused client is told to try again.
    tenants: by name. default_tenant: of those that are not named. max_tenants: tenants that are told apart at one time;
    further ones count as one.
    """

    max_waiting_tokens: int = 8 * 1024 * 1024
    max_waiting_seconds: float | None = None
    drop_unreachable: bool = True
    min_retry_seconds: float = 0.1
    max_retry_seconds: float = 30.0
    tenants: Mapping[str, TenantConfig] = dataclasses.field(default_factory=dict)
    default_tenant: TenantConfig = TenantConfig()
    max_tenants: int = 1024

    def __post_init__(self) -> None:
        at_least("max_waiting_tokens", self.max_waiting_tokens, 1)
        if self.max_waiting_seconds is not None:
            between("max_waiting_seconds", self.max_waiting_seconds, 0.001)
        between("min_retry_seconds", self.min_retry_seconds, 0.001, 3600.0)
        between("max_retry_seconds", self.max_retry_seconds, 0.001, 3600.0)
        if self.max_retry_seconds < self.min_retry_seconds:
            raise ValueError(
                f"max_retry_seconds is {self.max_retry_seconds}; it must be at least min_retry_seconds "
                f"{self.min_retry_seconds}"
            )
        at_least("max_tenants", self.max_tenants, 1)
        if len(self.tenants) > self.max_tenants:
            raise ValueError(
                f"tenants has {len(self.tenants)} entries; max_tenants is {self.max_tenants}: raise it to at least that"
            )

    def tenant(self, name: str) -> TenantConfig:
        """Returns the settings of a tenant."""
        return self.tenants.get(name, self.default_tenant)

    @property
    def relative_weights(self) -> dict[str, float]:
        """Returns the weights of the named tenants where one that is not named has 1, as policy "fair" takes them."""
        return {name: tenant.weight / self.default_tenant.weight for name, tenant in self.tenants.items()}
