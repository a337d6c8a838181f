"""Attention over pages as work items of a foreign function.

Inside a page these implementations own the order of the numbers. One head's keys are [D, page_size] and its values
[page_size, D], in units: a number, or a pair of bfloat16. Pairs of the axis that a product sums over lie side by side,
as `vdpbf16ps` takes them: keys [D / 2, page_size, 2], values [page_size / 2, D, 2].
"""

# These functions are compiled; pyright does not know the types of their values.
# pyright: basic, reportOperatorIssue=false

from __future__ import annotations

from jaxserve.pallas_kernels.cpu.emitter import LANES
from jaxserve.pallas_kernels.cpu.native_functions import native
from jaxserve.pallas_kernels.paged_attention.cpu import attend_plan as plans
from jaxserve.pallas_kernels.paged_attention.cpu import vectors
from jaxserve.pallas_kernels.paged_attention.cpu.attend_plan import (
    GROUP,
    HEAD_DIM,
    KV_HEADS,
    MAX_PAGES,
    NUM_PAGES,
    PAGE_BITS,
    PAGE_SIZE,
    ROWS,
    TOKENS,
    WINDOW,
)
from jaxserve.pallas_kernels.paged_attention.cpu.elements import MAX_ROWS, MOST_ROWS, NUMBER, TOGETHER, UNIT, VECTORS
from jaxserve.pallas_kernels.paged_attention.cpu.pointers import (
    allocate,
    argument,
    copy_masked,
    fill,
    float32_at,
    int32_at,
    int64_at,
    release,
    result,
    set_int32,
    set_int64,
)
from jaxserve.pallas_kernels.paged_attention.cpu.vectors import BLOCK

# A window that no sequence is longer than.
NO_WINDOW = 2**30

# The exponent that a query starts with, below that of any score. Finite, so that differences are never NaN.
_LOWEST_EXPONENT = -(2.0**126)
_CHUNKS = BLOCK // LANES

# Places in the scratch memory of a block, in bytes: what `weigh` tells `gather`, the addresses of the keys and of the
# values of each chunk, those of values of which some are masked, and one masked pair of positions. After the addresses
# of a block come those of the one that is read next.
_WEIGHTS = 0
_DECAYS = _WEIGHTS + 4 * BLOCK * MOST_ROWS
_KEYS, _VALUES, _MASKED, _PAIR = (_DECAYS + 64 * number for number in range(1, 5))

# Words of a span of blocks that some members of a tile take, int32.
(_FIRST, _COUNT, _ROW, _BEGIN, _END, _OLDEST, _LENGTH, _SPAN_WORDS) = range(8)


@native
def _gather(rows, out, head_dim, weights, decays, values, first, count):
    """Adds weighed values to outputs [rows, head_dim], after their decay, of which nothing is left then."""
    step = UNIT * head_dim
    for done in range(0, head_dim, VECTORS * LANES):
        vectors.gather(rows, out + 4 * done, 4 * head_dim, weights, decays, values, step, UNIT * done, first, count)
    fill(decays, MOST_ROWS, 1.0)  # once a block


@native
def num_items(frame):
    """As many as the plan lists."""
    return int32_at(argument(frame, 8), plans.NUM_ITEMS)


@native
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
    share = queries * (4 * head_dim + 4 * head_dim // TOGETHER + 4 * LANES) + padded
    lists = 4 * count + 4 * _SPAN_WORDS * 3 * count
    scratch = allocate(heads * share + padded + _PAIR + 4 * head_dim + 64 + lists)
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
    release(scratch)


@native
def _clear_padding(frame, sizes, done):
    """Writes zeros for the tokens past the first `done`."""
    width = int32_at(sizes, KV_HEADS) * int32_at(sizes, GROUP) * int32_at(sizes, HEAD_DIM)
    units = width // TOGETHER
    fill(result(frame, 0) + 4 * done * units, (int32_at(sizes, TOKENS) - done) * units, 0.0)


@native
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
    return _add_span(spans, 0, 0, count, row, oldest // BLOCK, (length + BLOCK - 1) // BLOCK, oldest, length)


@native
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


@native
def _several_rows(frame, sizes, planned, chosen, places, spans):
    """Lists the tokens of a tile of several rows and the spans of blocks that some of them take together.

    Each row's spans come in the order of its positions, so that its sums are those of the row alone.
    """
    first, rows = int32_at(planned, plans.ITEM_ROW), int32_at(planned, plans.ITEM_ROWS)
    group, shared = int32_at(sizes, GROUP), int32_at(planned, plans.ITEM_BEGIN)
    members = argument(frame, 8) + 4 * int32_at(sizes, plans.MEMBERS)
    number = 0
    for member in range(rows):
        row = int32_at(members, first + member)
        length = int32_at(argument(frame, 4), row)
        set_int32(chosen, member, int32_at(argument(frame, 5), row))
        for query in range(group):
            set_int32(places, member * group + query, length - 1)
        oldest = max(0, length - int32_at(sizes, WINDOW))
        number = _add_span(spans, number, member, 1, row, oldest // BLOCK, shared, oldest, length)
    common = members + 4 * int32_at(sizes, ROWS)
    for member in range(rows):
        # What it shares with the row before it has come with that row. From there on it leads.
        row = int32_at(members, first + member)
        length = int32_at(argument(frame, 4), row)
        block, end = shared, (length + BLOCK - 1) // BLOCK
        if member > 0:
            block = int32_at(common, first + member)
        while block < end:
            count, until = 1, end
            while member + count < rows and int32_at(common, first + member + count) > block:
                until = min(until, int32_at(common, first + member + count))
                count += 1
            seen = length if count == 1 else until * BLOCK
            number = _add_span(spans, number, member, count, row, block, until, 0, seen)
            block = until
    return number


@native
def _take_spans(frame, sizes, planned, queries, state, share, places, work, spans, number):
    """Takes the blocks of all spans, each for every head before the next, and looks for the pages of the one that
    follows meanwhile."""
    first_head, heads = int32_at(planned, plans.ITEM_HEAD), int32_at(planned, plans.ITEM_HEADS)
    group = int32_at(sizes, GROUP)
    _find_pages(frame, sizes, spans, first_head, int32_at(spans, _BEGIN), work)
    for index in range(number):
        span = spans + 4 * _SPAN_WORDS * index
        block, end, head = int32_at(span, _BEGIN), int32_at(span, _END), 0
        while block < end:
            for chunk in range(_CHUNKS):
                set_int64(work + _KEYS, chunk, int64_at(work + _KEYS, _CHUNKS + chunk))
                set_int64(work + _VALUES, chunk, int64_at(work + _VALUES, _CHUNKS + chunk))
            next_head, next_block = head + 1, block
            if next_head == heads:
                next_head, next_block = 0, block + 1
            if next_block < end:
                _find_pages(frame, sizes, span, first_head + next_head, next_block, work)
            elif index + 1 < number:
                following = span + 4 * _SPAN_WORDS
                _find_pages(frame, sizes, following, first_head, int32_at(following, _BEGIN), work)
            _take_block(
                frame,
                sizes,
                span,
                block,
                int32_at(span, _FIRST) * group,
                int32_at(span, _COUNT) * group,
                queries,
                state + head * share,
                places,
                work,
            )
            head, block = next_head, next_block


@native
def _begin_head(frame, sizes, chosen, queries, head, state):
    """Sets up a head's state and copies its queries side by side."""
    kv_heads, group, head_dim = int32_at(sizes, KV_HEADS), int32_at(sizes, GROUP), int32_at(sizes, HEAD_DIM)
    size, width = 4 * queries * (head_dim + LANES), 4 * group * head_dim // TOGETHER
    fill(state, size // 4, 0.0)
    fill(state + size + queries // group * width, queries, _LOWEST_EXPONENT)
    for number in range(queries // group):
        given = argument(frame, 1) + (int32_at(chosen, number) * kv_heads + head) * width
        copy_masked(given, state + size + number * width, width // (4 * LANES), -1)


@native
def _find_pages(frame, sizes, span, head, block, work):
    """Writes where the keys and the values of each chunk of LANES positions of the block that is read next begin."""
    kv_heads, head_dim, page_size = int32_at(sizes, KV_HEADS), int32_at(sizes, HEAD_DIM), int32_at(sizes, PAGE_SIZE)
    table = argument(frame, 3) + 4 * int32_at(span, _ROW) * int32_at(sizes, MAX_PAGES)
    side, length = NUMBER * kv_heads * page_size * head_dim, int32_at(span, _LENGTH)
    pool = argument(frame, 2) + NUMBER * head * page_size * head_dim
    page_bits = int32_at(sizes, PAGE_BITS)
    for chunk in range(_CHUNKS):
        position = block * BLOCK + chunk * LANES
        page = 0  # what lies past a sequence's length is not read as a number
        if position < length:
            page = min(max(int32_at(table, position >> page_bits), 0), int32_at(sizes, NUM_PAGES) - 1)
        place, offset = pool + page * 2 * side, position & (page_size - 1)
        set_int64(work + _KEYS, _CHUNKS + chunk, place + UNIT * offset)
        set_int64(work + _VALUES, _CHUNKS + chunk, place + side + NUMBER * offset * head_dim)


@native
def _take_block(frame, sizes, span, block, first_query, count, queries, state, places, work):
    """Takes a block of positions into the state of `count` of a head's queries from `first_query` on."""
    head_dim = int32_at(sizes, HEAD_DIM)
    totals = state + 4 * queries * head_dim
    query = totals + 4 * LANES * queries
    width = 4 * head_dim // TOGETHER
    exponents = query + queries * width
    scale, cap = float32_at(argument(frame, 6), 0), float32_at(argument(frame, 6), 1)
    first = max(int32_at(span, _OLDEST) - block * BLOCK, 0)
    last = min(int32_at(span, _LENGTH) - block * BLOCK, BLOCK)
    step = UNIT * int32_at(sizes, PAGE_SIZE)
    done, stop = first_query, first_query + count
    while done < stop:
        calls = (stop - done + MAX_ROWS - 1) // MAX_ROWS
        rows = (stop - done + calls - 1) // calls
        vectors.score(rows, query + width * done, head_dim // TOGETHER, work + _KEYS, step, work + _WEIGHTS)
        vectors.weigh(
            rows,
            block * BLOCK,
            places + 4 * done,
            int32_at(sizes, WINDOW),
            scale,
            cap,
            exponents + 4 * done,
            totals + 4 * LANES * done,
            work + _DECAYS,
            work + _WEIGHTS,
        )
        _gather_seen(rows, state + 4 * done * head_dim, head_dim, work, first, last)
        done += rows


@native
def _gather_seen(rows, out, head_dim, work, first, last):
    """Gathers the values from place `first` of the block to `last`; no other is read as a number."""
    unit, end = first // TOGETHER, last // TOGETHER
    if first % TOGETHER:
        _gather_masked(rows, out, head_dim, work, unit, -65536)
        unit += 1
    if end > unit:
        _gather(rows, out, head_dim, work + _WEIGHTS, work + _DECAYS, work + _VALUES, unit, end - unit)
    if last % TOGETHER and end >= unit:
        _gather_masked(rows, out, head_dim, work, end, 65535)


@native
def _gather_masked(rows, out, head_dim, work, pair, mask):
    """Gathers a pair of positions of which one counts: the other may hold what is no number."""
    chunk, inside = pair // (LANES // 2), pair % (LANES // 2) * 4 * head_dim
    copy_masked(int64_at(work + _VALUES, chunk) + inside, work + _PAIR, head_dim // LANES, mask)
    set_int64(work + _MASKED, chunk, work + _PAIR - inside)
    set_int64(work + _MASKED, _CHUNKS + chunk, int64_at(work + _VALUES, _CHUNKS + chunk))
    _gather(rows, out, head_dim, work + _WEIGHTS, work + _DECAYS, work + _MASKED, pair, 1)


@native
def _end_head(frame, sizes, chosen, queries, head, state):
    """Writes a head's outputs."""
    kv_heads, group, head_dim = int32_at(sizes, KV_HEADS), int32_at(sizes, GROUP), int32_at(sizes, HEAD_DIM)
    totals, width = state + 4 * queries * head_dim, 4 * head_dim // TOGETHER
    exponents = totals + queries * (4 * LANES + width)
    for query in range(queries):
        member = head * group + query % group
        token = int32_at(chosen, query // group)
        vectors.finish(
            state + 4 * query * head_dim,
            head_dim // (2 * LANES),
            totals + 4 * LANES * query,
            exponents + 4 * query,
            float32_at(argument(frame, 7), member),
            result(frame, 0) + width * (token * kv_heads * group + member),
        )
