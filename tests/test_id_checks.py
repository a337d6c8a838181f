"""What is no token id is found wherever it stands, and by the rules of a loop over all."""

import enum
import math

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.id_checks import IDS_PER_PART, first_wrong_id


class Named(enum.IntEnum):
    ONE = 1


ODD = st.sampled_from([True, False, 1.0, math.nan, None, "1", [], Named.ONE, -1, 511, 512, 2**80, -(2**80)])


def plain(items, vocab_size):
    for index, item in enumerate(items):
        if isinstance(item, bool) or not isinstance(item, int):
            return index
        if vocab_size is not None and not 0 <= item < vocab_size:
            return index
    return None


@given(st.integers(0, 3), st.lists(st.one_of(st.integers(0, 511), ODD), max_size=4), st.booleans())
def test_the_first_wrong_id_is_that_of_a_loop(num_parts, end, bounded):
    items = [7] * (num_parts * IDS_PER_PART - len(end) // 2) + end + [5]
    vocab_size = 512 if bounded else None
    found = first_wrong_id(items, 512) if bounded else first_wrong_id(items)
    assert found == plain(items, vocab_size)
    assert first_wrong_id(tuple(items), 512) == plain(items, 512)
