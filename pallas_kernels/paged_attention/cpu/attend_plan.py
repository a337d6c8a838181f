"""Cuts a step's attention into work items, and lets rows that share pages read them together.

A row that computes one token reads every position that its token sees. Where rows share a prefix, they read the same
pages: a tile of several such rows takes each shared block for all of them while it is in the cache, then every row
goes on alone. The plan depends on page tables and lengths, which are data: no program exists for it. It is the same
for all layers with the same window, so that XLA computes it once a step.
"""

# These functions are compiled; pyright does not know the types of their values.
# pyright: basic

from __future__ import annotations

import numpy as np

from jaxserve.pallas_kernels.cpu.native_functions import native
from jaxserve.pallas_kernels.paged_attention.cpu.pointers import (
    allocate,
    argument,
    atomic_add,
    int32_at,
    num_threads,
    release,
    result,
    set_int32,
)
from jaxserve.pallas_kernels.paged_attention.cpu.vectors import BLOCK

# What argument 0 of a call holds, int32. TILE: tokens of a tile of one row; TOGETHER: rows of a tile of several, at
# most, 1 for none; PAGE_BITS: the base-2 logarithm of PAGE_SIZE; MEMBERS: where a plan lists the rows of such tiles.
(
    TOKENS,
    ROWS,
    KV_HEADS,
    GROUP,
    HEAD_DIM,
    PAGE_SIZE,
    MAX_PAGES,
    NUM_PAGES,
    WINDOW,
    TILE,
    PARTS,
    TOGETHER,
    PAGE_BITS,
    MEMBERS,
) = range(14)

# Words of a plan, int32: the number of items, then the items. From word MEMBERS on the rows of tiles of several, tile
# after tile, and then for each of them the block up to which it has the pages of the one before it.
NUM_ITEMS, FIRST_ITEM = 0, 1

# Words of an item. Several rows: ITEM_ROWS members from member ITEM_ROW on, of which all see whole what lies from block
# ITEM_BEGIN to the blocks up to which they share pages. One row: ITEM_ROWS is 1, and ITEM_TOKENS tokens of row ITEM_ROW
# from token ITEM_TOKEN on. Padding tokens: ITEM_ROWS is 0.
(ITEM_ROW, ITEM_ROWS, ITEM_TOKEN, ITEM_TOKENS, ITEM_HEAD, ITEM_HEADS, ITEM_BEGIN, ITEM_WORDS) = range(8)

# What a block of positions costs a tile for one head: FETCH_COST to bring its keys and values near once other rows have
# read them, and QUERY_COST for each query. Measured by `benchmarks.cascade` on an AMD EPYC: 30 to 80 and 110 ns.
FETCH_COST, QUERY_COST = 1, 2

# What is known of a row while groups are sought.
_UNSEEN, _ALONE, _IN_TILE = range(3)

# A block past any row's end.
_NO_END = 2**31


# What the plans of this process have decided, int64: plans with tiles of several rows; rows in such tiles, and
# positions that they did not read again; rows that share pages and were better off alone, and positions that they read
# again.
NUM_COUNTS = 5
(_SHARING_PLANS, _ROWS_TOGETHER, _POSITIONS_SAVED, _ROWS_APART, _POSITIONS_REPEATED) = range(NUM_COUNTS)
_COUNTS = np.zeros(NUM_COUNTS, np.int64)
_COUNTS_ADDRESS = int(_COUNTS.ctypes.data)  # a constant of the machine code, which no process keeps for another


def shared_read_counts() -> dict[str, int]:
    """Returns how often plans of this process chose to read shared pages once, and how often not.

    A step makes a plan for each window that layers have, so rows and positions count once for each of them.

    Returns:
        steps: plans with rows that read together. rows_together: these rows. tokens_together: positions that they did
        not read again. rows_apart, tokens_apart: rows that share pages where reading them together was predicted to
        take no less time, and positions that they read again.
    """
    names = ("steps", "rows_together", "tokens_together", "rows_apart", "tokens_apart")
    return dict(zip(names, _COUNTS.tolist(), strict=True))


def members_place(sizes: dict[int, int]) -> int:
    """The word of a plan that is called MEMBERS, past the most items there can be; two words a row follow."""
    tiles = sizes[TOKENS] // sizes[TILE] + sizes[ROWS]
    return FIRST_ITEM + ITEM_WORDS * (tiles * sizes[KV_HEADS] + 1)


@native
def plan(frame):
    """Makes the plan of a call: tiles of several rows first, which take longest, then each row's tiles from its last,
    and the padding tokens."""
    sizes, starts, out = argument(frame, 0), argument(frame, 3), result(frame, 0)
    rows, tile, parts = int32_at(sizes, ROWS), int32_at(sizes, TILE), int32_at(sizes, PARTS)
    placed = allocate(12 * rows)
    for row in range(rows):
        set_int32(placed, row, _UNSEEN)
    set_int32(out, NUM_ITEMS, 0)
    if int32_at(sizes, TOGETHER) > 1:
        _plan_groups(frame, sizes, out, placed)
    for back in range(rows):
        row = rows - 1 - back
        first, stop = int32_at(starts, row), int32_at(starts, row + 1)
        if int32_at(placed, row) != _IN_TILE:
            token = first + (stop - first - 1) // tile * tile
            while token >= first and token < stop:
                _add_items(sizes, out, parts, row, 1, token, min(tile, stop - token), 0)
                token -= tile
    _add_items(sizes, out, 1, 0, 0, int32_at(starts, rows), 0, 0)
    release(placed)


@native
def _add_items(sizes, out, parts, row, rows, token, tokens, begin):
    """Adds an item for each part of the heads."""
    heads = int32_at(sizes, KV_HEADS) // parts
    for part in range(parts):
        items = int32_at(out, NUM_ITEMS)
        item = out + 4 * (FIRST_ITEM + ITEM_WORDS * items)
        set_int32(item, ITEM_ROW, row)
        set_int32(item, ITEM_ROWS, rows)
        set_int32(item, ITEM_TOKEN, token)
        set_int32(item, ITEM_TOKENS, tokens)
        set_int32(item, ITEM_HEAD, part * heads)
        set_int32(item, ITEM_HEADS, heads)
        set_int32(item, ITEM_BEGIN, begin)
        set_int32(out, NUM_ITEMS, items + 1)


@native
def rows_together(rows: int, shared: int, own: int, group: int, heads: int, threads: int, most: int) -> int:
    """Decides by cost how many rows that share pages one tile takes; 1 where each is better off alone.

    A tile brings a shared block near once, and so saves FETCH_COST for all rows but one. But there are fewer tiles to
    divide among threads. The time of both is that of the thread with the most of equal tiles.

    Args:
        rows: rows that share pages.
        shared: blocks that they share.
        own: blocks that each reads beyond those.
        group: queries of a row for each key-value head.
        heads: key-value heads, each of which is an item of work.
        threads: threads that take items.
        most: rows of a tile, at most.

    Returns:
        Rows of the largest tile.
    """
    alone = FETCH_COST + QUERY_COST * group
    best, least = 1, (rows * heads + threads - 1) // threads * (shared + own) * alone
    for tiles in range((rows + most - 1) // most, rows // 2 + 1):
        tile = (rows + tiles - 1) // tiles
        cost = shared * (FETCH_COST + QUERY_COST * group * tile) + own * alone * tile
        cost *= (tiles * heads + threads - 1) // threads
        if cost < least:
            best, least = tile, cost
    return best


@native
def _plan_groups(frame, sizes, out, placed):
    """Finds the rows that share pages and adds the items of their tiles."""
    table, lengths, starts = argument(frame, 1), argument(frame, 2), argument(frame, 3)
    rows, width, window = int32_at(sizes, ROWS), int32_at(sizes, MAX_PAGES), int32_at(sizes, WINDOW)
    members = out + 4 * int32_at(sizes, MEMBERS)
    # The first block that each row sees whole, and the page in which it ends.
    begins, pages = placed + 4 * rows, placed + 8 * rows
    for row in range(rows):
        begin = (max(0, int32_at(lengths, row) - window) + BLOCK - 1) // BLOCK
        end = (begin + 1) * BLOCK
        if int32_at(starts, row + 1) - int32_at(starts, row) != 1 or end > int32_at(lengths, row):
            set_int32(placed, row, _ALONE)
        else:
            set_int32(begins, row, begin)
            set_int32(pages, row, int32_at(table, row * width + (end - 1) // int32_at(sizes, PAGE_SIZE)))
    done = 0
    for row in range(rows):
        if int32_at(placed, row) != _UNSEEN:
            continue
        set_int32(members, done, row)
        own, page = int32_at(begins, row), int32_at(pages, row)
        count, begin = 1, own
        for other in range(row + 1, rows):
            block = int32_at(begins, other)
            if int32_at(placed, other) != _UNSEEN or (block == own and int32_at(pages, other) != page):
                continue
            block = max(own, block)
            if _shared_until(frame, sizes, row, other, block, block + 1) > block:
                set_int32(members, done + count, other)
                set_int32(placed, other, _ALONE)
                begin = max(begin, block)
                count += 1
        if count > 1:
            _sort_group(frame, sizes, members + 4 * done, count, begin)
            done = _cut_group(frame, sizes, out, placed, done, count, begin)
    if done > 0:
        atomic_add(_COUNTS_ADDRESS + 8 * _SHARING_PLANS, 1)


@native
def _shared_until(frame, sizes, one, other, begin, end):
    """The block up to which two rows have the same pages, whole for both, from block `begin` on, at most `end`."""
    page_size, width = int32_at(sizes, PAGE_SIZE), int32_at(sizes, MAX_PAGES)
    table, lengths = argument(frame, 1), argument(frame, 2)
    end = min(end, min(int32_at(lengths, one), int32_at(lengths, other)) // BLOCK)
    page = begin * BLOCK // page_size
    while page * page_size < end * BLOCK:
        if int32_at(table, one * width + page) != int32_at(table, other * width + page):
            break
        page += 1
    return max(begin, min(end, page * page_size // BLOCK))


@native
def _sort_group(frame, sizes, members, count, begin):
    """Sorts rows by their pages from block `begin` on, so that those which share more are neighbors, and writes up to
    which block each has the pages of the one before it."""
    common = members + 4 * int32_at(sizes, ROWS)
    for place in range(1, count):
        row, at = int32_at(members, place), place
        while at > 0 and _comes_before(frame, sizes, row, int32_at(members, at - 1), begin):
            set_int32(members, at, int32_at(members, at - 1))
            at -= 1
        set_int32(members, at, row)
    for place in range(1, count):
        one, other = int32_at(members, place - 1), int32_at(members, place)
        set_int32(common, place, _shared_until(frame, sizes, one, other, begin, _NO_END))


@native
def _comes_before(frame, sizes, one, other, begin):
    """Whether a row's pages from block `begin` on are less than another's, in lexicographic order: of the blocks that
    both see whole, and then the shorter row first."""
    table, lengths = argument(frame, 1), argument(frame, 2)
    width, page_size = int32_at(sizes, MAX_PAGES), int32_at(sizes, PAGE_SIZE)
    shorter = min(int32_at(lengths, one), int32_at(lengths, other))
    block = _shared_until(frame, sizes, one, other, begin, _NO_END)
    # The page in which the first block that they do not share ends is the one that differs, if any does.
    page = ((block + 1) * BLOCK - 1) // page_size
    if (block + 1) * BLOCK > shorter:
        return int32_at(lengths, one) < int32_at(lengths, other)
    return int32_at(table, one * width + page) < int32_at(table, other * width + page)


@native
def _count_choice(common, begin, place, run, tile):
    """Counts the decision about the rows of a run, which share blocks from `begin` on."""
    tiles = (run + tile - 1) // tile
    saved, repeated, first, number = 0, 0, 0, 0
    for member in range(run):
        if member == first:  # the first row of a tile reads for itself, and so does every row alone
            number += 1
            first = run * number // tiles
            if member > 0 and tile == 1:
                repeated += int32_at(common, place + member) - begin
        else:
            saved += int32_at(common, place + member) - begin
    if tile > 1:
        atomic_add(_COUNTS_ADDRESS + 8 * _ROWS_TOGETHER, run)
        atomic_add(_COUNTS_ADDRESS + 8 * _POSITIONS_SAVED, saved * BLOCK)
    else:
        atomic_add(_COUNTS_ADDRESS + 8 * _ROWS_APART, run)
        atomic_add(_COUNTS_ADDRESS + 8 * _POSITIONS_REPEATED, repeated * BLOCK)


@native
def _cut_group(frame, sizes, out, placed, first, count, begin):
    """Cuts a sorted group into tiles where that is cheaper than every row by itself.

    Returns how many members there are: rows that stay alone leave the list.
    """
    lengths, members = argument(frame, 2), out + 4 * int32_at(sizes, MEMBERS)
    common = members + 4 * int32_at(sizes, ROWS)
    threads, stop, kept, place = num_threads(frame), first + count, first, first
    while place < stop:
        run, shared, blocks = 1, 0, int32_at(lengths, int32_at(members, place)) // BLOCK - begin
        while place + run < stop and int32_at(common, place + run) > begin:
            shared += int32_at(common, place + run) - begin
            blocks += int32_at(lengths, int32_at(members, place + run)) // BLOCK - begin
            run += 1
        shared //= max(run - 1, 1)
        most, group, heads = min(run, int32_at(sizes, TOGETHER)), int32_at(sizes, GROUP), int32_at(sizes, KV_HEADS)
        tile = rows_together(run, shared, blocks // run - shared, group, heads, threads, most)
        if run > 1:
            _count_choice(common, begin, place, run, tile)
        if tile > 1:
            tiles, done = (run + tile - 1) // tile, 0
            for number in range(tiles):
                rows = run * (number + 1) // tiles - done
                _add_items(sizes, out, heads, kept + done, rows, 0, 0, begin)
                done += rows
            for member in range(run):
                set_int32(placed, int32_at(members, place + member), _IN_TILE)
                set_int32(members, kept + member, int32_at(members, place + member))
                set_int32(common, kept + member, int32_at(common, place + member))
            kept += run
        place += run
    return kept
