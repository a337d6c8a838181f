"""Packs a step plan into the padded vectors that its two programs read. Uses numpy only.

A packer keeps the vector of a step without rows: every step begins as a copy of it and writes what its rows say. The
vector itself is never used again: the device may still read it while the next step is packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxserve.programs.layout import (
    MASK_ROWS,
    PENALTY_RUNS,
    forward_layout,
    mask_layout,
    option_layout,
    penalty_layout,
    pooling_layout,
    sample_layout,
    score_layout,
    table_layout,
)
from jaxserve.request import EngineRequest
from jaxserve.sampling_params import ADMITTED_FIELDS, APART_FIELDS, PENALTY_ROW, ROW_FIELDS, counted
from jaxserve.scheduler.plan import TABLE_RUN, Fork, PageTableWrite, PenaltyWrite, RowPlan, Scores, StepPlan, Wants


class ForwardPacker:
    """Packs the input vector of the forward program for `tokens` tokens and `rows` rows; see
    `layout.forward_layout`."""

    def __init__(self, tokens: int, rows: int, page_size: int, num_slots: int, num_groups: int = 1):
        self.layout = forward_layout(tokens, rows, page_size, num_groups)
        self._num_groups = num_groups
        self._page_size = page_size
        self._empty = np.zeros(self.layout.size, np.int32)
        fields = self.layout.views(self._empty)
        fields["page_slot"][:] = num_slots
        fields["admit_slot"][:] = num_slots
        for name, value in ADMITTED_FIELDS.items():
            fields[name][:] = value.idle
        self._counts = np.arange(rows + 1, dtype=np.int32)

    def pack(self, plan: StepPlan) -> np.ndarray:
        """Returns the vector of a plan, int32 [layout.size]."""
        vector = self._empty.copy()
        fields = self.layout.views(vector)
        decodes = plan.decodes
        if decodes.counts is not None:
            raise ValueError(
                "counts gives rows that decode several tokens; a forward program takes one each: leave it None"
            )
        count, updates = len(decodes), len(decodes.pages)
        np.subtract(-1, decodes.slots, out=fields["token_ids"][:count])
        fields["row_slot"][:count] = decodes.slots
        fields["row_start"][:count] = decodes.starts
        ends = fields["query_start_loc"]
        ends[: count + 1] = self._counts[: count + 1]
        fields["page_slot"][:updates] = decodes.slots[decodes.page_rows]
        fields["page_index"][:updates] = decodes.starts[decodes.page_rows] // self._page_size
        if self._num_groups == 1:
            fields["page"][:updates] = decodes.pages
        elif updates:
            more = decodes.more_pages
            _check_groups(0 if more is None else len(more), self._num_groups)
            fields["page"][0, :updates], fields["page"][1:, :updates] = decodes.pages, more
        if plan.chunks:
            _pack_chunks(plan.chunks, plan.forks, fields, count, updates, self._num_groups)
        ends[plan.num_rows + 1 :] = plan.num_tokens
        return vector


class SamplePacker:
    """Packs the input vector of the sample program for `rows` rows; see `layout.sample_layout`."""

    def __init__(self, rows: int, num_slots: int):
        self.layout = sample_layout(rows)
        self._empty = np.zeros(self.layout.size, np.int32)
        self.layout.views(self._empty)["slot"][:] = num_slots

    def pack(self, plan: StepPlan) -> np.ndarray:
        """Returns the vector of a plan, int32 [layout.size]."""
        vector = self._empty.copy()
        fields = self.layout.views(vector)
        samples = plan.samples
        count = len(samples)
        fields["token"][:count] = samples.hidden_rows
        fields["slot"][:count] = samples.slots
        fields["position"][:count] = samples.positions
        fields["suppress_stop"][:count] = samples.suppress_stop
        if samples.wants is not None:
            fields["masked"][:count] = samples.wants & Wants.MASK
            fields["logprobs"][:count] = samples.wanting(Wants.LOGPROBS)
        return vector


def score_vectors(scores: Scores, rows: int) -> list[np.ndarray]:
    """Packs the input vectors of the score program, one `layout.score_layout` of `rows` rows for each call needed."""
    layout, vectors = score_layout(rows), []
    for begin in range(0, len(scores), rows):
        vector = np.zeros(layout.size, np.int32)
        fields = layout.views(vector)
        count = len(scores.targets[begin : begin + rows])
        fields["token"][:count] = scores.hidden_rows[begin : begin + rows]
        fields["target"][:count] = scores.targets[begin : begin + rows]
        vectors.append(vector)
    return vectors


def pooling_vector(plan: StepPlan, rows: int) -> np.ndarray:
    """Packs the input vector of the pooling program for `rows` rows, of which `plan.num_pooled` are real."""
    layout = pooling_layout(rows)
    vector = np.zeros(layout.size, np.int32)
    fields = layout.views(vector)
    token, place = plan.decodes.num_tokens, 0
    for row in plan.chunks:
        if row.pooled is not None:
            fields["first"][place], fields["count"][place] = token + row.pooled.first, row.pooled.count
            place += 1
        token += row.num_tokens
    return vector


def table_vectors(writes: Sequence[PageTableWrite], num_slots: int, num_groups: int = 1) -> list[np.ndarray]:
    """Packs the input vectors of the page-table program, one `layout.table_layout` for each call needed.

    Raises ValueError for a group that the device has no table of.
    """
    for write in writes:
        if write.group >= num_groups:
            raise ValueError(
                f"group is {write.group}; layers are of {num_groups} groups here, so that of a page table write is at "
                f"most {num_groups - 1}"
            )
    entries = [
        (write.group, write.slot, write.first + index, page)
        for write in writes
        for index, page in enumerate(write.pages)
    ]
    layout, vectors = table_layout(num_groups), []
    for begin in range(0, len(entries), TABLE_RUN):
        block = np.array(entries[begin : begin + TABLE_RUN], np.int32)
        vector = np.zeros(layout.size, np.int32)
        fields = layout.views(vector)
        fields["page_slot"][:] = num_slots
        for name, column in zip(("page_group", "page_slot", "page_index", "page"), block.T, strict=True):
            if name in fields:
                fields[name][: len(block)] = column
        vectors.append(vector)
    return vectors


def mask_vectors(slots: np.ndarray, masks: np.ndarray, num_slots: int) -> list[np.ndarray]:
    """Packs the input vectors of the mask program, one `layout.mask_layout` for each call needed.

    Args:
        slots: int32 [M].
        masks: uint32 [M, words], of each slot.
        num_slots: number of the device's slots.
    """
    layout, vectors = mask_layout(masks.shape[1]), []
    for begin in range(0, len(slots), MASK_ROWS):
        vector = np.zeros(layout.size, np.int32)
        fields = layout.views(vector)
        count = len(slots[begin : begin + MASK_ROWS])
        fields["slot"][:] = num_slots
        fields["slot"][:count] = slots[begin : begin + count]
        fields["bits"][:count] = masks[begin : begin + count]
        vectors.append(vector)
    return vectors


def option_vectors(new: Sequence[RowPlan | Fork]) -> list[np.ndarray]:
    """Packs the input vectors of the option program, one `layout.option_layout` for each request that gets its slot and
    has wide parameters."""
    layout, vectors = option_layout(), []
    for one in new:
        if one.admit is None or not _has_wide(one.admit):
            continue
        vector = np.zeros(layout.size, np.int32)
        fields = layout.views(vector)
        fields["slot"][0] = one.slot
        for name, held in APART_FIELDS.items():
            value = getattr(one.admit, name)
            fields[name][:] = held.idle
            if held.used(value):
                fields[name][: held.used(value)] = held.elements(value)
        vectors.append(vector)
    return vectors


def unused_option_vector(num_slots: int) -> np.ndarray:
    """Packs an input vector of the option program that writes nothing."""
    vector = np.zeros(option_layout().size, np.int32)
    option_layout().views(vector)["slot"][0] = num_slots
    return vector


def _has_wide(request: EngineRequest) -> bool:
    return any(held.used(getattr(request, name)) for name, held in APART_FIELDS.items())


def penalty_vectors(writes: Sequence[PenaltyWrite]) -> list[tuple[int, np.ndarray]]:
    """Packs the input vectors of the penalty program, one `layout.penalty_layout` for each call needed, with its size.

    The first call for a row empties it, so that all of them together may be repeated.
    """
    vectors: list[tuple[int, np.ndarray]] = []
    for write in writes:
        token_ids = np.array((*write.prompt_token_ids, *write.output_token_ids), np.int32)
        begin, num_prompt = 0, len(write.prompt_token_ids)
        while begin < len(token_ids):
            left = len(token_ids) - begin
            size = next((size for size in PENALTY_RUNS if size >= left), PENALTY_RUNS[-1])
            count = min(size, left)
            layout = penalty_layout(size)
            vector = np.full(layout.size, -1, np.int32)
            fields = layout.views(vector)
            fields["row"][0], fields["reset"][0] = write.row, begin == 0
            fields["num_prompt"][0] = min(max(0, num_prompt - begin), count)
            fields["token_ids"][:count] = token_ids[begin : begin + count]
            vectors.append((size, vector))
            begin += count
    return vectors


def _check_groups(more: int, num_groups: int) -> None:
    """Raises ValueError unless a row has pages of as many groups after the first as there are."""
    if more != num_groups - 1:
        raise ValueError(
            f"more_pages has pages of {more} groups; layers are of {num_groups} groups here, so it must have those of "
            f"{num_groups - 1}, all but the first"
        )


def _pack_chunks(
    chunks: tuple[RowPlan, ...],
    forks: tuple[Fork, ...],
    fields: dict[str, np.ndarray],
    row: int,
    update: int,
    num_groups: int,
) -> None:
    """Packs chunks after `row` rows of one token each and `update` entries of the page table, and the parameters of
    those that are new and of forks."""
    end, new = row, [*[chunk for chunk in chunks if chunk.admit is not None], *forks]
    for index, chunk in enumerate(chunks, start=row):
        begin, end = end, end + chunk.num_tokens
        fields["token_ids"][begin:end] = chunk.token_ids
        fields["row_slot"][index] = chunk.slot
        fields["row_start"][index] = chunk.start
        fields["query_start_loc"][index + 1] = end
        if chunk.new_pages:
            pages = len(chunk.new_pages)
            fields["page_slot"][update : update + pages] = chunk.slot
            fields["page_index"][update : update + pages] = range(chunk.first_new_page, chunk.first_new_page + pages)
            _check_groups(len(chunk.more_pages), num_groups)
            if num_groups == 1:
                fields["page"][update : update + pages] = chunk.new_pages
            else:
                fields["page"][:, update : update + pages] = (chunk.new_pages, *chunk.more_pages)
            update += pages
    for place, one in enumerate(new):
        _pack_parameters(one, fields, place)


def _pack_parameters(new: RowPlan | Fork, fields: dict[str, np.ndarray], place: int) -> None:
    request = new.admit
    assert request is not None
    fields["admit_slot"][place] = new.slot
    fields[PENALTY_ROW][place] = -1 if new.penalty_row is None else new.penalty_row
    for name, held in ROW_FIELDS.items():
        value = getattr(request, name)
        if held.apart:
            fields[counted(name)][place] = held.used(value)
        elif held.width is None:
            fields[name][place] = value
        else:
            elements = held.elements(value)
            fields[name][place, : len(elements)] = elements
