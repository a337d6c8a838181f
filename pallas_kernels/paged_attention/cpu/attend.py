"""Attention over pages as work items of a foreign function.

Inside a page this implementation owns the order of the numbers. One head's keys are [D / 2, page_size, 2] and its
values [page_size / 2, D, 2]: pairs of the axis that a product sums over lie side by side, as `vdpbf16ps` takes them.
"""

# numba reads these functions itself; pyright knows neither its types nor its intrinsics.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import math

import numpy as np

from pallas_kernels.cpu import ffi
from pallas_kernels.paged_attention.cpu import vectors
from pallas_kernels.paged_attention.cpu.vectors import BLOCK, LANES, MAX_ROWS, compiled

# What argument 0 of a call holds, int32.
(TOKENS, ROWS, KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE, MAX_PAGES, NUM_PAGES, WINDOW, TILE, PARTS) = range(11)
NUM_SIZES = 11

# A window that no sequence is longer than.
NO_WINDOW = 2**30

# The exponent that a query starts with, below that of any score. Finite, so that differences are never NaN.
_LOWEST_EXPONENT = -(2.0**126)
_LOG2_E = math.log2(math.e)
_CHUNKS = BLOCK // LANES


@compiled
def _fill(address, count, value):
    """Sets float32 numbers."""
    numbers = ffi.array_at(address, count, np.float32)
    for place in range(count):
        numbers[place] = value


@compiled
def _gather(rows, out, head_dim, weights, decays, values, first, count):
    """Adds weighed values to outputs [rows, head_dim], after their decay, of which nothing is left then."""
    offset, step = 0, 4 * head_dim
    while head_dim - offset // 4 >= 4 * LANES:
        vectors.gather_wide(rows, out + offset, step, weights, decays, values, step, offset, first, count)
        offset += 16 * LANES
    while offset < 4 * head_dim:
        vectors.gather(rows, out + offset, step, weights, decays, values, step, offset, first, count)
        offset += 8 * LANES
    _fill(decays, MAX_ROWS, 1.0)  # once a block


@compiled
def _locate(starts, rows, tile, number):
    """The row and the tile in it of tile `number`, counted from the last row's last tile, which reads the most."""
    for row in range(rows - 1, -1, -1):
        tiles = (starts[row + 1] - starts[row] + tile - 1) // tile
        if number < tiles:
            return row, tiles - 1 - number
        number -= tiles
    return -1, 0


@compiled
def num_items(frame):
    """One item for each tile and part of the heads, and one for the padding tokens."""
    sizes = ffi.argument(frame, 0, NUM_SIZES, np.int32)
    rows, tile = np.int64(sizes[ROWS]), np.int64(sizes[TILE])
    starts = ffi.argument(frame, 5, rows + 1, np.int32)
    tiles = 0
    for row in range(rows):
        tiles += (np.int64(starts[row + 1]) - starts[row] + tile - 1) // tile
    return tiles * sizes[PARTS] + 1


@compiled
def attend(frame, item):
    """Computes one tile of tokens of one sequence for some of its heads."""
    sizes = ffi.argument(frame, 0, NUM_SIZES, np.int32)
    rows, tile, parts = np.int64(sizes[ROWS]), np.int64(sizes[TILE]), np.int64(sizes[PARTS])
    starts = ffi.argument(frame, 5, rows + 1, np.int32)
    row, place = _locate(starts, rows, tile, item // parts)
    if row < 0:
        tokens, width = np.int64(sizes[TOKENS]), np.int64(sizes[KV_HEADS]) * sizes[GROUP] * sizes[HEAD_DIM]
        out = ffi.address_of(ffi.result(frame, 0, 1, np.uint16))
        done = np.int64(starts[rows])
        _fill(out + 2 * done * width, (tokens - done) * width // 2, 0.0)  # two bfloat16 at a time
        return
    token = np.int64(starts[row]) + place * tile
    count = min(tile, starts[row + 1] - token)
    lengths = ffi.argument(frame, 4, rows, np.int32)
    position = np.int64(lengths[row]) - starts[row + 1] + token
    heads = np.int64(sizes[KV_HEADS]) // parts
    _attend_tile(frame, sizes, row, token, count, position, (item % parts) * heads, heads)


@compiled
def _attend_tile(frame, sizes, row, token, count, position, first_head, heads):
    """Computes `count` tokens from `token` on, the first of which is at `position`, for `heads` key-value heads."""
    group, head_dim = np.int64(sizes[GROUP]), np.int64(sizes[HEAD_DIM])
    queries = count * group
    padded = (queries + LANES - 1) // LANES * LANES
    # A head's share of the scratch memory: outputs, totals, queries, exponents.
    share = queries * (4 * head_dim + 4 * LANES + 2 * head_dim) + 4 * padded
    scratch = ffi.allocate(heads * share + 4 * padded + MAX_ROWS * (2 * BLOCK + 64) + 4 * head_dim + 1024)
    state = (scratch + 63) // 64 * 64
    places = state + heads * share
    work = places + 4 * padded
    place_of = ffi.array_at(places, queries, np.int32)
    for query in range(queries):
        place_of[query] = position + query // group
    for head in range(heads):
        _begin_head(frame, sizes, token, queries, first_head + head, state + head * share)
    window = np.int64(sizes[WINDOW])
    length, oldest = position + count, max(0, position - window + 1)
    for block in range(oldest // BLOCK * BLOCK, length, BLOCK):
        for head in range(heads):
            _take_block(
                frame, sizes, row, first_head + head, block, oldest, length, queries, state + head * share, places, work
            )
    for head in range(heads):
        _end_head(frame, sizes, token, queries, first_head + head, state + head * share)
    ffi.release(scratch)


@compiled
def _begin_head(frame, sizes, token, queries, head, state):
    """Sets up a head's state and copies its queries side by side."""
    kv_heads, group, head_dim = np.int64(sizes[KV_HEADS]), np.int64(sizes[GROUP]), np.int64(sizes[HEAD_DIM])
    size = queries * (head_dim + LANES)
    _fill(state, size, 0.0)
    _fill(state + 4 * size + 2 * queries * head_dim, queries, _LOWEST_EXPONENT)
    width = group * head_dim // 2  # in words of two
    given = ffi.argument(frame, 1, np.int64(sizes[TOKENS]) * kv_heads * width, np.uint32)
    kept = ffi.array_at(state + 4 * size, queries * head_dim // 2, np.uint32)
    for number in range(queries // group):
        start = ((token + number) * kv_heads + head) * width
        for place in range(width):
            kept[number * width + place] = given[start + place]


@compiled
def _take_block(frame, sizes, row, head, block, oldest, length, queries, state, places, work):
    """Takes a block of positions into the state of a head's queries."""
    head_dim, page_size = np.int64(sizes[HEAD_DIM]), np.int64(sizes[PAGE_SIZE])
    outs, totals = state, state + 4 * queries * head_dim
    query = totals + 4 * LANES * queries
    exponents = query + 2 * queries * head_dim
    weights, decays = work, work + 2 * BLOCK * MAX_ROWS
    tables = decays + 64
    keys, values = ffi.array_at(tables, _CHUNKS, np.int64), ffi.array_at(tables + 64, _CHUNKS, np.int64)
    _find_pages(frame, sizes, row, head, block, length, keys, values)
    scale = ffi.argument(frame, 6, 1, np.float32)[0]
    first, last = max(oldest - block, 0), min(length - block, BLOCK)
    done = 0
    while done < queries:
        left = queries - done
        some = (left + (left + MAX_ROWS - 1) // MAX_ROWS - 1) // ((left + MAX_ROWS - 1) // MAX_ROWS)
        vectors.weigh(
            some,
            query + 2 * done * head_dim,
            head_dim // 2,
            tables,
            4 * page_size,
            block,
            places + 4 * done,
            np.int64(sizes[WINDOW]),
            scale,
            exponents + 4 * done,
            totals + 4 * LANES * done,
            decays,
            weights,
        )
        _gather_seen(some, outs + 4 * done * head_dim, head_dim, weights, decays, tables + 64, first, last)
        done += some


@compiled
def _gather_seen(rows, out, head_dim, weights, decays, values, first, last):
    """Gathers the values from place `first` of the block to `last`; no other is read as a number."""
    pair, end = first // 2, last // 2
    if first % 2:
        _gather_masked(rows, out, head_dim, weights, decays, values, pair, -65536)
        pair += 1
    if end > pair:
        _gather(rows, out, head_dim, weights, decays, values, pair, end - pair)
    if last % 2 and end >= pair:
        _gather_masked(rows, out, head_dim, weights, decays, values, end, 65535)


@compiled
def _gather_masked(rows, out, head_dim, weights, decays, values, pair, mask):
    """Gathers a pair of positions of which one counts: the other may hold what is no number."""
    table = values + 64
    pairs = table + 64
    chunk, inside = pair // (LANES // 2), pair % (LANES // 2)
    base = ffi.array_at(values, _CHUNKS, np.int64)[chunk] + inside * 4 * head_dim
    held, kept = ffi.array_at(base, head_dim, np.int32), ffi.array_at(pairs, head_dim, np.int32)
    for lane in range(head_dim):
        kept[lane] = held[lane] & mask
    ffi.array_at(table, _CHUNKS, np.int64)[chunk] = pairs - inside * 4 * head_dim
    _gather(rows, out, head_dim, weights, decays, table, pair, 1)


@compiled
def _find_pages(frame, sizes, row, head, block, length, keys, values):
    """Writes where the keys and values of each chunk of LANES positions of a block begin."""
    kv_heads, head_dim, page_size = np.int64(sizes[KV_HEADS]), np.int64(sizes[HEAD_DIM]), np.int64(sizes[PAGE_SIZE])
    max_pages = np.int64(sizes[MAX_PAGES])
    table = ffi.argument(frame, 3, np.int64(sizes[ROWS]) * max_pages, np.int32)
    side = 2 * kv_heads * page_size * head_dim
    pool = ffi.address_of(ffi.argument(frame, 2, 1, np.uint16)) + 2 * head * page_size * head_dim
    for chunk in range(_CHUNKS):
        position = block + chunk * LANES
        page = np.int64(0)  # what lies past a sequence's length is not read as a number
        if position < length:
            page = min(max(np.int64(table[row * max_pages + position // page_size]), 0), np.int64(sizes[NUM_PAGES]) - 1)
        place = pool + page * 2 * side
        keys[chunk] = place + 4 * (position % page_size)
        values[chunk] = place + side + 2 * (position % page_size) * head_dim


@compiled
def _end_head(frame, sizes, token, queries, head, state):
    """Writes a head's outputs."""
    kv_heads, group, head_dim = np.int64(sizes[KV_HEADS]), np.int64(sizes[GROUP]), np.int64(sizes[HEAD_DIM])
    outs, totals = state, ffi.array_at(state + 4 * queries * head_dim, queries * LANES, np.float32)
    exponents = ffi.array_at(state + queries * (6 * head_dim + 4 * LANES), queries, np.float32)
    sinks = ffi.argument(frame, 7, kv_heads * group, np.float32)
    written = ffi.address_of(ffi.result(frame, 0, 1, np.uint16))
    for query in range(queries):
        total = np.float32(0)
        for lane in range(LANES):
            total += totals[query * LANES + lane]
        sink = sinks[head * group + query % group] * np.float32(_LOG2_E)
        if sink > -math.inf:
            # One more score, whose value is 0.
            raised = max(exponents[query], np.float32(math.ceil(sink)))
            decay = np.float32(2.0 ** (exponents[query] - raised))
            total = total * decay + np.float32(2.0 ** (sink - raised))
            out = ffi.array_at(outs + 4 * query * head_dim, head_dim, np.float32)
            for lane in range(head_dim):
                out[lane] *= decay
        number = (token + query // group) * kv_heads * group + head * group + query % group
        for lane in range(0, head_dim, 2 * LANES):
            vectors.round_lanes(outs + 4 * (query * head_dim + lane), total, written + 2 * (number * head_dim + lane))
