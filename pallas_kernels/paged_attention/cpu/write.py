"""The KV write, with the rotation of queries and keys or without, as work items of a foreign function.

`attend` says how keys and values lie in a page.
"""

# numba reads these functions itself; pyright knows neither its types nor its intrinsics.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import numpy as np

from pallas_kernels.cpu import ffi
from pallas_kernels.paged_attention.cpu import vectors
from pallas_kernels.paged_attention.cpu.vectors import LANES, compiled

# What argument 0 of a call holds, int32.
TOKENS, KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE, NUM_PAGES, NUM_SIZES = range(7)

# Tokens of an item.
_TOKENS_TOGETHER = 8


@compiled
def num_items(frame):
    sizes = ffi.argument(frame, 0, NUM_SIZES, np.int32)
    return (np.int64(sizes[TOKENS]) + _TOKENS_TOGETHER - 1) // _TOKENS_TOGETHER


@compiled
def _store(sizes, pool, slot, head, key, value):
    """Writes a key and a value [D] to a slot; nothing to those of the null page and to those outside the pool."""
    page_size, head_dim = np.int64(sizes[PAGE_SIZE]), np.int64(sizes[HEAD_DIM])
    if slot < page_size or slot >= page_size * sizes[NUM_PAGES]:
        return
    page, offset = slot // page_size, slot % page_size
    size = page_size * head_dim
    place = pool + 2 * size * (page * 2 * sizes[KV_HEADS] + head)
    words, keys = ffi.array_at(key, head_dim // 2, np.uint32), ffi.array_at(place, size // 2, np.uint32)
    for pair in range(head_dim // 2):
        keys[pair * page_size + offset] = words[pair]
    place += 2 * size * sizes[KV_HEADS]
    numbers, values = ffi.array_at(value, head_dim, np.uint16), ffi.array_at(place, size, np.uint16)
    start = offset // 2 * 2 * head_dim + offset % 2
    for lane in range(head_dim):
        values[start + 2 * lane] = numbers[lane]


@compiled
def write(frame, item):
    """Writes the keys and values of a few tokens."""
    sizes = ffi.argument(frame, 0, NUM_SIZES, np.int32)
    tokens, heads, head_dim = np.int64(sizes[TOKENS]), np.int64(sizes[KV_HEADS]), np.int64(sizes[HEAD_DIM])
    key = ffi.address_of(ffi.argument(frame, 1, 1, np.uint16))
    value = ffi.address_of(ffi.argument(frame, 2, 1, np.uint16))
    slots = ffi.argument(frame, 4, tokens, np.int32)
    pool = ffi.address_of(ffi.result(frame, 0, 1, np.uint16))
    for token in range(item * _TOKENS_TOGETHER, min((item + 1) * _TOKENS_TOGETHER, tokens)):
        for head in range(heads):
            place = 2 * head_dim * (token * heads + head)
            _store(sizes, pool, np.int64(slots[token]), head, key + place, value + place)


@compiled
def rotate_and_write(frame, item):
    """Rotates the queries and keys of a few tokens, and writes their keys and values."""
    sizes = ffi.argument(frame, 0, NUM_SIZES, np.int32)
    tokens, heads, head_dim = np.int64(sizes[TOKENS]), np.int64(sizes[KV_HEADS]), np.int64(sizes[HEAD_DIM])
    group = np.int64(sizes[GROUP])
    given = ffi.address_of(ffi.argument(frame, 1, 1, np.float32))
    cosines = ffi.address_of(ffi.argument(frame, 2, 1, np.float32))
    sines = ffi.address_of(ffi.argument(frame, 3, 1, np.float32))
    slots = ffi.argument(frame, 5, tokens, np.int32)
    queries = ffi.address_of(ffi.result(frame, 0, 1, np.uint16))
    pool = ffi.address_of(ffi.result(frame, 1, 1, np.uint16))
    scratch = ffi.allocate(4 * head_dim)
    for token in range(item * _TOKENS_TOGETHER, min((item + 1) * _TOKENS_TOGETHER, tokens)):
        cosine, sine = cosines + 2 * head_dim * token, sines + 2 * head_dim * token
        for head in range(heads):
            start = given + 4 * head_dim * (group + 2) * (token * heads + head)
            for member in range(group + 1):
                out = scratch
                if member < group:
                    out = queries + 2 * head_dim * ((token * heads + head) * group + member)
                for lane in range(0, head_dim // 2, LANES):
                    vectors.rotate_lanes(
                        start + 4 * (head_dim * member + lane),
                        cosine + 4 * lane,
                        sine + 4 * lane,
                        2 * head_dim,
                        out + 2 * lane,
                    )
            for lane in range(0, head_dim, 2 * LANES):
                vectors.round_lanes(
                    start + 4 * (head_dim * (group + 1) + lane), np.float32(1), scratch + 2 * (head_dim + lane)
                )
            _store(sizes, pool, np.int64(slots[token]), head, scratch, scratch + 2 * head_dim)
    ffi.release(scratch)
