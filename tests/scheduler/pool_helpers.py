"""What the tests of the page pool share."""


def taken(pool, count):
    """`count` pages that the pool must be able to hand out."""
    pages = pool.allocate(count)
    assert pages is not None
    return pages


def cached(pool, tokens, salt="s"):
    """The pages of a sequence that was computed, committed and ended."""
    pages = taken(pool, len(tokens) // pool.page_size)
    pool.commit(pages, tokens, salt)
    pool.release(pages)
    return pages


def counts(pool):
    return pool.num_free, pool.num_used, pool.num_cached
