"""tau-b against the definition: every pair looked at."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.scheduler.kendall import kendall_tau


def tau_by_definition(pairs: list[tuple[float, float]]) -> float | None:
    score = untied_x = untied_y = 0
    for (x, y), (other_x, other_y) in itertools.combinations(pairs, 2):
        score += ((x > other_x) - (x < other_x)) * ((y > other_y) - (y < other_y))
        untied_x += x != other_x
        untied_y += y != other_y
    return score / math.sqrt(untied_x * untied_y) if untied_x and untied_y else None


values = st.one_of(st.integers(0, 4), st.floats(-10, 10))


@given(st.lists(st.tuples(values, values), max_size=40))
def test_equals_the_definition(pairs: list[tuple[float, float]]):
    expected = tau_by_definition(pairs)
    assert kendall_tau(pairs) == (expected if expected is None else pytest.approx(expected))


def test_of_long_rankings():
    ascending = [(float(i), i) for i in range(5000)]
    assert kendall_tau(ascending) == 1.0
    assert kendall_tau([(x, -y) for x, y in ascending]) == -1.0
    assert kendall_tau([(x, y // 2) for x, y in ascending]) == pytest.approx(tau_of_paired_ties(5000))


def tau_of_paired_ties(count: int) -> float:
    total, tied = count * (count - 1) / 2, count / 2
    return (total - tied) / math.sqrt(total * (total - tied))
