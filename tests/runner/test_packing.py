"""Packing and the device's view of a step: what the programs read is what the plan says."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from jaxserve.programs.layout import Field, Layout
from jaxserve.programs.slots import Slots
from jaxserve.programs.step_programs import attention_metadata
from jaxserve.request import EngineRequest
from jaxserve.runner.packing import ForwardPacker, SamplePacker
from jaxserve.scheduler.plan import NO_SAMPLES, DecodeRows, RowPlan, Samples, StepPlan, Wants
from tests.budgets import budget

PAGE = 16
NUM_SLOTS = 8
MAX_PAGES = 12


ROOMY = ForwardPacker(64, 8, PAGE, NUM_SLOTS)


@jax.jit
def place(slots: Slots, vector: jax.Array):
    fields = ROOMY.layout.read(vector)
    return attention_metadata(fields, slots.apply(fields).page_table, PAGE)


def row(name: str, slot: int, start: int, tokens: tuple[int, ...], **fields) -> RowPlan:
    values = {"first_new_page": 0, "new_pages": ()}
    return RowPlan(name, 0, slot, start, tokens, admit=fields.pop("admit", None), **{**values, **fields})


def plan_of(*rows: RowPlan, token_bucket: int = 32, row_bucket: int = 8, samples: Samples = NO_SAMPLES) -> StepPlan:
    decodes = DecodeRows.of([one for one in rows if one.decodes], PAGE)
    chunks = tuple(one for one in rows if not one.decodes)
    assert (*decodes.rows(), *chunks) == rows
    num_tokens = sum(one.num_tokens for one in rows)
    return StepPlan(0, decodes, chunks, samples, token_bucket, row_bucket, num_tokens)


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
        row("a", 3, 32, (), first_new_page=2, new_pages=(11,)),
        row("b", 5, 0, (1, 2, 3), new_pages=(4,), admit=request),
    )
    packer = ForwardPacker(32, 8, PAGE, NUM_SLOTS)
    fields = packer.layout.views(packer.pack(plan))
    assert_array_equal(fields["token_ids"], [-4, 1, 2, 3] + [0] * 28)
    assert_array_equal(fields["query_start_loc"], [0, 1, 4] + [4] * 6)
    assert_array_equal(fields["row_slot"][:2], [3, 5])
    assert_array_equal(fields["row_start"][:2], [32, 0])
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


def test_pack_sample_says_what_the_samples_say():
    plan = plan_of(samples=Samples.of([(0, 6, 31, True, 0), (1, 3, 21, False, Wants.MASK), (6, 1, 6, True, 0)]))
    packer = SamplePacker(8, NUM_SLOTS)
    fields = packer.layout.views(packer.pack(plan))
    assert_array_equal(fields["token"][:3], [0, 1, 6])
    assert_array_equal(fields["slot"], [6, 3, 1] + [NUM_SLOTS] * 5)
    assert_array_equal(fields["position"][:3], [31, 21, 6])
    assert_array_equal(fields["suppress_stop"][:3], [1, 0, 1])
    assert_array_equal(fields["masked"], [0, 1] + [0] * 6)


def test_a_packed_vector_is_not_written_again():
    packer = ForwardPacker(32, 8, PAGE, NUM_SLOTS)
    plan = plan_of(row("a", 3, 32, (), first_new_page=2, new_pages=(11,)), row("b", 5, 0, (1, 2, 3), new_pages=(4,)))
    first = packer.pack(plan)
    before = first.copy()
    packer.pack(plan_of(row("c", 1, 0, (7,) * 30, new_pages=(5, 6))))
    assert_array_equal(first, before)
    assert_array_equal(packer.pack(plan), before)


@budget(60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), min_size=1, max_size=5).map(
        lambda rows: sorted(rows, key=lambda row: row[1] > 0)
    )
)
def test_metadata_places_every_token(rows):
    """Positions, lengths and slots of a random packing equal a loop over tokens; padding goes to the null page.

    A count of 0 is a row that decodes: one token, whose page it takes only where one begins.
    """
    tables = np.arange(1, NUM_SLOTS * MAX_PAGES + 1, dtype=np.int32).reshape(NUM_SLOTS, MAX_PAGES)
    slots = dataclasses.replace(Slots.zeros(NUM_SLOTS, MAX_PAGES), page_table=jnp.asarray(tables))
    plans = []
    for slot, (start, count) in enumerate(rows):
        held, pages = (-(-start // PAGE), -(-(start + max(count, 1)) // PAGE))
        new = tuple(int(page) for page in tables[slot, held:pages])
        admit = EngineRequest(str(slot), (1,), max_tokens=1) if count else None
        plans.append(row(str(slot), slot, start, (1,) * count, first_new_page=held, new_pages=new, admit=admit))
        slots = dataclasses.replace(slots, page_table=slots.page_table.at[slot, held:].set(0))
    metadata = place(slots, ROOMY.pack(plan_of(*plans, token_bucket=64)))
    rows = [(start, max(count, 1)) for start, count in rows]
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
