"""Those who follow the prefix cache: what each is told, from where on, and what becomes of one that reads slowly."""

from __future__ import annotations

import asyncio

import pytest

from jaxserve.engine.messages import CacheEvents, EngineFailed, FollowCacheEvents
from jaxserve.frontend import cache_followers
from jaxserve.frontend.cache_followers import CacheFollowers, FollowerError
from jaxserve.frontend.delta import EngineDeadError
from jaxserve.kv_cache.event_log import CacheEvent, CacheEventKind

CLEARED = CacheEvent(CacheEventKind.CLEARED)


def stored(tenant: str, *hashes: int, parent: int | None = None) -> CacheEvent:
    """Pages of one token each, which is their hash."""
    return CacheEvent(CacheEventKind.STORED, tenant, hashes, parent, hashes, namespace=7)


def removed(tenant: str, *hashes: int) -> CacheEvent:
    return CacheEvent(CacheEventKind.REMOVED, tenant, hashes)


class Followed:
    """Followers of an engine that notes what it is sent. `tell` is what the engine says."""

    def __init__(self):
        self.sent: list[FollowCacheEvents] = []
        self.followers = CacheFollowers(self.sent.append)

    def tell(self, *events: CacheEvent, number: int | None = None) -> None:
        self.followers.handle(CacheEvents(self.sent[-1].number if number is None else number, events))

    def follow(self, tenant: str | None = None, has_computed: bool = False):
        return self.followers.follow(tenant, has_computed)


def read(follower) -> list[CacheEvent]:
    return list(asyncio.run(follower.next(0.0)))


def test_the_engine_records_only_while_somebody_follows():
    followed = Followed()
    with followed.follow(), followed.follow():
        assert followed.sent == [FollowCacheEvents(1)]
    assert followed.sent == [FollowCacheEvents(1), FollowCacheEvents(0)]
    with followed.follow(has_computed=True) as follower:
        assert followed.sent[2:] == [FollowCacheEvents(2)]
        assert follower.missed_before
        followed.tell(stored("", 1), number=1)  # said before the engine had left off
        assert read(follower) == []
        assert follower.snapshot == ()


def test_a_tenant_is_told_of_its_own_pages_alone():
    followed = Followed()
    with followed.follow(None) as everything, followed.follow("a") as one, followed.follow("b") as other:
        events = [stored("a", 1, 2), stored("b", 3), removed("a", 2), stored("a", 4, parent=1)]
        followed.tell(*events)
        followed.tell(stored("c", 5))
        followed.tell(CLEARED)
        assert read(everything) == [*events, stored("c", 5), CLEARED]
        assert read(one) == [events[0], events[2], events[3], CLEARED]
        assert read(other) == [events[1], CLEARED]
        with followed.follow("b") as late:
            assert late.snapshot == ()


def test_a_snapshot_has_what_is_known_with_parents_first():
    followed = Followed()
    with followed.follow(None):
        followed.tell(stored("a", 1, 2, 3), stored("b", 9))
        followed.tell(removed("a", 1))
        followed.tell(stored("a", 1), stored("a", 8, parent=77))  # the parent comes back behind its children
        with followed.follow("a") as late, followed.follow(None) as everything:
            assert late.snapshot == (
                stored("a", 1),
                stored("a", 2, parent=1),
                stored("a", 3, parent=2),
                stored("a", 8, parent=77),
            )
            assert sorted(one.hashes[0] for one in everything.snapshot) == [1, 2, 3, 8, 9]
            followed.tell(stored("a", 10, parent=3))
            assert read(late) == [stored("a", 10, parent=3)]


def test_a_slow_reader_is_ended_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(cache_followers, "MAX_UNREAD_PAGES", 3)
    followed = Followed()
    with followed.follow("a") as slow, followed.follow("b") as other:
        followed.tell(stored("a", 1, 2), stored("b", 5))
        followed.tell(removed("a", 1, 2))
        with pytest.raises(FollowerError, match="4 pages of events wait to be read; at most 3 may"):
            read(slow)
        followed.tell(stored("a", 6))
        with pytest.raises(FollowerError):
            read(slow)
        assert read(other) == [stored("b", 5)]
        with followed.follow("a") as again:
            assert again.snapshot == (stored("a", 6),)


def test_waiting_for_events_ends_with_them_or_with_the_time():
    async def body():
        followed = Followed()
        with followed.follow() as follower:
            waiting = asyncio.ensure_future(follower.next(60.0))
            await asyncio.sleep(0)
            followed.tell(CLEARED)
            assert list(await waiting) == [CLEARED]
            assert list(await follower.next(0.0)) == []

    asyncio.run(body())


def test_all_end_with_the_engine():
    followed = Followed()
    with followed.follow() as follower:
        followed.tell(CLEARED)
        followed.followers.handle(EngineFailed("out of memory"))
        with pytest.raises(EngineDeadError, match="the engine has ended: out of memory"):
            read(follower)
    assert followed.sent == [FollowCacheEvents(1)]
    with pytest.raises(EngineDeadError), followed.follow():
        pass


def test_there_are_not_more_than_may_be(monkeypatch):
    monkeypatch.setattr(cache_followers, "MAX_FOLLOWERS", 1)
    followed = Followed()
    with followed.follow():
        with pytest.raises(FollowerError, match="1 subscriptions to KV events are open, as many as may be"):
            with followed.follow():
                pass
    with followed.follow():
        pass
