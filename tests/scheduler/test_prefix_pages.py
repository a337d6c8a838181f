"""The page pool as a prefix cache: what match finds, for whom, and what is evicted first."""

from jaxserve.kv_cache.content_keys import KEY_BYTES, ContentKeys
from jaxserve.kv_cache.page_pool import PagePool, PageState
from tests.scheduler.pool_helpers import cached, counts, taken

ACTIVE, CACHED, FREE = PageState.ACTIVE, PageState.CACHED, PageState.FREE


def test_match_finds_the_longest_run_of_full_pages():
    pool = PagePool(num_pages=9, page_size=2)
    pages = cached(pool, [1, 2, 3, 4, 5, 6])
    for tokens, count in (
        ([1, 2, 3, 4, 5, 6, 7], 3),
        ([1, 2, 3, 4, 5], 2),
        ([1, 2, 9, 4, 5, 6], 1),
        ([1, 9, 3, 4], 0),
        ([1], 0),
        ([], 0),
    ):
        found = pool.match(tokens, "s")
        assert found == pages[:count], tokens
        assert counts(pool) == (5, count, 3 - count)
        pool.check_integrity([found])
        pool.release(found)


def test_a_partial_page_is_not_committed():
    pool = PagePool(num_pages=4, page_size=4)
    pages = taken(pool, 2)
    assert pool.commit(pages, [1, 2, 3, 4, 5, 6], "s") == 1
    pool.release(pages)
    assert [pool.state(page) for page in pages] == [CACHED, FREE]


def test_fault_27_salt_isolates_tenants():
    pool = PagePool(num_pages=8, page_size=2)
    pages = cached(pool, [1, 2, 3, 4], salt="tenant a")
    for salt in ("tenant b", "", "tenant a ", "tenant A"):
        assert pool.match([1, 2, 3, 4], salt) == []
    assert pool.match([1, 2, 3, 4], "tenant a") == pages


def test_the_same_tokens_elsewhere_do_not_match():
    pool = PagePool(num_pages=9, page_size=2)
    cached(pool, [1, 2, 3, 4])
    assert pool.match([3, 4], "s") == [], "the second page's tokens at the start"
    assert pool.match([5, 6, 3, 4], "s") == [], "the second page's tokens behind another first page"
    assert len(pool.match([1, 2, 1, 2], "s")) == 1, "the first page's tokens at the second position"


def test_keys_are_chained_salted_and_secret():
    keys = ContentKeys()
    root = keys.root("s")
    first = keys.link(root, [1, 2])
    assert len(first) == KEY_BYTES
    assert first == keys.link(root, (1, 2))
    others = [
        keys.link(keys.root("t"), [1, 2]),
        keys.link(first, [1, 2]),
        keys.link(root, [2, 1]),
        keys.link(root, [258]),
    ]
    assert len({root, first, *others}) == 6
    assert ContentKeys().link(ContentKeys().root("s"), [1, 2]) != first, "another process has other keys"


def test_no_salt_equals_the_key_of_a_page():
    keys = ContentKeys()
    text = bytes(KEY_BYTES).decode() + "\x01" + "\0" * 7
    assert keys.root(text) != keys.link(bytes(KEY_BYTES), [1])
    assert keys.root("\udcff") != keys.root("")  # a lone surrogate is a salt like any other


def test_cached_pages_are_reclaimed_least_recently_used_first():
    pool = PagePool(num_pages=7, page_size=1)
    a, b, c = cached(pool, [1, 2]), cached(pool, [3, 4]), cached(pool, [5, 6])
    pool.release(pool.match([1, 2], "s"))  # a is used again: now b is the oldest
    # Within a sequence the last page goes first: without its first page no match would reach the others.
    assert [taken(pool, 1)[0] for _ in range(6)] == [b[1], b[0], c[1], c[0], a[1], a[0]]
    assert pool.allocate(1) is None


def test_free_pages_go_before_cached_ones():
    pool = PagePool(num_pages=6, page_size=1)
    kept = cached(pool, [1, 2])
    assert set(taken(pool, 3)).isdisjoint(kept)
    assert counts(pool) == (0, 3, 2)
    assert taken(pool, 1) == [kept[1]]
    assert pool.match([1, 2], "s") == kept[:1]


def test_a_reclaimed_page_has_lost_its_content():
    pool = PagePool(num_pages=3, page_size=1)
    cached(pool, [1, 2])
    pages = taken(pool, 2)
    assert pool.match([1, 2], "s") == []
    assert all(pool.writable(page) for page in pages)
    pool.check_integrity([pages])


def test_match_shares_pages_that_are_still_in_use():
    pool = PagePool(num_pages=6, page_size=2)
    table = taken(pool, 2)
    pool.commit(table, [1, 2, 3], "s")
    found = pool.match([1, 2, 9], "s")
    assert found == table[:1]
    pool.check_integrity([table, found])
    assert not pool.writable(table[0])
    assert pool.writable(table[1])


def test_duplicate_content_keeps_the_first_page_as_the_one_found():
    pool = PagePool(num_pages=8, page_size=1)
    first, second = taken(pool, 2), taken(pool, 3)
    pool.commit(first, [1, 2], "s")
    pool.commit(second, [1, 2, 3], "s")
    assert pool.match([1, 2, 3], "s") == [*first, second[2]]
    pool.release([*first, second[2]])
    pool.release(second)
    assert [pool.state(page) for page in second] == [FREE, FREE, CACHED]
    pool.check_integrity([first])


def test_a_duplicate_takes_over_when_the_first_page_is_gone():
    pool = PagePool(num_pages=3, page_size=1)
    first, second = taken(pool, 1), taken(pool, 1)
    pool.commit(first, [1], "s")
    pool.commit(second, [1], "s")
    pool.release(first)
    assert taken(pool, 1) == first  # reclaimed
    pool.release(second)
    assert pool.state(second[0]) is CACHED
    pool.check_integrity([first])
    assert pool.match([1], "s") == second


def test_commit_is_incremental_and_repeatable():
    pool = PagePool(num_pages=6, page_size=2)
    pages = taken(pool, 3)
    done = pool.commit(pages, [1, 2, 3], "s")
    assert done == 1
    done = pool.commit(pages, [1, 2, 3, 4, 5, 6], "s", start=done)
    assert done == 3
    assert pool.commit(pages, [1, 2, 3, 4, 5, 6], "s") == 3
    assert pool.commit(pages, [1, 2, 3, 4, 5, 6], "s", start=3) == 3
    assert pool.match([1, 2, 3, 4, 5, 6], "s") == pages


def test_commit_hashes_new_pages_only(monkeypatch):
    pool = PagePool(num_pages=101, page_size=2)
    pages, tokens = taken(pool, 100), list(range(200))
    done = pool.commit(pages, tokens[:198], "s")
    linked = []
    link = ContentKeys.link
    monkeypatch.setattr(ContentKeys, "link", lambda self, key, page: linked.append(page) or link(self, key, page))
    pool.commit(pages, tokens, "s", start=done)
    assert linked == [[198, 199]]
    linked.clear()
    pool.commit(pages, tokens, "s", start=100)
    assert linked == []
