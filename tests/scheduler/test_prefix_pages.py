"""The page pool as a prefix cache: what it finds, for whom, and what is evicted first."""

from jaxserve.kv_cache.content_keys import KEY_BYTES, ContentKeys
from jaxserve.kv_cache.page_pool import PagePool, PageState
from tests.scheduler.pool_helpers import cached, commit, counts, match, taken

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
        found = match(pool, tokens, "s")
        assert found == pages[:count], tokens
        assert counts(pool) == (5, count, 3 - count)
        pool.check_integrity([found])
        pool.release(found)


def test_a_partial_page_is_not_committed():
    pool = PagePool(num_pages=4, page_size=4)
    pages = taken(pool, 2)
    assert commit(pool, pages, [1, 2, 3, 4, 5, 6], "s") == 1
    pool.release(pages)
    assert [pool.state(page) for page in pages] == [CACHED, FREE]


def test_fault_27_salt_isolates_tenants():
    pool = PagePool(num_pages=8, page_size=2)
    pages = cached(pool, [1, 2, 3, 4], salt="tenant a")
    for salt in ("tenant b", "", "tenant a ", "tenant A"):
        assert match(pool, [1, 2, 3, 4], salt) == []
    assert match(pool, [1, 2, 3, 4], "tenant a") == pages


def test_the_same_tokens_elsewhere_do_not_match():
    pool = PagePool(num_pages=9, page_size=2)
    cached(pool, [1, 2, 3, 4])
    assert match(pool, [3, 4], "s") == [], "the second page's tokens at the start"
    assert match(pool, [5, 6, 3, 4], "s") == [], "the second page's tokens behind another first page"
    assert len(match(pool, [1, 2, 1, 2], "s")) == 1, "the first page's tokens at the second position"


def test_keys_are_chained_salted_and_secret():
    keys = ContentKeys()
    root = keys.root("t", "s")
    first = keys.link(root, [1, 2])
    assert len(first) == KEY_BYTES
    assert first == keys.link(root, (1, 2))
    others = [
        keys.link(keys.root("t", "r"), [1, 2]),
        keys.link(keys.root("u", "s"), [1, 2]),
        keys.link(keys.root("ts", ""), [1, 2]),
        keys.link(first, [1, 2]),
        keys.link(root, [2, 1]),
        keys.link(root, [258]),
    ]
    assert len({root, first, *others}) == 8
    other = ContentKeys()
    assert other.link(other.root("t", "s"), [1, 2]) != first, "another process has other keys"


def test_processes_with_one_secret_have_the_same_keys_for_the_same_model():
    one, same, other = (ContentKeys(b"secret", model) for model in ("m", "m", "n"))
    assert one.root("t", "s") == same.root("t", "s") != other.root("t", "s")
    assert one.link(one.root("t", "s"), [5]) == same.link(same.root("t", "s"), [5])
    assert ContentKeys(b"Secret", "m").root("t", "s") != one.root("t", "s")


def test_no_name_equals_the_key_of_a_page():
    keys = ContentKeys()
    text = bytes(KEY_BYTES).decode() + "\x01" + "\0" * 3
    assert keys.root("", text) != keys.link(bytes(KEY_BYTES), [1])
    assert keys.root("\udcff", "") != keys.root("", "")  # a lone surrogate is a name like any other


def test_what_is_forgotten_is_not_found_and_its_pages_are_free():
    pool = PagePool(num_pages=9, page_size=1, num_host_pages=2)
    cached(pool, [1, 2])
    held, swapped = taken(pool, 2), taken(pool, 1)
    commit(pool, held, [3, 4])
    commit(pool, swapped, [5])
    out = pool.move(swapped, PageState.HOST)
    assert out is not None
    copy = out[0]
    assert counts(pool) == (3, 2, 3)
    assert pool.forget() == 3
    assert counts(pool) == (6, 2, 0)
    pool.check_integrity([held], [[copy.destination]])
    for tokens in ([1], [3, 4], [5]):
        assert match(pool, tokens) == []
    pool.release(held)
    assert counts(pool) == (8, 0, 0)
    back = pool.move([copy.destination], PageState.ACTIVE)
    assert back is not None
    assert match(pool, [5]) == [back[0].destination], "host memory has kept its content, and its key"


def test_cached_pages_are_reclaimed_least_recently_used_first():
    pool = PagePool(num_pages=7, page_size=1)
    a, b, c = cached(pool, [1, 2]), cached(pool, [3, 4]), cached(pool, [5, 6])
    pool.release(match(pool, [1, 2], "s"))  # a is used again: now b is the oldest
    # Within a sequence the last page goes first: without its first page no match would reach the others.
    assert [taken(pool, 1)[0] for _ in range(6)] == [b[1], b[0], c[1], c[0], a[1], a[0]]
    assert pool.allocate(1) is None


def test_free_pages_go_before_cached_ones():
    pool = PagePool(num_pages=6, page_size=1)
    kept = cached(pool, [1, 2])
    assert set(taken(pool, 3)).isdisjoint(kept)
    assert counts(pool) == (0, 3, 2)
    assert taken(pool, 1) == [kept[1]]
    assert match(pool, [1, 2], "s") == kept[:1]


def test_a_reclaimed_page_has_lost_its_content():
    pool = PagePool(num_pages=3, page_size=1)
    cached(pool, [1, 2])
    pages = taken(pool, 2)
    assert match(pool, [1, 2], "s") == []
    assert all(pool.writable(page) for page in pages)
    pool.check_integrity([pages])


def test_match_shares_pages_that_are_still_in_use():
    pool = PagePool(num_pages=6, page_size=2)
    table = taken(pool, 2)
    commit(pool, table, [1, 2, 3], "s")
    found = match(pool, [1, 2, 9], "s")
    assert found == table[:1]
    pool.check_integrity([table, found])
    assert not pool.writable(table[0])
    assert pool.writable(table[1])


def test_duplicate_content_keeps_the_first_page_as_the_one_found():
    pool = PagePool(num_pages=8, page_size=1)
    first, second = taken(pool, 2), taken(pool, 3)
    commit(pool, first, [1, 2], "s")
    commit(pool, second, [1, 2, 3], "s")
    assert match(pool, [1, 2, 3], "s") == [*first, second[2]]
    pool.release([*first, second[2]])
    pool.release(second)
    assert [pool.state(page) for page in second] == [FREE, FREE, CACHED]
    pool.check_integrity([first])


def test_a_duplicate_takes_over_when_the_first_page_is_gone():
    pool = PagePool(num_pages=3, page_size=1)
    first, second = taken(pool, 1), taken(pool, 1)
    commit(pool, first, [1], "s")
    commit(pool, second, [1], "s")
    pool.release(first)
    assert taken(pool, 1) == first  # reclaimed
    pool.release(second)
    assert pool.state(second[0]) is CACHED
    pool.check_integrity([first])
    assert match(pool, [1], "s") == second


def test_commit_is_incremental_and_repeatable():
    pool = PagePool(num_pages=6, page_size=2)
    pages = taken(pool, 3)
    done = commit(pool, pages, [1, 2, 3], "s")
    assert done == 1
    done = commit(pool, pages, [1, 2, 3, 4, 5, 6], "s", start=done)
    assert done == 3
    assert commit(pool, pages, [1, 2, 3, 4, 5, 6], "s") == 3
    assert commit(pool, pages, [1, 2, 3, 4, 5, 6], "s", start=3) == 3
    assert match(pool, [1, 2, 3, 4, 5, 6], "s") == pages
