"""Values in messages are short, whatever a client sends."""

import time

import pytest

from jaxserve.config.shown import clipped, shown, shown_seconds
from jaxserve.sampling_params import SamplingParams

HUGE = 10**400


def next_key(values):
    """The name of a case: its values may be long."""
    return next(iter(values))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a'b", repr("a'b")),
        (-3, "-3"),
        (2**63, "9223372036854775808"),
        (HUGE, "a whole number of 1329 bits"),
        (-1e308, "-1e+308"),
        ([1, [2]], "[1, [2]]"),
        ({}, "{}"),
        ({"b": 1, "a": None}, "{'a': None, 'b': 1}"),
        (None, "None"),
        ([HUGE], "[a whole number of 1329 bits]"),
    ],
)
def test_short_values_are_shown_whole(value, text):
    assert shown(value) == text


@pytest.mark.parametrize(
    "value",
    [
        "x" * 4_000_000,
        "😀\n" * 1_000_000,
        b"x" * 4_000_000,
        [0] * 1_000_000,
        [["x" * 1000] * 1000] * 1000,
        {str(number): number for number in range(100_000)},
        10**100_000,
        ("x" * 100_000,) * 100,
    ],
    ids=["text", "emoji", "bytes", "list", "nested", "object", "number", "tuple"],
)
def test_long_values_are_cut_and_cost_nothing(value):
    begin = time.process_time()
    assert len(shown(value)) <= 200
    assert time.process_time() - begin < 0.1


def test_both_ends_of_a_cut_text_are_there():
    assert clipped("abcdefghijklmnop", 11) == "abc ... nop"
    assert clipped("abc", 11) == "abc"


def test_time_spans():
    assert shown_seconds(1.5) == "1.500 s"
    assert shown_seconds(1e308) == "1e+308 s"


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": "x" * 1_000_000},
        {"temperature": HUGE},
        {"top_k": HUGE},
        {"seed": "9" * 1_000_000},
        {"max_tokens": [0] * 1_000_000},
        {"stop": ("x" * 1_000_000,)},
        {"stop": ([0] * 1_000_000,)},
        {"stop": range(10**9)},
        {"stop": {"x" * 1_000_000: 1}},
        {"stop_token_ids": range(10**9)},
        {"stop_token_ids": ("x" * 1_000_000,)},
        {"ignore_eos": "x" * 1_000_000},
    ],
    ids=next_key,
)
def test_errors_of_sampling_parameters_are_short(values):
    begin = time.process_time()
    with pytest.raises(ValueError, match=next_key(values)) as caught:
        SamplingParams(**values)
    assert len(str(caught.value)) < 300
    assert time.process_time() - begin < 0.5
