"""Packing and the device's view of a step: what the programs read is what the plan says."""

from __future__ import annotations

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from jaxserve.request import EngineRequest
from jaxserve.runner.layout import Field, Layout, forward_layout, sample_layout
from jaxserve.runner.packing import pack_forward, pack_sample
from jaxserve.runner.programs import attention_metadata
from jaxserve.runner.slots import Slots
from jaxserve.scheduler.plan import RowPlan, StepPlan

PAGE = 16
NUM_SLOTS = 8
MAX_PAGES = 12


ROOMY = forward_layout(64, 8, 1)
"""A page size of 1 leaves room for every table entry at once."""


@jax.jit
def place(slots: Slots, vector: jax.Array):
    fields = ROOMY.read(vector)
    return attention_metadata(fields, slots.apply(fields), PAGE)


def row(name: str, slot: int, start: int, tokens: tuple[int, ...], **fields) -> RowPlan:
    values = {"from_slot": False, "sample": True, "suppress_stop": False, "first_new_page": 0, "new_pages": ()}
    return RowPlan(name, 0, slot, start, tokens, admit=fields.pop("admit", None), **{**values, **fields})


def plan_of(*rows: RowPlan, token_bucket: int = 32, row_bucket: int = 8) -> StepPlan:
    return StepPlan(0, rows, token_bucket, row_bucket, sum(one.num_tokens for one in rows), 0)


def test_a_layout_carries_every_dtype_to_the_bit():
    layout = Layout({"a": Field((3,)), "b": Field((2, 2), "float32"), "c": Field((4,), "uint32")})
    vector = np.zeros(layout.size, np.int32)
    views = layout.views(vector)
    views["a"][:] = [-1, 2, -(2**31)]
    views["b"][:] = [[0.1, -0.0], [np.inf, 1e-40]]
    views["c"][:] = [0, 2**32 - 1, 5, 2**31]
    read = jax.jit(layout.read)(vector)
    for name, view in views.items():
        assert np.asarray(read[name]).tobytes() == view.tobytes()
        assert read[name].shape == view.shape


def test_pack_forward_says_what_the_plan_says():
    request = EngineRequest(
        "b", (1, 2, 3), max_tokens=4, temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, seed=(5 << 32) + 6,
        stop_token_ids=(9, 8),
    )  # fmt: skip
    plan = plan_of(
        row("a", 3, 20, (), from_slot=True, first_new_page=2, new_pages=(11,)),
        row("b", 5, 0, (1, 2, 3), new_pages=(4,), admit=request),
    )
    layout = forward_layout(32, 8, PAGE)
    fields = layout.views(pack_forward(plan, layout, NUM_SLOTS))
    assert_array_equal(fields["token_ids"], [-4, 1, 2, 3] + [0] * 28)
    assert_array_equal(fields["query_start_loc"], [0, 1, 4] + [4] * 6)
    assert_array_equal(fields["row_slot"][:2], [3, 5])
    assert_array_equal(fields["row_start"][:2], [20, 0])
    pages = np.stack([fields["page_slot"], fields["page_index"], fields["page"]], axis=1)
    assert_array_equal(pages[:2], [[3, 2, 11], [5, 0, 4]])
    assert_array_equal(pages[2:, 0], NUM_SLOTS)
    assert_array_equal(fields["admit_slot"], [5] + [NUM_SLOTS] * 7)
    assert_array_equal(fields["seed"][0], [5, 6])
    assert (fields["temperature"][0], fields["top_k"][0], fields["top_p"][0], fields["min_p"][0]) == (
        0.5,
        7,
        0.25,
        0.125,
    )
    assert_array_equal(fields["stop_token_ids"][0], [9, 8] + [-1] * 30)


def test_pack_sample_points_at_last_tokens():
    plan = plan_of(
        row("a", 3, 20, (1,)), row("b", 5, 0, (1, 2, 3), sample=False), row("c", 1, 4, (1, 2), suppress_stop=True)
    )
    layout = sample_layout(8)
    fields = layout.views(pack_sample(plan, layout, NUM_SLOTS))
    assert_array_equal(fields["token"][:2], [0, 5])
    assert_array_equal(fields["slot"], [3, 1] + [NUM_SLOTS] * 6)
    assert_array_equal(fields["position"][:2], [21, 6])
    assert_array_equal(fields["suppress_stop"][:2], [0, 1])


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), min_size=1, max_size=5))
def test_metadata_places_every_token(rows):
    """Positions, lengths and slots of a random packing equal a loop over tokens; padding goes to the null page."""
    tables = np.arange(1, NUM_SLOTS * MAX_PAGES + 1, dtype=np.int32).reshape(NUM_SLOTS, MAX_PAGES)
    slots = Slots.zeros(NUM_SLOTS, MAX_PAGES)
    plans = []
    for slot, (start, count) in enumerate(rows):
        pages = -(-(start + count) // PAGE)
        new = tuple(int(page) for page in tables[slot, :pages])
        admit = EngineRequest(str(slot), (1,), max_tokens=1)
        plans.append(row(str(slot), slot, start, (1,) * count, new_pages=new, admit=admit))
    layout = ROOMY
    metadata = place(slots, pack_forward(plan_of(*plans, token_bucket=64), layout, NUM_SLOTS))
    expected = [
        (start + i, tables[slot, (start + i) // PAGE] * PAGE + (start + i) % PAGE)
        for slot, (start, count) in enumerate(rows)
        for i in range(count)
    ]
    expected += [(0, 0)] * (64 - len(expected))
    assert_array_equal(metadata.positions, [position for position, _ in expected])
    assert_array_equal(metadata.slot_mapping, [slot for _, slot in expected])
    lengths = [start + count for start, count in rows]
    assert_array_equal(metadata.kv_lens, lengths + [0] * (8 - len(rows)))
