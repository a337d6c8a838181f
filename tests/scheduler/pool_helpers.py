"""What the tests of the page pool share."""

from jaxserve.kv_cache.content_keys import ContentKeys

KEYS = ContentKeys()


def taken(pool, count):
    """`count` pages that the pool must be able to hand out."""
    pages = pool.allocate(count)
    assert pages is not None
    return pages


def keys_of(pool, tokens, salt):
    """The content keys of the full pages of `tokens`, one after the other."""
    key = KEYS.root("", salt)
    for end in range(pool.page_size, len(tokens) + 1, pool.page_size):
        key = KEYS.link(key, tokens[end - pool.page_size : end])
        yield key


def commit(pool, pages, tokens, salt="s", start=0):
    """Commits the full pages of a table from `start` on; returns how many of its pages are then committed."""
    keys = list(keys_of(pool, tokens, salt))
    pool.commit(pages[start : len(keys)], keys[start:], start)
    return len(keys)


def match(pool, tokens, salt="s"):
    """Takes a reference to each page of the longest run of full pages that is committed."""
    pages = pool.find(keys_of(pool, tokens, salt))
    pool.share(pages)
    return pages


def cached(pool, tokens, salt="s"):
    """The pages of a sequence that was computed, committed and ended."""
    pages = taken(pool, len(tokens) // pool.page_size)
    commit(pool, pages, tokens, salt)
    pool.release(pages)
    return pages


def counts(pool):
    return pool.num_free, pool.num_used, pool.num_cached
