"""The KV write, with the rotation of queries and keys or without, as work items of a foreign function.

`attend_loops` says how keys and values lie in a page.
"""

# These functions are compiled; pyright does not know the types of their values.
# pyright: basic, reportOperatorIssue=false

from __future__ import annotations

from jaxserve.pallas_kernels.cpu.emitter import LANES
from jaxserve.pallas_kernels.cpu.native_functions import native
from jaxserve.pallas_kernels.paged_attention.cpu import vectors
from jaxserve.pallas_kernels.paged_attention.cpu.elements import NUMBER, TOGETHER, UNIT
from jaxserve.pallas_kernels.paged_attention.cpu.pointers import (
    allocate,
    argument,
    bits_at,
    int32_at,
    release,
    result,
    set_bits,
)

# What argument 0 of a call holds, int32.
TOKENS, KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE, NUM_PAGES = range(6)

# Tokens of an item.
_TOKENS_TOGETHER = 8


@native
def num_items(frame):
    """One item for a few tokens."""
    return (int32_at(argument(frame, 0), TOKENS) + _TOKENS_TOGETHER - 1) // _TOKENS_TOGETHER


@native
def _store(sizes, pool, slot, head, key, value):
    """Writes a key and a value [D] to a slot; nothing to those of the null page and to those outside the pool."""
    heads, page_size, head_dim = int32_at(sizes, KV_HEADS), int32_at(sizes, PAGE_SIZE), int32_at(sizes, HEAD_DIM)
    if slot < page_size or slot >= page_size * int32_at(sizes, NUM_PAGES):
        return
    offset, size = slot % page_size, NUMBER * page_size * head_dim
    keys = pool + size * (slot // page_size * 2 * heads + head)
    for unit in range(head_dim // TOGETHER):
        set_bits(keys + UNIT * offset, unit * page_size, bits_at(key, unit, UNIT), UNIT)
    values = keys + size * heads + offset // TOGETHER * UNIT * head_dim + offset % TOGETHER * NUMBER
    for place in range(head_dim):
        set_bits(values, TOGETHER * place, bits_at(value, place, NUMBER), NUMBER)


@native
def write(frame, item):
    """Writes the keys and values of a few tokens."""
    sizes, slots = argument(frame, 0), argument(frame, 4)
    heads, head_dim = int32_at(sizes, KV_HEADS), int32_at(sizes, HEAD_DIM)
    last = min((item + 1) * _TOKENS_TOGETHER, int32_at(sizes, TOKENS))
    for token in range(item * _TOKENS_TOGETHER, last):
        for head in range(heads):
            place = NUMBER * head_dim * (token * heads + head)
            key, value = argument(frame, 1) + place, argument(frame, 2) + place
            _store(sizes, result(frame, 0), int32_at(slots, token), head, key, value)


@native
def rotate_and_write(frame, item):
    """Rotates the queries and keys of a few tokens, and writes their keys and values."""
    sizes, slots = argument(frame, 0), argument(frame, 5)
    heads, group, head_dim = int32_at(sizes, KV_HEADS), int32_at(sizes, GROUP), int32_at(sizes, HEAD_DIM)
    scratch = allocate(2 * NUMBER * head_dim)
    last = min((item + 1) * _TOKENS_TOGETHER, int32_at(sizes, TOKENS))
    for token in range(item * _TOKENS_TOGETHER, last):
        angles = 2 * head_dim * token
        cosine, sine = argument(frame, 2) + angles, argument(frame, 3) + angles
        for head in range(heads):
            start = argument(frame, 1) + 4 * head_dim * (group + 2) * (token * heads + head)
            queries = result(frame, 0) + 4 // TOGETHER * head_dim * group * (token * heads + head)
            for lane in range(0, head_dim // 2, LANES):
                for member in range(group):
                    x, out = start + 4 * head_dim * member, queries + 4 // TOGETHER * head_dim * member
                    vectors.rotate_query(x, cosine, sine, head_dim // 2, lane, out)
                vectors.rotate_key(start + 4 * head_dim * group, cosine, sine, head_dim // 2, lane, scratch)
            value = start + 4 * head_dim * (group + 1)
            for lane in range(0, head_dim, 2 * LANES):
                vectors.round_value(value + 4 * lane, scratch + NUMBER * (head_dim + lane))
            _store(sizes, result(frame, 1), int32_at(slots, token), head, scratch, scratch + NUMBER * head_dim)
    release(scratch)
