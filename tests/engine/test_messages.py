"""Messages and configurations survive the wire; what is not a message is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.config.wire_config import config_from_bytes, config_to_bytes
from jaxserve.engine.messages import (
    AbortRequest,
    AddRequest,
    CacheEvents,
    CaptureProfile,
    CaptureTimeline,
    EngineFailed,
    EngineOutput,
    EngineStats,
    FlushPrefixCache,
    FollowCacheEvents,
    PrefixCacheFlushed,
    ProfileCaptured,
    Shutdown,
    TimelineEvents,
    TokenBatch,
    decode,
    encode,
)
from jaxserve.kv_cache.event_log import CacheEvent, CacheEventKind
from jaxserve.models.config import ModelConfig, RopeScaling
from jaxserve.request import EngineRequest, FinishReason, RequestOptions
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.telemetry.histograms import HistogramCounts
from tests.engine_ready import engine_ready

READY = engine_ready(
    vocab_size=101,
    max_model_len=256,
    eos_token_ids=(1, 2),
    usable_pages=63,
    max_num_seqs=8,
    max_num_waiting=100,
    bundle="bundles/llama",
    phases=(("weights", 0.5, 1.25),),
    memory=(("weights", 5_000_000),),
    preemption_costs=PreemptionCosts(1e-5, 2e-4),
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
    options=st.builds(
        RequestOptions,
        tenant=st.text(max_size=5),
        priority=st.integers(1 - 2**31, 2**31 - 1),
        deadline=st.none() | st.floats(0, 1e12),
        cache_salt=st.text(max_size=5),
    ),
)
hashes = st.integers(-(2**63), 2**63 - 1)
cache_events = st.builds(
    CacheEvent,
    st.sampled_from(CacheEventKind),
    st.text(max_size=5),
    st.lists(hashes, max_size=3).map(tuple),
    st.none() | hashes,
    ids,
    hashes,
    st.booleans(),
)
messages = st.one_of(
    st.builds(AddRequest, requests),
    st.builds(AbortRequest, st.text()),
    st.just(Shutdown()),
    st.just(READY),
    st.builds(EngineOutput, st.text(), ids, st.none() | st.sampled_from(FinishReason), st.text()),
    st.builds(TokenBatch, st.lists(st.text(max_size=9), max_size=4).map(tuple), ids),
    st.builds(
        EngineStats,
        num_running=st.integers(0, 2**40),
        step_histograms=st.dictionaries(st.text(max_size=5), st.builds(HistogramCounts, ids, st.floats(0, 1e9))),
    ),
    st.builds(CaptureTimeline, st.booleans()),
    st.builds(CaptureProfile, st.text(), st.floats(0, 1e3)),
    st.builds(TimelineEvents, st.lists(st.tuples(st.text(), st.floats(0, 1e9)), max_size=3).map(tuple), st.booleans()),
    st.builds(ProfileCaptured, st.text(), st.text()),
    st.builds(EngineFailed, st.text()),
    st.builds(FlushPrefixCache, st.integers(0, 2**31)),
    st.builds(PrefixCacheFlushed, st.integers(0, 2**31), st.integers(0, 2**31)),
    st.builds(FollowCacheEvents, st.integers(0, 2**31)),
    st.builds(CacheEvents, st.just(1), st.lists(cache_events, max_size=3).map(tuple)),
)


@given(messages)
def test_every_message_survives(message):
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        [],
        ["Unknown"],
        [-1],
        {"a": 1},
        ["AbortRequest"],
        ["AbortRequest", "a", "b"],
        ["AbortRequest", 5],
        ["TokenBatch", ["a"], ["b"]],
        ["TokenBatch", ["a"], [2**70 // 2**6 + 0.5]],
        ["EngineOutput", "a", [1], "nonsense"],
        ["AddRequest", {"request_id": "a"}],
        ["AddRequest", {"request_id": "a", "prompt_token_ids": [1], "max_tokens": "3"}],
        ["AddRequest", {"request_id": "a", "prompt_token_ids": [1], "max_tokens": 3, "options": {"priority": 2**40}}],
        "text",
    ],
    ids=str,
)
def test_what_is_not_a_message_is_refused(data):
    with pytest.raises(ValueError, match=r"^engine message is malformed: ") as caught:
        decode(msgspec.msgpack.encode(data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\x92\xacAbortRequest", b"\x92\xacAbortRequest\xa1\xff", b"\xc1"], ids=repr)
def test_bytes_that_are_cut_or_no_msgpack_are_refused(data):
    with pytest.raises(ValueError, match=r"^engine message is malformed: "):
        decode(data)


def test_subclasses_of_plain_values_arrive_plain():
    """numpy's float64 is a float, and callers have it as a deadline or a temperature; its integers are no ints."""
    options = RequestOptions(tenant=np.str_("t"), deadline=np.float64(2.5))
    message = AddRequest(EngineRequest("a", (1,), max_tokens=1, temperature=np.float64(0.5), options=options))
    found = decode(encode(message))
    assert isinstance(found, AddRequest)
    assert found == message
    assert [type(value) for value in (found.request.temperature, found.request.options.deadline)] == [float, float]
    number: Any = np.int32(5)
    with pytest.raises(TypeError, match="a message cannot hold a int32"):
        encode(TokenBatch(("a",), (number,)))


def test_a_message_is_read_by_the_names_of_its_kind():
    """One that is sent as a list: its kind, then its fields in order."""
    assert msgspec.msgpack.decode(encode(TokenBatch(("a", "b"), (5, 6), 0.5))) == [
        "TokenBatch", ["a", "b"], [5, 6], 0.5, None,
    ]  # fmt: skip


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
    with pytest.raises(ValueError, match=r"EngineConfig has unknown fields \['color'\]"):
        config_from_bytes(msgspec.msgpack.encode({**values, "color": 1}))
    with pytest.raises(ValueError, match="page_size is 3"):
        config_from_bytes(msgspec.msgpack.encode({**values, "cache": {"page_size": 3}}))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"cache": {"page_size": 32, "color": 1}}, r"CacheConfig has unknown fields \['color'\]"),
        ({"seed": "1"}, "`int`"),
        ({"token_buckets": 5}, "`array"),
        ({"scheduler": {"policy": "lottery"}}, "policy is 'lottery'"),
    ],
)
def test_a_wrong_value_of_a_configuration_is_refused(change, line):
    values = dataclasses.asdict(EngineConfig(model="somewhere"))
    with pytest.raises(ValueError, match=line):
        config_from_bytes(msgspec.msgpack.encode({**values, **change}))
