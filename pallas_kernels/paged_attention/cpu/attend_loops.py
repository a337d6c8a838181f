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
from jaxserve.pallas_kernels.paged_attention.cpu import attend_plan as plans
from jaxserve.pallas_kernels.paged_attention.cpu import vectors
from jaxserve.pallas_kernels.paged_attention.cpu.attend_plan import (
    GROUP,
    HEAD_DIM,
    KV_HEADS,
    MAX_PAGES,
    NUM_PAGES,
    PAGE_SIZE,
    ROWS,
    TOKENS,
    WINDOW,
)
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

# A window that no sequence is longer than.
NO_WINDOW = 2**30

# The exponent that a query starts with, below that of any score. Finite, so that differences are never NaN.
_LOWEST_EXPONENT = -(2.0**126)
_LOG2_E = math.log2(math.e)
_CHUNKS = BLOCK // LANES

# Numbers of one type: numba compiles a function anew for each literal among its arguments.
_ZERO, _ONE = np.int64(0), np.int64(1)

# Places in the scratch memory of a block, in bytes: what `weigh` tells `gather`, the addresses of the keys and of the
# values of each chunk, those of values of which some are masked, and one masked pair of positions. After the addresses
# of a block come those of the one that is read next.
_WEIGHTS = 0
_DECAYS = _WEIGHTS + 2 * BLOCK * MAX_ROWS
_KEYS, _VALUES, _MASKED, _PAIR = (_DECAYS + 64 * number for number in range(1, 5))

# Words of a span of blocks that some members of a tile take, int32.
(_FIRST, _COUNT, _ROW, _BEGIN, _END, _OLDEST, _LENGTH, _SPAN_WORDS) = range(8)


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
    """As many as the plan lists."""
    return int32_at(argument(frame, 8), plans.NUM_ITEMS)


@compiled
def attend(frame, item):
    """Computes an item of the plan for some heads: a tile of tokens of one row, or one token of each of several."""
    sizes, plan = argument(frame, 0), argument(frame, 8)
    planned = plan + 4 * (plans.FIRST_ITEM + plans.ITEM_WORDS * item)
    rows, tokens = int32_at(planned, plans.ITEM_ROWS), int32_at(planned, plans.ITEM_TOKENS)
    if rows == 0:
        _clear_padding(frame, sizes, int32_at(planned, plans.ITEM_TOKEN))
        return
    count = max(rows, tokens)
    queries, heads = count * int32_at(sizes, GROUP), int32_at(planned, plans.ITEM_HEADS)
    head_dim, padded = int32_at(sizes, HEAD_DIM), (queries + LANES - 1) // LANES * 4 * LANES
    # A head's share of the scratch memory: outputs, totals, queries, exponents.
    share = queries * (6 * head_dim + 4 * LANES) + padded
    lists = 4 * count + 4 * _SPAN_WORDS * 3 * count
    scratch = ffi.allocate(heads * share + padded + MAX_ROWS * 2 * BLOCK + 4 * head_dim + 1024 + lists)
    state = (scratch + 63) // 64 * 64
    places = state + heads * share
    work = places + padded
    chosen = work + _PAIR + 4 * head_dim
    spans = chosen + 4 * count
    if rows == 1:
        number = _one_row(frame, sizes, planned, chosen, places, spans)
    else:
        number = _several_rows(frame, sizes, planned, chosen, places, spans)
    for head in range(heads):
        _begin_head(frame, sizes, chosen, queries, int32_at(planned, plans.ITEM_HEAD) + head, state + head * share)
    _take_spans(frame, sizes, planned, queries, state, share, places, work, spans, number)
    for head in range(heads):
        _end_head(frame, sizes, chosen, queries, int32_at(planned, plans.ITEM_HEAD) + head, state + head * share)
    ffi.release(scratch)


@compiled
def _clear_padding(frame, sizes, done):
    """Writes zeros for the tokens past the first `done`."""
    width = int32_at(sizes, KV_HEADS) * int32_at(sizes, GROUP) * int32_at(sizes, HEAD_DIM)
    # Two bfloat16 at a time.
    fill(result(frame, 0) + 2 * done * width, (int32_at(sizes, TOKENS) - done) * width // 2, 0.0)


@compiled
def _one_row(frame, sizes, planned, chosen, places, spans):
    """Lists the tokens of a tile of one row and the only span of blocks that they see; returns the number of spans."""
    row, first = int32_at(planned, plans.ITEM_ROW), int32_at(planned, plans.ITEM_TOKEN)
    count, group = int32_at(planned, plans.ITEM_TOKENS), int32_at(sizes, GROUP)
    position = int32_at(argument(frame, 4), row) - int32_at(argument(frame, 5), row + 1) + first
    for token in range(count):
        set_int32(chosen, token, first + token)
    for query in range(count * group):
        set_int32(places, query, position + query // group)
    oldest, length = max(0, position - int32_at(sizes, WINDOW) + 1), position + count
    return _add_span(spans, _ZERO, _ZERO, count, row, oldest // BLOCK, (length + BLOCK - 1) // BLOCK, oldest, length)


@compiled
def _add_span(spans, number, first, count, row, begin, end, oldest, length):
    """Adds blocks `begin` to `end` of a row's pages, which `count` members of the tile from member `first` on take;
    positions before `oldest` and from `length` on are not read as numbers. Returns how many spans there are."""
    if begin < end:
        span = spans + 4 * _SPAN_WORDS * number
        set_int32(span, _FIRST, first)
        set_int32(span, _COUNT, count)
        set_int32(span, _ROW, row)
        set_int32(span, _BEGIN, begin)
        set_int32(span, _END, end)
        set_int32(span, _OLDEST, oldest)
        set_int32(span, _LENGTH, length)
        number += 1
    return number


@compiled
def _several_rows(frame, sizes, planned, chosen, places, spans):
    """Lists the tokens of a tile of several rows and the spans of blocks that some of them take together.

    Each row's spans come in the order of its positions, so that its sums are those of the row alone.
    """
    first, rows = int32_at(planned, plans.ITEM_ROW), int32_at(planned, plans.ITEM_ROWS)
    group, shared = int32_at(sizes, GROUP), int32_at(planned, plans.ITEM_BEGIN)
    members = argument(frame, 8) + 4 * int32_at(sizes, plans.MEMBERS)
    number = _ZERO
    for member in range(rows):
        row = int32_at(members, first + member)
        length = int32_at(argument(frame, 4), row)
        set_int32(chosen, member, int32_at(argument(frame, 5), row))
        for query in range(group):
            set_int32(places, member * group + query, length - 1)
        oldest = max(0, length - int32_at(sizes, WINDOW))
        number = _add_span(spans, number, member, _ONE, row, oldest // BLOCK, shared, oldest, length)
    common = members + 4 * int32_at(sizes, ROWS)
    for member in range(rows):
        # What it shares with the row before it has come with that row. From there on it leads.
        row = int32_at(members, first + member)
        length = int32_at(argument(frame, 4), row)
        block, end = shared, (length + BLOCK - 1) // BLOCK
        if member > 0:
            block = int32_at(common, first + member)
        while block < end:
            count, until = _ONE, end
            while member + count < rows and int32_at(common, first + member + count) > block:
                until = min(until, int32_at(common, first + member + count))
                count += 1
            seen = length if count == 1 else until * BLOCK
            number = _add_span(spans, number, member, count, row, block, until, _ZERO, seen)
            block = until
    return number


@compiled
def _take_spans(frame, sizes, planned, queries, state, share, places, work, spans, number):
    """Takes the blocks of all spans, each for every head before the next, and looks for the pages of the one that
    follows meanwhile."""
    first_head, heads = int32_at(planned, plans.ITEM_HEAD), int32_at(planned, plans.ITEM_HEADS)
    group = int32_at(sizes, GROUP)
    _find_pages(frame, sizes, spans, first_head, int32_at(spans, _BEGIN), work)
    for index in range(number):
        span = spans + 4 * _SPAN_WORDS * index
        begin, steps = int32_at(span, _BEGIN), (int32_at(span, _END) - int32_at(span, _BEGIN)) * heads
        for step in range(steps):
            for chunk in range(_CHUNKS):
                set_int64(work + _KEYS, chunk, int64_at(work + _KEYS, _CHUNKS + chunk))
                set_int64(work + _VALUES, chunk, int64_at(work + _VALUES, _CHUNKS + chunk))
            if step + 1 < steps:
                _find_pages(frame, sizes, span, first_head + (step + 1) % heads, begin + (step + 1) // heads, work)
            elif index + 1 < number:
                following = span + 4 * _SPAN_WORDS
                _find_pages(frame, sizes, following, first_head, int32_at(following, _BEGIN), work)
            _take_block(
                frame,
                sizes,
                span,
                begin + step // heads,
                int32_at(span, _FIRST) * group,
                int32_at(span, _COUNT) * group,
                queries,
                state + step % heads * share,
                places,
                work,
            )


@compiled
def _begin_head(frame, sizes, chosen, queries, head, state):
    """Sets up a head's state and copies its queries side by side."""
    kv_heads, group, head_dim = int32_at(sizes, KV_HEADS), int32_at(sizes, GROUP), int32_at(sizes, HEAD_DIM)
    size, width = 4 * queries * (head_dim + LANES), 2 * group * head_dim
    fill(state, size // 4, 0.0)
    fill(state + size + 2 * queries * head_dim, queries, _LOWEST_EXPONENT)
    for number in range(queries // group):
        given = argument(frame, 1) + (int32_at(chosen, number) * kv_heads + head) * width
        copy_masked(given, state + size + number * width, width // (4 * LANES), -1)


@compiled
def _find_pages(frame, sizes, span, head, block, work):
    """Writes where the keys and the values of each chunk of LANES positions of the block that is read next begin."""
    kv_heads, head_dim, page_size = int32_at(sizes, KV_HEADS), int32_at(sizes, HEAD_DIM), int32_at(sizes, PAGE_SIZE)
    table = argument(frame, 3) + 4 * int32_at(span, _ROW) * int32_at(sizes, MAX_PAGES)
    side, length = 2 * kv_heads * page_size * head_dim, int32_at(span, _LENGTH)
    pool = argument(frame, 2) + 2 * head * page_size * head_dim
    for chunk in range(_CHUNKS):
        position = block * BLOCK + chunk * LANES
        page = 0  # what lies past a sequence's length is not read as a number
        if position < length:
            page = min(max(int32_at(table, position // page_size), 0), int32_at(sizes, NUM_PAGES) - 1)
        place = pool + page * 2 * side
        set_int64(work + _KEYS, _CHUNKS + chunk, place + 4 * (position % page_size))
        set_int64(work + _VALUES, _CHUNKS + chunk, place + side + 2 * (position % page_size) * head_dim)


@compiled
def _take_block(frame, sizes, span, block, first_query, count, queries, state, places, work):
    """Takes a block of positions into the state of `count` of a head's queries from `first_query` on."""
    head_dim = int32_at(sizes, HEAD_DIM)
    totals = state + 4 * queries * head_dim
    query = totals + 4 * LANES * queries
    exponents = query + 2 * queries * head_dim
    scale = float32_at(argument(frame, 6), 0)
    first = max(int32_at(span, _OLDEST) - block * BLOCK, 0)
    last = min(int32_at(span, _LENGTH) - block * BLOCK, BLOCK)
    done, stop = first_query, first_query + count
    while done < stop:
        calls = (stop - done + MAX_ROWS - 1) // MAX_ROWS
        rows = (stop - done + calls - 1) // calls
        vectors.weigh(
            rows,
            query + 2 * done * head_dim,
            head_dim // 2,
            work + _KEYS,
            4 * int32_at(sizes, PAGE_SIZE),
            block * BLOCK,
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
def _end_head(frame, sizes, chosen, queries, head, state):
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
        token = int32_at(chosen, query // group)
        written = result(frame, 0) + 2 * head_dim * (token * kv_heads * group + member)
        for lane in range(0, head_dim, 2 * LANES):
            vectors.round_lanes(out + 4 * lane, decay, total, written + 2 * lane)
