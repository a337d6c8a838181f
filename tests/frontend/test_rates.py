"""Rates that are measured and limited, against what happened."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.frontend.rates import Allowance, Average, RateMeter


@given(st.lists(st.tuples(st.floats(0.0, 20.0), st.floats(0.5, 80.0)), max_size=30), st.floats(1.0, 100.0))
def test_a_bucket_gives_no_more_than_a_minute_and_what_was_refilled(draws, per_minute):
    bucket, now, taken = Allowance(per_minute, 0.0), 0.0, []
    for pause, amount in draws:
        now += pause
        wait = bucket.seconds_until(amount, now)
        if wait == 0:
            bucket.take(amount, now)
            taken.append(amount)
        else:
            assert bucket.seconds_until(amount, now + 1.001 * wait + 1e-6) == 0
            assert bucket.seconds_until(amount, now + 0.9 * wait) > 0
    largest = max(taken, default=0.0)
    assert sum(taken) <= per_minute * (1 + now / 60) + max(largest - per_minute, 0.0) + 1e-6


def test_what_is_put_back_does_not_overfill():
    bucket = Allowance(60.0, 0.0)
    bucket.take(30, 0.0)
    assert not bucket.is_full(0.0)
    bucket.take(-100, 0.0)
    assert bucket.level(0.0) == 60
    assert bucket.is_full(0.0)


def test_a_steady_rate_is_found_and_an_old_one_fades():
    meter = RateMeter(fade_seconds=10.0)
    assert meter.rate is None
    for rate in (5.0, 50.0):
        for _ in range(int(60 * rate)):
            meter.passed(1 / rate)
            meter.happened()
        assert meter.rate == pytest.approx(rate, rel=0.05)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_the_first_values_weigh_alike(values):
    average = Average(weight=0.05)
    for value in values:
        average.add(value)
    assert average.value == pytest.approx(sum(values) / len(values))
