"""Settings of the queue and its tenants, and where their weights go."""

from __future__ import annotations

import re

import pytest

from jaxserve.config import gin_config
from jaxserve.config.queue_limits import QueueConfig, TenantConfig
from jaxserve.config.scheduling import PolicyConfig, SchedulerConfig
from jaxserve.config.settings import EngineConfig, ServerConfig


def server(weights: dict[str, float] | None = None, **queue) -> ServerConfig:
    scheduler = SchedulerConfig(ordering=PolicyConfig(tenant_weights=weights or {}))
    return ServerConfig(EngineConfig(model="m", scheduler=scheduler), queue=QueueConfig(**queue))


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (TenantConfig, {"weight": 0.0}, "weight is 0.0; it must be finite and from 1e-06 to 1e+06"),
        (TenantConfig, {"max_requests": 0}, "max_requests is 0; it must be at least 1"),
        (TenantConfig, {"max_waiting_tokens": 1.5}, "max_waiting_tokens is 1.5; it must be a whole number"),
        (TenantConfig, {"tokens_per_minute": 0.5}, "tokens_per_minute is 0.5; it must be finite and at least 1"),
        (QueueConfig, {"max_waiting_tokens": 0}, "max_waiting_tokens is 0; it must be at least 1"),
        (QueueConfig, {"max_retry_seconds": 0.05}, "max_retry_seconds is 0.05; it must be at least min_retry_seconds"),
        (QueueConfig, {"max_waiting_seconds": 0}, "max_waiting_seconds is 0; it must be finite and at least 0.001"),
        (
            QueueConfig,
            {"max_tenants": 1, "tenants": {"a": TenantConfig(), "b": TenantConfig()}},
            "tenants has 2 entries; max_tenants is 1: raise it to at least that",
        ),
    ],
)
def test_invalid_settings(config, fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        config(**fields)


def test_weights_of_tenants_are_those_of_the_policy():
    config = server(tenants={"a": TenantConfig(weight=4.0)}, default_tenant=TenantConfig(weight=2.0))
    assert config.engine.scheduler.ordering.tenant_weights == {"a": 2.0}  # one without an entry has 1 there
    config = server({"a": 3.0}, default_tenant=TenantConfig(max_requests=5))
    assert config.queue.tenant("a") == TenantConfig(weight=3.0, max_requests=5)
    assert server().engine.scheduler.ordering.tenant_weights == {}
    with pytest.raises(ValueError, match=r"^tenant_weights is {'a': 3.0} and the weights of tenants are {'a': 4.0}:"):
        server({"a": 3.0}, tenants={"a": TenantConfig(weight=4.0)})


def test_tenants_are_read_from_a_configuration_file():
    tenants = "QueueConfig.tenants={'gold': {'weight': 4, 'max_requests': 8}}"
    config, _ = gin_config.load("tiny.gin", [tenants, "TenantConfig.requests_per_minute=60"])
    assert config.queue.tenant("gold") == TenantConfig(weight=4.0, max_requests=8)
    assert config.queue.tenant("other") == TenantConfig(requests_per_minute=60.0)
    assert config.engine.scheduler.ordering.tenant_weights == {"gold": 4.0}
    with pytest.raises(gin_config.ConfigError, match=r"it must be a dict from text in quotes to a dict of weight, max"):
        gin_config.load("tiny.gin", ["QueueConfig.tenants={'gold': {'wait': 4}}"])
