"""A step plan as the padded vectors that its two programs read. numpy only."""

from __future__ import annotations

import itertools

import numpy as np

from jaxserve.runner.layout import Layout
from jaxserve.scheduler.plan import RowPlan, StepPlan


def pack_forward(plan: StepPlan, layout: Layout, num_slots: int) -> np.ndarray:
    """int32 [layout.size] for the forward program; see `layout.forward_layout` for the fields."""
    vector = np.zeros(layout.size, np.int32)
    fields = layout.views(vector)
    rows = plan.rows
    token_ids = itertools.chain.from_iterable(
        (*row.token_ids, -1 - row.slot) if row.from_slot else row.token_ids for row in rows
    )
    fields["token_ids"][: plan.num_tokens] = np.fromiter(token_ids, np.int32, plan.num_tokens)
    count = len(rows)
    fields["row_slot"][:count] = [row.slot for row in rows]
    fields["row_start"][:count] = [row.start for row in rows]
    fields["query_start_loc"][1 : count + 1] = np.cumsum([row.num_tokens for row in rows])
    fields["query_start_loc"][count + 1 :] = plan.num_tokens
    _pack_pages(rows, fields, num_slots)
    _pack_admitted(rows, fields, num_slots)
    return vector


def pack_sample(plan: StepPlan, layout: Layout, num_slots: int) -> np.ndarray:
    """int32 [layout.size] for the sample program; see `layout.sample_layout` for the fields."""
    vector = np.zeros(layout.size, np.int32)
    fields = layout.views(vector)
    fields["slot"][:] = num_slots
    ends = itertools.accumulate(row.num_tokens for row in plan.rows)
    sampled = [(row, end - 1) for row, end in zip(plan.rows, ends, strict=True) if row.sample]
    count = len(sampled)
    fields["token"][:count] = [token for _, token in sampled]
    fields["slot"][:count] = [row.slot for row, _ in sampled]
    fields["position"][:count] = [row.start + row.num_tokens for row, _ in sampled]
    fields["suppress_stop"][:count] = [row.suppress_stop for row, _ in sampled]
    return vector


def _pack_pages(rows: tuple[RowPlan, ...], fields: dict[str, np.ndarray], num_slots: int) -> None:
    fields["page_slot"][:] = num_slots
    entries = [(row.slot, row.first_new_page + index, page) for row in rows for index, page in enumerate(row.new_pages)]
    if entries:
        columns = np.array(entries, np.int32).T
        for name, column in zip(("page_slot", "page_index", "page"), columns, strict=True):
            fields[name][: len(entries)] = column


def _pack_admitted(rows: tuple[RowPlan, ...], fields: dict[str, np.ndarray], num_slots: int) -> None:
    fields["admit_slot"][:] = num_slots
    fields["stop_token_ids"][:] = -1
    admitted = [row for row in rows if row.admit is not None]
    for place, row in enumerate(admitted):
        request = row.admit
        assert request is not None
        fields["admit_slot"][place] = row.slot
        fields["temperature"][place] = request.temperature
        fields["top_k"][place] = request.top_k
        fields["top_p"][place] = request.top_p
        fields["min_p"][place] = request.min_p
        fields["seed"][place] = (request.seed >> 32, request.seed & 0xFFFFFFFF)
        fields["stop_token_ids"][place, : len(request.stop_token_ids)] = request.stop_token_ids
