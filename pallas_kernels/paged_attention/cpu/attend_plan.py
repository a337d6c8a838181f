"""Cuts a step's attention into work items, and lets rows that share pages read them together.

A row that computes one token reads every position that its token sees. Where rows share a prefix, they read the same
pages: a tile of several such rows takes each shared block for all of them while it is in the cache, then every row
goes on alone. The plan depends on page tables and lengths, which are data: no program exists for it. It is the same
for all layers with the same window, so that XLA computes it once a step.
"""

# numba reads these functions itself; pyright knows neither its types nor its intrinsics.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from jaxserve.pallas_kernels.cpu import ffi
from jaxserve.pallas_kernels.paged_attention.cpu.pointers import argument, int32_at, result, set_int32
from jaxserve.pallas_kernels.paged_attention.cpu.vectors import BLOCK, compiled

# What argument 0 of a call holds, int32. TILE: tokens of a tile of one row; TOGETHER: rows of a tile of several, at
# most, 1 for none; MEMBERS: where a plan lists the rows of such tiles.
(TOKENS, ROWS, KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE, MAX_PAGES, NUM_PAGES, WINDOW, TILE, PARTS, TOGETHER, MEMBERS) = (
    range(13)
)

# Words of a plan, int32: the number of items, then the items. From word MEMBERS on the rows of tiles of several, tile
# after tile, and then for each of them the block up to which it has the pages of the one before it.
NUM_ITEMS, FIRST_ITEM = 0, 1

# Words of an item. Several rows: ITEM_ROWS members from member ITEM_ROW on, of which all see whole what lies from block
# ITEM_BEGIN to the blocks up to which they share pages. One row: ITEM_ROWS is 1, and ITEM_TOKENS tokens of row ITEM_ROW
# from token ITEM_TOKEN on. Padding tokens: ITEM_ROWS is 0.
(ITEM_ROW, ITEM_ROWS, ITEM_TOKEN, ITEM_TOKENS, ITEM_HEAD, ITEM_HEADS, ITEM_BEGIN, ITEM_WORDS) = range(8)

# What a block of positions costs a tile for one head, measured: FETCH_COST to bring its keys and values near, and
# QUERY_COST for each query.
FETCH_COST, QUERY_COST = 4, 1


def members_place(sizes: dict[int, int]) -> int:
    """The word of a plan that is called MEMBERS, past the most items there can be; two words a row follow."""
    tiles = sizes[TOKENS] // sizes[TILE] + sizes[ROWS]
    return FIRST_ITEM + ITEM_WORDS * (tiles * sizes[KV_HEADS] + 1)


@compiled
def num_plans(frame):
    """A plan is made in one piece."""
    return 1


@compiled
def plan(frame, item):
    """Makes the plan of a call: tiles of several rows first, which take longest, then each row's tiles from its last,
    and the padding tokens."""
    sizes, starts, out = argument(frame, 0), argument(frame, 3), result(frame, 0)
    rows, tile, heads = int32_at(sizes, ROWS), int32_at(sizes, TILE), int32_at(sizes, KV_HEADS)
    placed = ffi.allocate(4 * rows)
    for row in range(rows):
        set_int32(placed, row, 0)
    items = 0
    if int32_at(sizes, TOGETHER) > 1:
        items = _plan_groups(frame, sizes, out, placed)
    parts = int32_at(sizes, PARTS)
    for back in range(rows):
        row = rows - 1 - back
        count = int32_at(starts, row + 1) - int32_at(starts, row)
        if count > 0 and int32_at(placed, row) == 0:
            first = (count - 1) // tile * tile
            while first >= 0:
                token, tokens = int32_at(starts, row) + first, min(tile, count - first)
                items = _add_items(out, items, row, 1, token, tokens, 0, heads, parts)
                first -= tile
    items = _add_items(out, items, 0, 0, int32_at(starts, rows), 0, 0, heads, 1)
    set_int32(out, NUM_ITEMS, items)
    ffi.release(placed)


@compiled
def _add_items(out, items, row, rows, token, tokens, begin, heads, parts):
    """Adds an item for each part of the heads; returns how many items there are."""
    for part in range(parts):
        item = out + 4 * (FIRST_ITEM + ITEM_WORDS * items)
        set_int32(item, ITEM_ROW, row)
        set_int32(item, ITEM_ROWS, rows)
        set_int32(item, ITEM_TOKEN, token)
        set_int32(item, ITEM_TOKENS, tokens)
        set_int32(item, ITEM_HEAD, part * (heads // parts))
        set_int32(item, ITEM_HEADS, heads // parts)
        set_int32(item, ITEM_BEGIN, begin)
        items += 1
    return items


@compiled
def first_whole_block(length, window):
    """The first block of which the last of `length` positions sees everything up to itself."""
    return (max(0, length - window) + BLOCK - 1) // BLOCK


@compiled
def _shared_until(frame, sizes, one, other, begin, end):
    """The block up to which two rows have the same pages, from block `begin` on and up to block `end` at most."""
    page_size, width = int32_at(sizes, PAGE_SIZE), int32_at(sizes, MAX_PAGES)
    table = argument(frame, 1)
    page = begin * BLOCK // page_size
    while page * page_size < end * BLOCK and int32_at(table, one * width + page) == int32_at(
        table, other * width + page
    ):
        page += 1
    return max(begin, min(end, page * page_size // BLOCK))


@compiled
def _shared_end(frame, one, other):
    """The block up to which two rows can share pages: past it, one of them sees a part of a block only."""
    lengths = argument(frame, 2)
    return min(int32_at(lengths, one), int32_at(lengths, other)) // BLOCK


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


_rows_together = compiled(rows_together)


@compiled
def _plan_groups(frame, sizes, out, placed):
    """Finds the rows that share pages and adds the items of their tiles; returns how many items there are."""
    lengths, starts, members = argument(frame, 2), argument(frame, 3), out + 4 * int32_at(sizes, MEMBERS)
    rows, window = int32_at(sizes, ROWS), int32_at(sizes, WINDOW)
    items, done = 0, 0
    for row in range(rows):
        if int32_at(starts, row + 1) - int32_at(starts, row) != 1 or int32_at(placed, row) != 0:
            continue
        set_int32(members, done, row)
        count, own = 1, first_whole_block(int32_at(lengths, row), window)
        begin = own
        for other in range(row + 1, rows):
            if int32_at(starts, other + 1) - int32_at(starts, other) != 1 or int32_at(placed, other) != 0:
                continue
            block = max(own, first_whole_block(int32_at(lengths, other), window))
            end = min(block + 1, _shared_end(frame, row, other))
            if block < end and _shared_until(frame, sizes, row, other, block, end) == end:
                set_int32(members, done + count, other)
                begin = max(begin, block)
                count += 1
        if count > 1:
            _sort_group(frame, sizes, out, done, count, begin)
            items, done = _cut_group(frame, sizes, out, placed, items, done, count, begin)
    return items


@compiled
def _sort_group(frame, sizes, out, first, count, begin):
    """Sorts `count` members from member `first` on by their pages from block `begin` on, so that rows which share more
    are neighbors, and writes up to which block each has the pages of the one before it."""
    members, common = _member_lists(sizes, out)
    for place in range(1, count):
        row, at = int32_at(members, first + place), place
        while at > 0 and _comes_before(frame, sizes, row, int32_at(members, first + at - 1), begin):
            set_int32(members, first + at, int32_at(members, first + at - 1))
            at -= 1
        set_int32(members, first + at, row)
    for place in range(1, count):
        one, other = int32_at(members, first + place - 1), int32_at(members, first + place)
        shared = _shared_until(frame, sizes, one, other, begin, _shared_end(frame, one, other))
        set_int32(common, first + place, shared)


@compiled
def _member_lists(sizes, out):
    """Addresses of the rows of tiles, and of the blocks up to which each shares pages with the one before it."""
    members = out + 4 * int32_at(sizes, MEMBERS)
    return members, members + 4 * int32_at(sizes, ROWS)


@compiled
def _comes_before(frame, sizes, one, other, begin):
    """Whether a row's pages from block `begin` on are less than another's in lexicographic order."""
    table, page_size, width = argument(frame, 1), int32_at(sizes, PAGE_SIZE), int32_at(sizes, MAX_PAGES)
    end = _shared_end(frame, one, other)
    page = begin * BLOCK // page_size
    while page * page_size < end * BLOCK:
        mine, its = int32_at(table, one * width + page), int32_at(table, other * width + page)
        if mine != its:
            return mine < its
        page += 1
    return int32_at(argument(frame, 2), one) < int32_at(argument(frame, 2), other)


@compiled
def _cut_group(frame, sizes, out, placed, items, first, count, begin):
    """Cuts a sorted group into tiles where that is cheaper than every row by itself.

    Returns how many items there are, and how many members: rows that stay alone leave the list.
    """
    members, common = _member_lists(sizes, out)
    heads, kept, place = int32_at(sizes, KV_HEADS), first, first
    threads = ffi.num_threads(frame)
    while place < first + count:
        run, shared, blocks = 1, 0, int32_at(argument(frame, 2), int32_at(members, place)) // BLOCK - begin
        while place + run < first + count and int32_at(common, place + run) > begin:
            shared += int32_at(common, place + run) - begin
            blocks += int32_at(argument(frame, 2), int32_at(members, place + run)) // BLOCK - begin
            run += 1
        tile = 1
        if run > 1:
            shared //= run - 1
            most = min(run, int32_at(sizes, TOGETHER))
            tile = _rows_together(run, shared, blocks // run - shared, int32_at(sizes, GROUP), heads, threads, most)
        if tile > 1:
            tiles, done = (run + tile - 1) // tile, 0
            for number in range(tiles):
                rows = run * (number + 1) // tiles - done
                for one in range(done, done + rows):
                    row, until = int32_at(members, place + one), int32_at(common, place + one)
                    set_int32(members, kept + one, row)
                    set_int32(common, kept + one, until)
                    set_int32(placed, row, 1)
                items = _add_items(out, items, kept + done, rows, 0, 0, begin, heads, heads)
                done += rows
            kept += run
        place += run
    return items, kept
