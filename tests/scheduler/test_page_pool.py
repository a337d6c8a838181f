"""The page pool, case by case. test_page_pool_model.py beside this file compares it with a naive model."""

import dataclasses

import pytest

from jaxserve.kv_cache.page_pool import PageCopy, PagePool, PageState, greatest_concurrency
from tests.scheduler.pool_helpers import cached, commit, counts, match, taken

ACTIVE, CACHED, FREE, HOST = PageState.ACTIVE, PageState.CACHED, PageState.FREE, PageState.HOST


# ---------------------------------------------------------------------------------------------------- allocate, release


def test_null_page_is_never_handed_out():
    pool = PagePool(num_pages=5, page_size=4)
    assert pool.num_usable == 4
    assert sorted(taken(pool, 4)) == [1, 2, 3, 4]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_allocate_is_all_or_nothing():
    pool = PagePool(num_pages=8, page_size=2)
    held = taken(pool, 3)
    kept = cached(pool, [1, 2, 3, 4])
    before = counts(pool)
    assert before == (2, 3, 2)
    assert pool.num_available == 4
    assert pool.allocate(5) is None
    assert counts(pool) == before
    pool.check_integrity([held])
    again = match(pool, [1, 2, 3, 4], "s")
    assert again == kept, "a refused allocation must not evict"


def test_pages_return_when_idle():
    pool = PagePool(num_pages=8, page_size=2)
    first, second = taken(pool, 3), taken(pool, 2)
    pool.check_integrity([first, second])
    pool.release(first)
    pool.release(second)
    assert counts(pool) == (7, 0, 0)
    pool.check_integrity([])


def test_a_shared_page_stays_until_its_last_release():
    pool = PagePool(num_pages=4, page_size=2)
    pages = taken(pool, 2)
    pool.share(pages)
    assert [pool.references(page) for page in pages] == [2, 2]
    pool.release(pages)
    assert [pool.state(page) for page in pages] == [ACTIVE, ACTIVE]
    pool.check_integrity([pages])
    pool.release(pages)
    assert [pool.state(page) for page in pages] == [FREE, FREE]


# -------------------------------------------------------------------------------------------------------- copy and move


def test_copy_gives_a_fork_its_own_page():
    pool = PagePool(num_pages=5, page_size=2)
    parent = taken(pool, 2)
    commit(pool, parent, [1, 2, 3], "s")
    pool.share(parent)
    fork = list(parent)
    assert not pool.writable(fork[1])
    copy = pool.copy(fork[1])
    assert copy == PageCopy(parent[1], ACTIVE, 3, ACTIVE)
    fork[1] = 3
    assert pool.writable(parent[1])
    assert pool.writable(fork[1])
    pool.check_integrity([parent, fork])
    with pytest.raises(ValueError, match="page 3 is writable by its one owner"):
        pool.copy(3)


def test_copy_of_a_committed_page_leaves_it_cached():
    pool = PagePool(num_pages=3, page_size=1)
    page = taken(pool, 1)[0]
    commit(pool, [page], [7], "s")
    copy = pool.copy(page)
    assert copy is not None
    assert pool.state(page) is CACHED
    assert pool.writable(copy.destination)
    pool.check_integrity([[copy.destination]])


def test_copy_without_a_page_changes_nothing():
    pool = PagePool(num_pages=3, page_size=1)
    pages = taken(pool, 2)
    pool.share(pages)
    assert pool.copy(pages[0]) is None
    pool.check_integrity([pages, pages])


def test_move_out_and_in_keeps_order_and_content():
    pool = PagePool(num_pages=6, page_size=2, num_host_pages=4)
    table = taken(pool, 3)
    commit(pool, table, [1, 2, 3, 4, 5], "s")
    out = pool.move(table, PageState.HOST)
    assert out is not None
    assert [(copy.source, copy.source_tier, copy.destination_tier) for copy in out] == [
        (p, ACTIVE, HOST) for p in table
    ]
    host = [copy.destination for copy in out]
    assert (pool.num_host_free, pool.num_host_used) == (1, 3)
    assert [pool.state(page) for page in table] == [CACHED, CACHED, FREE]
    pool.check_integrity([], [host])

    pool.release(taken(pool, 5))  # what the device held of the sequence is lost
    assert match(pool, [1, 2], "s") == []
    back = pool.move(host, PageState.ACTIVE)
    assert back is not None
    assert [(copy.source, copy.source_tier, copy.destination_tier) for copy in back] == [
        (p, HOST, ACTIVE) for p in host
    ]
    table = [copy.destination for copy in back]
    assert (pool.num_host_free, pool.num_host_used) == (4, 0)
    assert [pool.writable(page) for page in table] == [False, False, True]
    assert commit(pool, table, [1, 2, 3, 4, 5, 6], "s", start=2) == 3, "the chain goes on behind pages that came back"
    assert match(pool, [1, 2, 3, 4, 5, 6], "s") == table


def test_pages_that_come_back_do_not_displace_what_the_device_kept():
    pool = PagePool(num_pages=5, page_size=2, num_host_pages=2)
    kept = taken(pool, 2)
    commit(pool, kept, [1, 2, 3, 4], "s")
    out = pool.move(kept, PageState.HOST)
    assert out is not None
    back = pool.move([copy.destination for copy in out], PageState.ACTIVE)
    assert back is not None
    table = [copy.destination for copy in back]
    pool.check_integrity([table])
    assert match(pool, [1, 2, 3, 4], "s") == kept


def test_content_keys_move_along_whoever_committed_the_page():
    """Keys belong to pages: also behind a private copy, and where a fork committed the page for both."""
    pool = PagePool(num_pages=6, page_size=2, num_host_pages=2)
    table = taken(pool, 2)
    pool.share(table)
    fork = list(table)
    commit(pool, fork, [1, 2, 3, 4], "s")
    private = pool.copy(table[0])
    assert private is not None
    table[0] = private.destination

    out = pool.move(table, PageState.HOST)
    assert out is not None
    pool.release(fork)
    pool.release(taken(pool, 5))  # nothing stays cached on the device
    back = pool.move([copy.destination for copy in out], PageState.ACTIVE)
    assert back is not None
    table = [copy.destination for copy in back]
    assert [pool.writable(page) for page in table] == [True, False]
    assert commit(pool, table, [1, 2, 3, 4], "s") == 2, "the content is what the key says"
    assert match(pool, [1, 2, 3, 4], "s") == table


def test_move_is_all_or_nothing():
    pool = PagePool(num_pages=5, page_size=2, num_host_pages=3)
    table = taken(pool, 4)
    assert pool.move(table, PageState.HOST) is None
    assert (pool.num_used, pool.num_host_used) == (4, 0)
    out = pool.move(table[:3], PageState.HOST)
    assert out is not None
    pool.check_integrity([table[3:]], [[copy.destination for copy in out]])
    other = taken(pool, 1)
    assert pool.move([copy.destination for copy in out], PageState.ACTIVE) is None
    pool.check_integrity([table[3:], other], [[copy.destination for copy in out]])
    assert pool.move([], PageState.HOST) == ()
    assert PagePool(num_pages=2, page_size=1).move([], PageState.ACTIVE) == ()


def test_swapping_out_leaves_shared_pages_to_their_other_owner():
    pool = PagePool(num_pages=4, page_size=2, num_host_pages=2)
    table = taken(pool, 2)
    pool.share(table)
    out = pool.move(table, PageState.HOST)
    assert out is not None
    pool.check_integrity([table], [[copy.destination for copy in out]])
    assert pool.writable(table[0])


def test_a_sequence_may_end_while_swapped_out():
    pool = PagePool(num_pages=3, page_size=1, num_host_pages=2)
    out = pool.move(taken(pool, 2), PageState.HOST)
    assert out is not None
    pool.release_host([copy.destination for copy in out])
    pool.check_integrity([], [])
    assert pool.num_host_free == 2


# --------------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 16), "num_pages is 1; it must be at least 2"),
        ((2, 0), "page_size is 0; it must be at least 1"),
        ((2, 16, -1), "num_host_pages is -1; it must be at least 0"),
    ],
)
def test_sizes_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        PagePool(*arguments)


MISUSE = {
    "allocate a negative count": (lambda pool, held: pool.allocate(-1), "count is -1"),
    "release a free page": (lambda pool, held: pool.release([held[0], 5]), "page 5 is free; it must be active"),
    "release the null page": (lambda pool, held: pool.release([held[0], 0]), "page 0 does not exist"),
    "release a negative page": (lambda pool, held: pool.release([held[0], -1]), "page -1 does not exist"),
    "release beyond the end": (lambda pool, held: pool.release([held[0], 6]), "numbered from 1 to 5"),
    "release a page twice": (lambda pool, held: pool.release([held[0], held[0]]), "name a page twice"),
    "release a cached page": (lambda pool, held: pool.release([held[0], 4]), "page 4 is cached; it must be active"),
    "share a free page": (lambda pool, held: pool.share([held[0], 5]), "page 5 is free"),
    "share a page twice": (lambda pool, held: pool.share([held[0], held[0]]), "name a page twice"),
    "ask whether a free page is writable": (lambda pool, held: pool.writable(5), "page 5 is free"),
    "ask for the state of no page": (lambda pool, held: pool.state(6), "page 6 does not exist"),
    "copy a free page": (lambda pool, held: pool.copy(5), "page 5 is free"),
    "move a free page": (lambda pool, held: pool.move([held[0], 5], HOST), "page 5 is free"),
    "move in an unused page": (lambda pool, held: pool.move([0], ACTIVE), "host page 0 is not in use"),
    "move to no tier": (lambda pool, held: pool.move(held, FREE), "pages move to"),
    "release an unused host page": (lambda pool, held: pool.release_host([1]), "host page 1 is not in use; 0 of 2 are"),
    "commit with too few keys": (lambda pool, held: pool.commit(held, [b"k"] * 2), "pages has 3 pages and keys 2"),
    "commit a page twice": (lambda pool, held: pool.commit([held[0]] * 2, [b"k"] * 2), "name a page twice"),
    "commit a page that is not held": (lambda pool, held: commit(pool, [5], [0, 0], "s"), "page 5 is free"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_refused_before_anything_changes(name):
    call, message = MISUSE[name]
    pool = PagePool(num_pages=6, page_size=2, num_host_pages=2)
    held = taken(pool, 3)
    assert cached(pool, [1, 2]) == [4]
    with pytest.raises(ValueError, match=message):
        call(pool, held)
    pool.check_integrity([held])
    assert counts(pool) == (1, 3, 1)


def test_committed_pages_cannot_get_other_content():
    pool = PagePool(num_pages=4, page_size=2)
    pages = taken(pool, 2)
    commit(pool, pages, [1, 2], "s")
    for tokens, salt in (([1, 9, 3, 4], "s"), ([1, 2, 3, 4], "t")):
        with pytest.raises(ValueError, match="page 1 is committed with other content"):
            commit(pool, pages, tokens, salt)
    assert pool.writable(pages[1]), "a refused commit commits nothing"


def test_check_integrity_names_the_page_and_both_figures():
    pool = PagePool(num_pages=5, page_size=2, num_host_pages=1)
    first, second = taken(pool, 2), taken(pool, 1)
    for tables, hosts, message in (
        ([first], [], "page 3 is in 0 tables, but has 1 references"),
        ([first, second, second], [], "page 3 is in 2 tables, but has 1 references"),
        ([[*first, 1], second], [], r"table \[1, 2, 1\] holds a page twice"),
        ([first, second, [9]], [], r"pages \[9\] are in tables, but the pool ends at 4"),
        ([first, second, [0]], [], "page 0 is the null page, but 1 tables hold it"),
        ([first, second], [[0]], "host page 0 is in 1 tables, but has 0 owners"),
    ):
        with pytest.raises(AssertionError, match=message):
            pool.check_integrity(tables, hosts)
    pool._pages.free.append(3)
    with pytest.raises(AssertionError, match="page 3 is 2 times active, free or cached, not 1"):
        pool.check_integrity([first, second])
    pool._pages.free.remove(3)
    pool._pages.free.remove(4)
    with pytest.raises(AssertionError, match="page 4 is 0 times active, free or cached, not 1"):
        pool.check_integrity([first, second])


def test_copies_are_frozen():
    copy = PageCopy(1, ACTIVE, 2, HOST)
    with pytest.raises(dataclasses.FrozenInstanceError):
        copy.source = 3  # type: ignore[misc]


def test_greatest_concurrency_counts_whole_pages():
    assert greatest_concurrency(num_usable=32, pages=8, max_num_seqs=8) == 4.0
    assert greatest_concurrency(num_usable=32, pages=9, max_num_seqs=8) == 32 / 9
    assert greatest_concurrency(num_usable=4, pages=8, max_num_seqs=8) == 0.5
    assert greatest_concurrency(num_usable=32, pages=1, max_num_seqs=8) == 8
