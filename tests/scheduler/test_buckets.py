"""The sizes that steps are padded to."""

import pytest

from jaxserve.config.settings import EngineConfig
from jaxserve.scheduler.buckets import Buckets

OPTIONS = {"model": "m", "max_num_batched_tokens": 100, "max_num_seqs": 40}


def test_a_gpu_has_powers_of_two_and_the_limits() -> None:
    buckets = Buckets.from_config(EngineConfig.from_options(**OPTIONS), "gpu")
    assert buckets == Buckets(tokens=(8, 16, 32, 64, 100), rows=(8, 16, 32, 40))


def test_a_cpu_has_sizes_between() -> None:
    buckets = Buckets.from_config(EngineConfig.from_options(**OPTIONS), "cpu")
    assert buckets == Buckets(tokens=(8, 16, 24, 32, 48, 64, 96, 100), rows=(8, 16, 24, 32, 40))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_configured_sizes_hold_everywhere(platform: str) -> None:
    config = EngineConfig.from_options(**OPTIONS, token_buckets=(20, 100), row_buckets=(40,))
    assert Buckets.from_config(config, platform) == Buckets((20, 100), (40,))
