"""How a bounded resource is divided, against a search that hands out one unit after another."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.frontend.shares import Claim, may_take

CLAIMS = st.builds(
    Claim, weight=st.integers(1, 8), used=st.integers(0, 12), is_refused=st.booleans(), unit=st.just(1.0)
)


def model(claim: Claim, others: list[Claim], capacity: int, used: int) -> bool:
    """Whether one more unit may be taken, with whole units set aside one by one for those that they are owed to."""
    free = capacity - used
    if free < 1:
        return False
    total = sum(int(one.weight) for one in (claim, *others))

    def share(one: Claim) -> int:
        return max(1, int(Fraction(capacity * int(one.weight), total)))

    if claim.used + 1 <= share(claim):
        return True
    free -= 1
    for other in others:
        given_to = 0
        while other.used + given_to < share(other) and (other.is_refused or not given_to):
            free -= 1
            given_to += 1
    return free >= 0


@given(CLAIMS, st.lists(CLAIMS, max_size=4), st.integers(1, 40), st.integers(0, 10))
def test_against_units_handed_out_one_by_one(claim, others, capacity, ending):
    used = claim.used + sum(other.used for other in others) + ending
    assert may_take(1, claim, others, capacity, used) == model(claim, others, capacity, used)


@given(st.integers(1, 40))
def test_alone_a_tenant_has_all(capacity):
    taken = 0
    while may_take(1, Claim(3.0, taken), [], capacity, taken):
        taken += 1
    assert taken == capacity


@given(st.lists(st.integers(1, 8), min_size=2, max_size=5), st.integers(10, 60), st.randoms(use_true_random=False))
def test_all_that_want_end_at_their_shares_whoever_came_first(weights, capacity, random):
    """The first tenant fills everything; then all try at random while one unit at a time, of whomever, comes back."""
    used = [0] * len(weights)
    refused = [False] * len(weights)

    def attempt(tenant: int) -> None:
        claims = [Claim(weight, held, wants) for weight, held, wants in zip(weights, used, refused, strict=True)]
        own = claims.pop(tenant)
        if may_take(1, own, claims, capacity, sum(used)):
            used[tenant], refused[tenant] = used[tenant] + 1, False
        else:
            refused[tenant] = True

    for _ in range(capacity):
        attempt(0)
    assert used[0] == capacity
    for _ in range(40 * capacity):
        for tenant in random.sample(range(len(weights)), len(weights)):
            attempt(tenant)
        holders = [tenant for tenant, held in enumerate(used) for _ in range(held)]
        used[random.choice(holders)] -= 1
    for tenant, weight in enumerate(weights):
        assert used[tenant] >= max(1, capacity * weight // sum(weights)) - 1
    assert sum(used) >= capacity - 1 - len(weights)


def test_large_amounts_are_kept_by_the_unit_of_the_other():
    other = Claim(1.0, 0.0, unit=30.0)
    assert may_take(70, Claim(1.0, 0.0), [other], 100, 0)
    assert not may_take(71, Claim(1.0, 0.0), [other], 100, 0)
    assert may_take(51, Claim(1.0, 0.0), [Claim(1.0, 0.0, is_refused=True)], 100, 0)  # one is always within its share
    assert not may_take(41, Claim(1.0, 10.0), [Claim(1.0, 0.0, is_refused=True)], 100, 0)
