"""Attention over pages as work items of a foreign function.

Inside a page this implementation owns the order of the numbers. One head's keys are [D / 2, page_size, 2] and its
values [page_size / 2, D, 2]: pairs of the axis that a product sums over lie side by side, as `vdpbf16ps` takes them.
"""

# numba reads these functions itself; pyright knows neither its types nor its intrinsics.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import math

import numpy as np

from jaxserve.pallas_kernels.cpu import ffi
from jaxserve.pallas_kernels.cpu.emitter import LANES
from jaxserve.pallas_kernels.paged_attention.cpu import vectors
from jaxserve.pallas_kernels.paged_attention.cpu.pointers import (
    argument,
    copy_masked,
    fill,
    float32_at,
    int32_at,
    int64_at,
    result,
    set_int32,
    set_int64,
)
from jaxserve.pallas_kernels.paged_attention.cpu.vectors import BLOCK, MAX_ROWS, compiled

# What argument 0 of a call holds, int32.
(TOKENS, ROWS, KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE, MAX_PAGES, NUM_PAGES, WINDOW, TILE, PARTS) = range(11)

# A window that no sequence is longer than.
NO_WINDOW = 2**30

# The exponent that a query starts with, below that of any score. Finite, so that differences are never NaN.
_LOWEST_EXPONENT = -(2.0**126)
_LOG2_E = math.log2(math.e)
_CHUNKS = BLOCK // LANES

# Places in the scratch memory of a block, in bytes: what `weigh` tells `gather`, the addresses of the keys and of the
# values of each chunk, those of values of which some are masked, and one masked pair of positions. After the addresses
# of a block come those of the one that is read next.
_WEIGHTS = 0
_DECAYS = _WEIGHTS + 2 * BLOCK * MAX_ROWS
_KEYS, _VALUES, _MASKED, _PAIR = (_DECAYS + 64 * number for number in range(1, 5))


@compiled
def _gather(rows, out, head_dim, weights, decays, values, first, count):
    """Adds weighed values to outputs [rows, head_dim], after their decay, of which nothing is left then."""
    offset, step = 0, 4 * head_dim
    while head_dim - offset // 4 >= 4 * LANES:
        vectors.gather_wide(rows, out + offset, step, weights, decays, values, step, offset, first, count)
        offset += 16 * LANES
    while offset < step:
        vectors.gather(rows, out + offset, step, weights, decays, values, step, offset, first, count)
        offset += 8 * LANES
    fill(decays, MAX_ROWS, 1.0)  # once a block


@compiled
def num_items(frame):
    """One item for each tile and part of the heads, and one for the padding tokens."""
    sizes, starts = argument(frame, 0), argument(frame, 5)
    tile, tiles = int32_at(sizes, TILE), 0
    for row in range(int32_at(sizes, ROWS)):
        tiles += (int32_at(starts, row + 1) - int32_at(starts, row) + tile - 1) // tile
    return tiles * int32_at(sizes, PARTS) + 1


@compiled
def attend(frame, item):
    """Computes one tile of tokens of one sequence for some of its heads.

    Tiles are counted from the last row's last tile, which reads the most of its row.
    """
    sizes, starts = argument(frame, 0), argument(frame, 5)
    tile, parts = int32_at(sizes, TILE), int32_at(sizes, PARTS)
    number = item // parts
    row = int32_at(sizes, ROWS) - 1
    while row >= 0:
        tiles = (int32_at(starts, row + 1) - int32_at(starts, row) + tile - 1) // tile
        if number < tiles:
            break
        number -= tiles
        row -= 1
    if row < 0:
        _clear_padding(frame, sizes, int32_at(starts, int32_at(sizes, ROWS)))
        return
    stop = int32_at(starts, row + 1)
    token = int32_at(starts, row) + (tiles - 1 - number) * tile
    position = int32_at(argument(frame, 4), row) - stop + token
    heads = int32_at(sizes, KV_HEADS) // parts
    _attend_tile(frame, sizes, row, token, min(tile, stop - token), position, item % parts * heads, heads)


@compiled
def _clear_padding(frame, sizes, done):
    """Writes zeros for the tokens past the first `done`."""
    width = int32_at(sizes, KV_HEADS) * int32_at(sizes, GROUP) * int32_at(sizes, HEAD_DIM)
    # Two bfloat16 at a time.
    fill(result(frame, 0) + 2 * done * width, (int32_at(sizes, TOKENS) - done) * width // 2, 0.0)


@compiled
def _attend_tile(frame, sizes, row, token, count, position, first_head, heads):
    """Computes `count` tokens from `token` on, the first of which is at `position`, for `heads` key-value heads."""
    group, head_dim, window = int32_at(sizes, GROUP), int32_at(sizes, HEAD_DIM), int32_at(sizes, WINDOW)
    queries = count * group
    padded = (queries + LANES - 1) // LANES * 4 * LANES
    # A head's share of the scratch memory: outputs, totals, queries, exponents.
    share = queries * (6 * head_dim + 4 * LANES) + padded
    scratch = ffi.allocate(heads * share + padded + MAX_ROWS * 2 * BLOCK + 4 * head_dim + 1024)
    state = (scratch + 63) // 64 * 64
    places = state + heads * share
    for query in range(queries):
        set_int32(places, query, position + query // group)
    for head in range(heads):
        _begin_head(frame, sizes, token, queries, first_head + head, state + head * share)
    length, oldest = position + count, max(0, position - window + 1)
    work, begin = places + padded, oldest // BLOCK * BLOCK
    _find_pages(frame, sizes, row, first_head, begin, length, work)
    for number in range((length - begin + BLOCK - 1) // BLOCK * heads):
        block, head = begin + number // heads * BLOCK, number % heads
        for chunk in range(_CHUNKS):
            set_int64(work + _KEYS, chunk, int64_at(work + _KEYS, _CHUNKS + chunk))
            set_int64(work + _VALUES, chunk, int64_at(work + _VALUES, _CHUNKS + chunk))
        following = begin + (number + 1) // heads * BLOCK
        if following < length:
            _find_pages(frame, sizes, row, first_head + (number + 1) % heads, following, length, work)
        _take_block(frame, sizes, block, oldest, length, queries, state + head * share, places, work)
    for head in range(heads):
        _end_head(frame, sizes, token, queries, first_head + head, state + head * share)
    ffi.release(scratch)


@compiled
def _begin_head(frame, sizes, token, queries, head, state):
    """Sets up a head's state and copies its queries side by side."""
    kv_heads, group, head_dim = int32_at(sizes, KV_HEADS), int32_at(sizes, GROUP), int32_at(sizes, HEAD_DIM)
    size, width = 4 * queries * (head_dim + LANES), 2 * group * head_dim
    fill(state, size // 4, 0.0)
    fill(state + size + 2 * queries * head_dim, queries, _LOWEST_EXPONENT)
    for number in range(queries // group):
        given = argument(frame, 1) + ((token + number) * kv_heads + head) * width
        copy_masked(given, state + size + number * width, width // (4 * LANES), -1)


@compiled
def _find_pages(frame, sizes, row, head, block, length, work):
    """Writes where the keys and the values of each chunk of LANES positions of the block that is read next begin."""
    kv_heads, head_dim, page_size = int32_at(sizes, KV_HEADS), int32_at(sizes, HEAD_DIM), int32_at(sizes, PAGE_SIZE)
    table = argument(frame, 3) + 4 * row * int32_at(sizes, MAX_PAGES)
    side = 2 * kv_heads * page_size * head_dim
    pool = argument(frame, 2) + 2 * head * page_size * head_dim
    for chunk in range(_CHUNKS):
        position = block + chunk * LANES
        page = 0  # what lies past a sequence's length is not read as a number
        if position < length:
            page = min(max(int32_at(table, position // page_size), 0), int32_at(sizes, NUM_PAGES) - 1)
        place = pool + page * 2 * side
        set_int64(work + _KEYS, _CHUNKS + chunk, place + 4 * (position % page_size))
        set_int64(work + _VALUES, _CHUNKS + chunk, place + side + 2 * (position % page_size) * head_dim)


@compiled
def _take_block(frame, sizes, block, oldest, length, queries, state, places, work):
    """Takes a block of positions into the state of a head's queries."""
    head_dim = int32_at(sizes, HEAD_DIM)
    totals = state + 4 * queries * head_dim
    query = totals + 4 * LANES * queries
    exponents = query + 2 * queries * head_dim
    scale = float32_at(argument(frame, 6), 0)
    first, last = max(oldest - block, 0), min(length - block, BLOCK)
    done = 0
    while done < queries:
        calls = (queries - done + MAX_ROWS - 1) // MAX_ROWS
        rows = (queries - done + calls - 1) // calls
        vectors.weigh(
            rows,
            query + 2 * done * head_dim,
            head_dim // 2,
            work + _KEYS,
            4 * int32_at(sizes, PAGE_SIZE),
            block,
            places + 4 * done,
            int32_at(sizes, WINDOW),
            scale,
            exponents + 4 * done,
            totals + 4 * LANES * done,
            work + _DECAYS,
            work + _WEIGHTS,
        )
        _gather_seen(rows, state + 4 * done * head_dim, head_dim, work, first, last)
        done += rows


@compiled
def _gather_seen(rows, out, head_dim, work, first, last):
    """Gathers the values from place `first` of the block to `last`; no other is read as a number."""
    pair, end = first // 2, last // 2
    if first % 2:
        _gather_masked(rows, out, head_dim, work, pair, -65536 * (first % 2))
        pair += 1
    if end > pair:
        _gather(rows, out, head_dim, work + _WEIGHTS, work + _DECAYS, work + _VALUES, pair, end - pair)
    if last % 2 and end >= pair:
        _gather_masked(rows, out, head_dim, work, end, 65535 * (last % 2))


@compiled
def _gather_masked(rows, out, head_dim, work, pair, mask):
    """Gathers a pair of positions of which one counts: the other may hold what is no number."""
    chunk, inside = pair // (LANES // 2), pair % (LANES // 2) * 4 * head_dim
    copy_masked(int64_at(work + _VALUES, chunk) + inside, work + _PAIR, head_dim // LANES, mask)
    set_int64(work + _MASKED, chunk, work + _PAIR - inside)
    set_int64(work + _MASKED, _CHUNKS + chunk, int64_at(work + _VALUES, _CHUNKS + chunk))
    _gather(rows, out, head_dim, work + _WEIGHTS, work + _DECAYS, work + _MASKED, pair, np.int64(1))


@compiled
def _end_head(frame, sizes, token, queries, head, state):
    """Writes a head's outputs."""
    kv_heads, group, head_dim = int32_at(sizes, KV_HEADS), int32_at(sizes, GROUP), int32_at(sizes, HEAD_DIM)
    totals, exponents = state + 4 * queries * head_dim, state + queries * (6 * head_dim + 4 * LANES)
    for query in range(queries):
        member = head * group + query % group
        total = np.float32(0)
        for lane in range(LANES):
            total += float32_at(totals, query * LANES + lane)
        out, decay = state + 4 * query * head_dim, np.float32(1)
        sink = float32_at(argument(frame, 7), member) * np.float32(_LOG2_E)
        if sink > -np.inf:
            # One more score, whose value is 0.
            exponent = float32_at(exponents, query)
            raised = max(exponent, np.float32(math.ceil(sink)))
            decay = np.float32(2.0 ** (exponent - raised))
            total = total * decay + np.float32(2.0 ** (sink - raised))
        written = result(frame, 0) + 2 * head_dim * ((token + query // group) * kv_heads * group + member)
        for lane in range(0, head_dim, 2 * LANES):
            vectors.round_lanes(out + 4 * lane, decay, total, written + 2 * lane)
