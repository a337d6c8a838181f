"""Packs all host inputs of a program into one int32 vector: one transfer per step, whatever its fields.

A layout defines the fields, their shapes and offsets. The host writes through numpy views of one vector, the program
reads static slices of it. float32 fields are bit-cast. numpy only: a program's arrays have the same methods.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from jaxserve.sampling_params import ADMITTED_FIELDS, APART_FIELDS
from jaxserve.scheduler.plan import TABLE_RUN

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Field:
    """Describes one field: its shape and dtype (int32, float32 or uint32)."""

    shape: Shape
    dtype: str = "int32"


class Layout:
    """Places fields one after another in an int32 vector of `size` elements."""

    def __init__(self, fields: dict[str, Field]):
        # Name, place, dtype and shape of each; the last two None where a slice of the vector has them already.
        self._views: list[tuple[str, slice, str | None, Shape | None]] = []
        size = 0
        for name, field in fields.items():
            place = slice(size, size + math.prod(field.shape))
            dtype = None if field.dtype == "int32" else field.dtype
            self._views.append((name, place, dtype, field.shape if len(field.shape) != 1 else None))
            size = place.stop
        self.size = size

    def views(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Returns writable views of the fields in `vector`, int32 [size]."""
        return self.read(vector)

    def read(self, vector: Any) -> dict[str, Any]:
        """Returns the fields of `vector`: of a numpy array as views, of an array inside a program as slices."""
        fields = {}
        for name, place, dtype, shape in self._views:
            field = vector[place]
            if dtype is not None:
                field = field.view(dtype)
            fields[name] = field if shape is None else field.reshape(shape)
        return fields


def forward_layout(tokens: int, rows: int, page_size: int, groups: int = 1) -> Layout:
    """Returns the host inputs of the forward program for a bucket of `tokens` tokens and `rows` rows of a model with
    `groups` groups of layers.

    Unused entries are padding.

    token_ids [tokens]: an id, or -1 - slot for the token sampled last in that slot; padding is id 0.
    row_slot [rows]: slot of each row; row_start: its tokens computed before; query_start_loc [rows + 1].
    page_*: entries of the page tables to set, (slot, index, page); the slot of padding is out of range. Of several
        groups page is [groups, entries]: the tables of all groups gain the same entries.
    admit_slot and the sampling parameters after it (`ADMITTED_FIELDS`): slots taken by new requests; the slot of
        padding is out of range.
    """
    updates = tokens // page_size + rows  # a row of n tokens takes at most n / page_size + 1 pages
    return Layout(
        {
            "token_ids": Field((tokens,)),
            "row_slot": Field((rows,)),
            "row_start": Field((rows,)),
            "query_start_loc": Field((rows + 1,)),
            "page_slot": Field((updates,)),
            "page_index": Field((updates,)),
            "page": Field((updates,) if groups == 1 else (groups, updates)),
            "admit_slot": Field((rows,)),
            **{
                name: Field((rows,) if value.width is None else (rows, value.width), value.dtype)
                for name, value in ADMITTED_FIELDS.items()
            },
        }
    )


def sample_layout(rows: int) -> Layout:
    """Returns the host inputs of the sample program for a bucket of `rows` rows.

    token [rows]: index of the row's last token in the step; slot: out of range for padding. position: of the token to
    be drawn. suppress_stop: 1 where stop ids cannot be drawn yet. masked: 1 where only tokens that the slot's mask
    allows can be drawn. logprobs: 1 where log-probabilities are wanted.
    """
    return Layout(
        {
            "token": Field((rows,)),
            "slot": Field((rows,)),
            "position": Field((rows,)),
            "suppress_stop": Field((rows,)),
            "masked": Field((rows,)),
            "logprobs": Field((rows,)),
        }
    )


def score_layout(rows: int) -> Layout:
    """Returns the host inputs of the score program for a block of `rows` rows.

    token [rows]: index of a token in the step; target: the id that follows it. Both are 0 in padding.
    """
    return Layout({"token": Field((rows,)), "target": Field((rows,))})


def table_layout(groups: int = 1) -> Layout:
    """Returns the host inputs of the table-write program: entries to set, (slot, index, page), as in
    `forward_layout`; of several groups each has its own, page_group.
    """
    names = ("page_slot", "page_index", "page") if groups == 1 else ("page_group", "page_slot", "page_index", "page")
    return Layout({name: Field((TABLE_RUN,)) for name in names})


def option_layout() -> Layout:
    """Returns the host inputs of the option-write program: one slot [1] and its values of `APART_FIELDS`."""
    return Layout(
        {
            "slot": Field((1,)),
            **{name: Field((value.width or 1,), value.dtype) for name, value in APART_FIELDS.items()},
        }
    )


def penalty_layout(ids: int) -> Layout:
    """Returns the host inputs of the program that adds `ids` token ids to a penalty row.

    row [1]: out of range for padding. reset [1]: 1 empties the row before. num_prompt [1]: so many of the first ids are
    of the prompt, the others of the output. token_ids [ids]: -1 is padding.
    """
    return Layout({"row": Field((1,)), "reset": Field((1,)), "num_prompt": Field((1,)), "token_ids": Field((ids,))})


def mask_layout(words: int) -> Layout:
    """Returns the host inputs of the mask-write program.

    slot [MASK_ROWS]: out of range for padding. bits [MASK_ROWS, words]: bit v % 32 of word v // 32 allows token v.
    """
    return Layout({"slot": Field((MASK_ROWS,)), "bits": Field((MASK_ROWS, words), "uint32")})


def pooling_layout(rows: int) -> Layout:
    """Returns the host inputs of the pooling program for `rows` runs of tokens.

    first [rows]: index in the step of a run's first token. count [rows]: its tokens; 0 for padding. Runs do not
    overlap.
    """
    return Layout({"first": Field((rows,)), "count": Field((rows,))})


MASK_ROWS = 8
"""Number of masks that one call writes: rows of a vocabulary of 128k have 16 kB each."""

PENALTY_RUNS = (64, 512, 4096)
"""Numbers of token ids that one call adds to a penalty row, at most."""
