"""The KV write, with the rotation of queries and keys or without, as work items of a foreign function.

`attend` says how keys and values lie in a page.
"""

# numba reads these functions itself; pyright knows neither its types nor its intrinsics.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

from jaxserve.pallas_kernels.cpu import ffi
from jaxserve.pallas_kernels.cpu.emitter import LANES
from jaxserve.pallas_kernels.paged_attention.cpu import vectors
from jaxserve.pallas_kernels.paged_attention.cpu.pointers import argument, int32_at, result, set_int16, set_int32
from jaxserve.pallas_kernels.paged_attention.cpu.vectors import compiled

# What argument 0 of a call holds, int32.
TOKENS, KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE, NUM_PAGES = range(6)

# Tokens of an item.
_TOKENS_TOGETHER = 8


@compiled
def num_items(frame):
    """One item for a few tokens."""
    return (int32_at(argument(frame, 0), TOKENS) + _TOKENS_TOGETHER - 1) // _TOKENS_TOGETHER


@compiled
def _store(sizes, pool, slot, head, key, value):
    """Writes a key and a value [D] to a slot; nothing to those of the null page and to those outside the pool."""
    heads, page_size, head_dim = int32_at(sizes, KV_HEADS), int32_at(sizes, PAGE_SIZE), int32_at(sizes, HEAD_DIM)
    if slot < page_size or slot >= page_size * int32_at(sizes, NUM_PAGES):
        return
    offset, size = slot % page_size, 2 * page_size * head_dim
    keys = pool + size * (slot // page_size * 2 * heads + head) + 4 * offset
    for pair in range(head_dim // 2):
        set_int32(keys, pair * page_size, int32_at(key, pair))
    values = keys - 4 * offset + size * heads + offset // 2 * 4 * head_dim + offset % 2 * 2
    for pair in range(head_dim // 2):
        both = int32_at(value, pair)
        set_int16(values, 4 * pair, both)
        set_int16(values, 4 * pair + 2, both >> 16)


@compiled
def write(frame, item):
    """Writes the keys and values of a few tokens."""
    sizes, slots = argument(frame, 0), argument(frame, 4)
    heads, head_dim = int32_at(sizes, KV_HEADS), int32_at(sizes, HEAD_DIM)
    last = min((item + 1) * _TOKENS_TOGETHER, int32_at(sizes, TOKENS))
    for token in range(item * _TOKENS_TOGETHER, last):
        for head in range(heads):
            place = 2 * head_dim * (token * heads + head)
            key, value = argument(frame, 1) + place, argument(frame, 2) + place
            _store(sizes, result(frame, 0), int32_at(slots, token), head, key, value)


@compiled
def rotate_and_write(frame, item):
    """Rotates the queries and keys of a few tokens, and writes their keys and values."""
    sizes, slots = argument(frame, 0), argument(frame, 5)
    heads, group, head_dim = int32_at(sizes, KV_HEADS), int32_at(sizes, GROUP), int32_at(sizes, HEAD_DIM)
    scratch = ffi.allocate(4 * head_dim)
    last = min((item + 1) * _TOKENS_TOGETHER, int32_at(sizes, TOKENS))
    for token in range(item * _TOKENS_TOGETHER, last):
        cosine, sine = argument(frame, 2) + 2 * head_dim * token, argument(frame, 3) + 2 * head_dim * token
        for head in range(heads):
            start = argument(frame, 1) + 4 * head_dim * (group + 2) * (token * heads + head)
            for member in range(group + 1):
                out = scratch
                if member < group:
                    out = result(frame, 0) + 2 * head_dim * ((token * heads + head) * group + member)
                for lane in range(0, 2 * head_dim, 4 * LANES):
                    x = start + 4 * head_dim * member + lane
                    vectors.rotate_lanes(x, cosine + lane, sine + lane, 2 * head_dim, out + lane // 2)
            for lane in range(0, head_dim, 2 * LANES):
                value = start + 4 * (head_dim * (group + 1) + lane)
                vectors.round_lanes(value, 1.0, 1.0, scratch + 2 * (head_dim + lane))
            _store(sizes, result(frame, 1), int32_at(slots, token), head, scratch, scratch + 2 * head_dim)
    ffi.release(scratch)
