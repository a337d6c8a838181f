"""The table of sampling parameters and what follows from it: slots, layout, packing and docs/sampling.md."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from typing import Any

import numpy as np
import pytest

from jaxserve.config.sampling_fields import (
    Biases,
    Flag,
    Ids,
    Number,
    SlotValue,
    Texts,
    Whole,
    fields_of,
    markdown_table,
    sampling,
)
from jaxserve.sampling_params import (
    ADMITTED_FIELDS,
    ALLOWED_WIDTH,
    APART_FIELDS,
    MAX_BIASES,
    ROW_FIELDS,
    SAMPLING_FIELDS,
    STOP_WIDTH,
    SamplingParams,
)

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "sampling.md"


def test_every_parameter_is_a_row_of_the_table():
    assert list(SAMPLING_FIELDS) == [field.name for field in dataclasses.fields(SamplingParams)]
    assert set(ROW_FIELDS) >= {"temperature", "top_k", "top_p", "min_p", "seed", "stop_token_ids"}


def test_the_page_has_the_rows_of_the_table():
    """Where this fails, the page's table is to be replaced by the one that the message shows."""
    lines = markdown_table(SAMPLING_FIELDS)
    lines_of_page = itertools.dropwhile(lambda line: not line.startswith("|"), PAGE.read_text("utf-8").splitlines())
    page = list(itertools.takewhile(lambda line: line.startswith("|"), lines_of_page))  # its first table
    assert (
        "| `top_p` | 1.0 | above 0 to 1 | draw from the smallest set of tokens whose probability reaches it |" in page
    )
    assert page == lines, "\n".join(["docs/sampling.md should have this table:", *lines])


@pytest.mark.parametrize(
    ("kind", "good", "bad", "line"),
    [
        (Number(0.0, 2.0), [0, 2, 0.5], -0.5, "x is -0.5; it must be at least 0 and at most 2"),
        (Number(0.0, 2.0, open_low=True), [0.1, 2], 0, "x is 0; it must be above 0 and at most 2"),
        (Number(0.0, 2.0), [1], math.nan, "x is nan; it must be a finite number"),
        (Whole(1, 9), [1, 9], 10, "x is 10; it must be from 1 to 9"),
        (Whole(1, 9), [5], 5.0, "x is 5.0; it must be a whole number"),
        (Flag(), [True, False], 0, "x is 0; it must be true or false"),
        (Texts(2, 3), [("a", "bcd")], ["a", "bcde"], "x has a string of 4 characters; at most 3 are allowed"),
        (Texts(2, 3), [()], ["a"] * 3, "x has 3 strings; at most 2 are allowed"),
        (Ids(2), [(0, 2**31 - 1)], [2**31], f"x is {2**31}; it must be from 0 to {2**31 - 1}"),
        (Ids(2), [()], [True], "x is True; it must be a whole number"),
        (Ids(2, least_items=1), [(1,)], [], "x has 0 ids; it must have at least 1, or be left out"),
        (Biases(2, -1, 1), [((1, 0.5),)], {1: 2.0}, r"x\[1\] is 2.0; it must be at least -1 and at most 1"),
        (Biases(2, -1, 1), [()], {1: math.inf}, r"x\[1\] is inf; it must be a finite number"),
        (Biases(2, -1, 1), [()], {-1: 0.0}, f"x id is -1; it must be from 0 to {2**31 - 1}"),
        (Biases(2, -1, 1), [()], {"a": 0.0}, "x id is 'a'; it must be a whole number"),
        (Biases(2, -1, 1), [()], {1: 0.0, 2: 0.0, 3: 0.0}, "x has 3 ids; at most 2 are allowed"),
        (Biases(2, -1, 1), [()], [(1, 0.0), ("1", 0.0)], "x has the id 1 twice; give each id one number"),
        (Biases(2, -1, 1), [()], [1], "x has 1; it must map token ids to numbers"),
        (Biases(2, -1, 1), [()], 1, "x is 1; it must be a list"),
    ],
)
def test_a_kind_takes_what_it_says(kind, good, bad, line):
    for value in good:
        assert kind.checked("x", value) == value
    with pytest.raises(ValueError, match=f"^{line}$"):
        kind.checked("x", bad)


def test_none_is_taken_only_where_it_is_the_default():
    assert SAMPLING_FIELDS["seed"].checked(None) is None
    none: Any = None
    with pytest.raises(ValueError, match="temperature is None; it must be a number"):
        SamplingParams(temperature=none)


def test_a_slot_value_becomes_elements():
    assert list(SlotValue("uint32", width=2).elements(5 << 32 | 6)) == [5, 6]
    assert list(SlotValue("uint32", width=2).elements(2**63 - 1)) == [2**31 - 1, 2**32 - 1]
    assert list(SlotValue("uint32", width=2).elements(-1)) == [2**32 - 1, 2**32 - 1]
    assert list(SlotValue("uint32", width=2).elements(-(2**63))) == [2**31, 0]
    assert SlotValue("int32", width=4, idle=-1).elements((7, 9)) == (7, 9)


def test_a_wide_value_is_counted_and_pairs_are_ids_and_bits():
    pairs = SlotValue("int32", width=4, idle=-1, apart=True)
    assert pairs.elements(((7, 1.0), (9, -0.5))) == [7, 0x3F800000, 9, 0xBF000000 - 2**32]
    assert [pairs.used(value) for value in (None, (), ((7, 1.0),), ((7, 1.0),) * 2, ((7, 1.0),) * 3)] == [0, 0, 2, 4, 0]
    assert [pairs.used(value) for value in ((1,), (1,) * 4, (1,) * 5)] == [1, 4, 0]


def test_a_new_row_needs_nothing_else_of_table_and_slots():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class More(SamplingParams):
        epsilon: float = dataclasses.field(
            default=0.0, metadata=sampling(Number(0.0, 1.0), "made up", SlotValue("float32", idle=0.25))
        )

    field = fields_of(More)["epsilon"]
    assert (field.name, field.default, field.checked(1), field.resolved(1)) == ("epsilon", 0.0, 1, 1.0)
    assert "epsilon" not in SAMPLING_FIELDS


def test_what_slots_hold_at_first_asks_for_nothing():
    """Greedy, no filter, no stop id: rows of padding read such a slot."""
    from jaxserve.programs.slots import Slots

    slots = Slots.zeros(3, 2)
    assert slots.sampling.keys() == {*ADMITTED_FIELDS, *APART_FIELDS}
    assert {name: (held.shape, str(held.dtype)) for name, held in slots.sampling.items()}.items() >= {
        "temperature": ((3,), "float32"),
        "top_k": ((3,), "int32"),
        "top_p": ((3,), "float32"),
        "min_p": ((3,), "float32"),
        "seed": ((3, 2), "uint32"),
        "stop_token_ids": ((3, STOP_WIDTH), "int32"),
        "typical_p": ((3,), "float32"),
        "logit_bias": ((3, 2 * MAX_BIASES), "int32"),
        "num_logit_bias": ((3,), "int32"),
        "allowed_token_ids": ((3, ALLOWED_WIDTH), "int32"),
        "penalty_row": ((3,), "int32"),
    }.items()
    nothing = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0, "stop_token_ids": -1, "typical_p": 1}
    nothing |= {"repetition_penalty": 1, "num_logit_bias": 0, "num_allowed_token_ids": 0, "penalty_row": -1}
    for name, value in nothing.items():
        assert (np.asarray(slots.sampling[name]) == value).all(), name
