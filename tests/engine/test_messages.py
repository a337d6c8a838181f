"""Messages and configurations survive the wire; what is not a message is refused."""

from __future__ import annotations

import dataclasses

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.config.wire_config import config_from_bytes, config_to_bytes
from jaxserve.engine.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    RequestOutput,
    Shutdown,
    TokenBatch,
    decode,
    encode,
)
from jaxserve.models.config import ModelConfig, RopeScaling
from jaxserve.request import EngineRequest, FinishReason

READY = EngineReady(
    101, 256, 256, (1, 2), 16, 63, 8, 100, 5, "Llama", "float32", "cpu", "xla", 4, 1.5, 2.5, "int8", "bundles/llama"
)

ids = st.tuples() | st.lists(st.integers(0, 2**31 - 1), max_size=8).map(tuple)
requests = st.builds(
    EngineRequest,
    request_id=st.text(max_size=20),
    prompt_token_ids=ids,
    max_tokens=st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 10),
    seed=st.integers(0, 2**63 - 1),
    stop_token_ids=ids,
    tenant=st.text(max_size=5),
    priority=st.integers(-(2**31), 2**31 - 1),
    deadline=st.none() | st.floats(0, 1e12),
    cache_salt=st.text(max_size=5),
)
messages = st.one_of(
    st.builds(AddRequest, requests),
    st.builds(AbortRequest, st.text()),
    st.just(Shutdown()),
    st.just(READY),
    st.builds(RequestOutput, st.text(), ids, st.none() | st.sampled_from(FinishReason), st.text()),
    st.builds(TokenBatch, st.lists(st.text(max_size=9), max_size=4).map(tuple), ids),
    st.builds(EngineStats, num_running=st.integers(0, 2**40)),
    st.builds(EngineFailed, st.text()),
)


@given(messages)
def test_every_message_survives(message):
    assert decode(encode(message)) == message


@pytest.mark.parametrize("data", [[], [99], [-1], {"a": 1}, [1], [1, "a", "b"], "text"])
def test_what_is_not_a_message_is_refused(data):
    with pytest.raises(ValueError, match="engine message"):
        decode(msgpack.packb(data) or b"")


def test_a_configuration_survives():
    config = EngineConfig(
        model="somewhere",
        architecture=ModelConfig(
            "LlamaForCausalLM", 9, 8, 8, 1, 2, 1, 4, 64, rope_scaling=RopeScaling("linear", 2.0), eos_token_ids=(3, 4)
        ),
        scheduler=SchedulerConfig(max_num_seqs=8),
        cache=CacheConfig(page_size=32, num_pages=7),
        token_buckets=(8, 512),
    )
    assert config_from_bytes(config_to_bytes(config)) == config


def test_a_wrong_configuration_is_refused():
    values = dataclasses.asdict(EngineConfig(model="somewhere"))
    with pytest.raises(ValueError, match=r"EngineConfig has unknown fields \['colour'\]"):
        config_from_bytes(msgpack.packb({**values, "colour": 1}) or b"")
    with pytest.raises(ValueError, match="page_size is 3"):
        config_from_bytes(msgpack.packb({**values, "cache": {"page_size": 3}}) or b"")


def test_limits_follow_from_what_the_engine_says():
    limits = READY.limits
    assert (limits.vocab_size, limits.max_model_len, limits.pool_tokens) == (101, 256, 16 * 63)
