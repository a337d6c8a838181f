"""Defines the programs that update device state besides a step's own vectors: page tables, wide options and masks.

    write_tables(slots, vector)  -> slots    runs of pages that a sequence holds before its step, when it gets its slot
    write_options(slots, vector) -> slots    wide sampling parameters of one request, when it gets its slot
    write_masks(masks, vector)   -> masks    what rows may draw next, between the forward and the sample program

All donate their array. They are separate from the programs of a step so that neither reserves space for what few steps
need: a table write has TABLE_RUN entries whatever the token bucket, a mask as many bits as the vocabulary has tokens.
"""

from __future__ import annotations

import dataclasses

import jax

from jaxserve.programs.layout import mask_layout, option_layout, table_layout
from jaxserve.programs.slots import Slots
from jaxserve.sampling_params import APART_FIELDS


def mask_words(vocab_size: int) -> int:
    """Returns the number of uint32 words of a mask."""
    return -(-vocab_size // 32)


def write_tables(slots: Slots, vector: jax.Array) -> Slots:
    """Sets entries of page tables as `vector` (`table_layout`) says; those whose slot is out of range are dropped."""
    fields = table_layout(slots.num_groups).read(vector)
    place = tuple([fields[name] for name in ("page_group", "page_slot", "page_index") if name in fields])
    table = slots.page_table.at[place].set(fields["page"], mode="drop")
    return dataclasses.replace(slots, page_table=table)


def write_options(slots: Slots, vector: jax.Array) -> Slots:
    """Sets one slot's wide parameters as `vector` (`option_layout`) says; none where the slot is out of range."""
    fields = option_layout().read(vector)
    written = {name: slots.sampling[name].at[fields["slot"][0]].set(fields[name], mode="drop") for name in APART_FIELDS}
    return dataclasses.replace(slots, sampling=slots.sampling | written)


def write_masks(masks: jax.Array, vector: jax.Array) -> jax.Array:
    """Sets the masks of slots, uint32 [S, words], as `vector` (`mask_layout`) says; slots out of range are dropped."""
    fields = mask_layout(masks.shape[1]).read(vector)
    return masks.at[fields["slot"]].set(fields["bits"], mode="drop")
