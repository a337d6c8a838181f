"""Passes what happens to pages of the prefix cache on to those who follow it, each within a bound of its own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from jaxserve.engine.messages import CacheEvents, EngineFailed, FollowCacheEvents, FromEngine, ToEngine
from jaxserve.frontend.delta import EngineDeadError, FrontEndError
from jaxserve.kv_cache.event_log import CacheEvent, CacheEventKind

MAX_FOLLOWERS = 16

MAX_UNREAD_PAGES = 16_384
"""Maximum number of pages named in events that one follower has not read; each has the token ids of a page at most."""


class FollowerError(FrontEndError):
    """Events cannot be followed: too many do already, or this follower has read too slowly and has missed some."""


@dataclasses.dataclass(frozen=True)
class _Page:
    """Holds what is known of a stored page: fields of its `CacheEvent`."""

    tenant: str
    namespace: int
    salted: bool
    parent: int | None
    token_ids: tuple[int, ...]
    group: int | None
    window: int | None


class CacheFollower:
    """Queues the events of one who follows.

    Attributes:
        tenant: whose pages are told of; None for all.
        snapshot: the pages that were known when it began, as events, each behind its parent; what `next` returns
            continues from there.
        missed_before: pages may have been stored before anybody followed; they become known when they are used.
    """

    def __init__(self, tenant: str | None, snapshot: Sequence[CacheEvent], missed_before: bool):
        self.tenant = tenant
        self.snapshot = snapshot
        self.missed_before = missed_before
        self._events: list[CacheEvent] = []
        self._num_pages = 0
        self._error: Exception | None = None
        self._news = asyncio.Event()

    async def next(self, seconds: float) -> Sequence[CacheEvent]:
        """Returns the events since the last call, as soon as there are any; none after `seconds`.

        Raises:
            FollowerError: some were dropped, since too many waited. Whoever begins anew gets a snapshot.
            EngineDeadError: the engine has ended, or the front end is closed.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        if self._error is not None:
            raise self._error
        events, self._events, self._num_pages = self._events, [], 0
        self._news.clear()
        return events

    def push(self, events: Sequence[CacheEvent]) -> None:
        """Queues those of the events that the follower may learn of."""
        own = [event for event in events if event.kind is CacheEventKind.CLEARED or self.tenant in (None, event.tenant)]
        if not own or self._error is not None:
            return
        self._events += own
        self._num_pages += sum(len(event.hashes) for event in own)
        if self._num_pages > MAX_UNREAD_PAGES:
            self.end(
                FollowerError(
                    f"{self._num_pages} pages of events wait to be read; at most {MAX_UNREAD_PAGES} may: read faster, "
                    "and subscribe again, which begins with all pages that are known"
                )
            )
        self._news.set()

    def end(self, error: Exception) -> None:
        """Ends the events with an error; what is unread is dropped."""
        self._error, self._events = self._error or error, []
        self._news.set()


class CacheFollowers:
    """Follows one engine's prefix cache while anybody does. Must be used on one event loop.

    send: sends a message to the engine, which records nothing while nobody follows.
    """

    def __init__(self, send: Callable[[ToEngine], None]):
        self._send = send
        self._number = 0  # of FollowCacheEvents
        self._followers: list[CacheFollower] = []
        self._known: dict[int, _Page] = {}  # by hash
        self._missed_before = False
        self._failure = ""

    @contextlib.contextmanager
    def follow(self, tenant: str | None, has_computed: bool) -> Iterator[CacheFollower]:
        """Follows the events of a tenant's pages, or of all for None, while the block runs.

        has_computed: the engine may have stored pages before this call.

        Raises:
            FollowerError: too many follow.
            EngineDeadError: the engine has ended.
        """
        if self._failure:
            raise EngineDeadError(self._failure)
        if len(self._followers) >= MAX_FOLLOWERS:
            raise FollowerError(
                f"{MAX_FOLLOWERS} subscriptions to KV events are open, as many as may be: end one of them"
            )
        if not self._followers:
            self._number, self._known, self._missed_before = self._number + 1, {}, has_computed
            self._send(FollowCacheEvents(self._number))
        follower = CacheFollower(tenant, tuple(self._snapshot(tenant)), self._missed_before)
        self._followers.append(follower)
        try:
            yield follower
        finally:
            self._followers.remove(follower)
            if not self._followers:
                self._known = {}
                if not self._failure:
                    self._send(FollowCacheEvents(0))

    def handle(self, message: FromEngine) -> None:
        """Takes the engine's messages, those that are about its prefix cache."""
        if isinstance(message, EngineFailed):
            self.close(f"the engine has ended: {message.error}")
        elif isinstance(message, CacheEvents) and self._followers and message.number == self._number:
            for event in message.events:
                self._learn(event)
            for follower in self._followers:
                follower.push(message.events)

    def close(self, reason: str) -> None:
        """Ends all events with EngineDeadError."""
        self._failure = self._failure or reason
        for follower in self._followers:
            follower.end(EngineDeadError(reason))

    def _learn(self, event: CacheEvent) -> None:
        match event.kind:
            case CacheEventKind.CLEARED:
                self._known.clear()
            case CacheEventKind.REMOVED:
                for name in event.hashes:
                    self._known.pop(name, None)
            case CacheEventKind.STORED:
                parent, size = event.parent, len(event.token_ids) // len(event.hashes)
                for place, name in enumerate(event.hashes):
                    token_ids = event.token_ids[place * size : (place + 1) * size]
                    self._known[name] = _Page(
                        event.tenant, event.namespace, event.salted, parent, token_ids, event.group, event.window
                    )
                    parent = name

    def _snapshot(self, tenant: str | None) -> Iterator[CacheEvent]:
        """Yields the stored pages that are known, each behind its parent where that is known; one event a page."""
        told: set[int] = set()
        for name in self._known:
            chain, place = [], name
            while place is not None and place in self._known and place not in told:
                chain.append(place)
                place = self._known[place].parent
            told.update(chain)
            for one in reversed(chain):
                page = self._known[one]
                if tenant in (None, page.tenant):
                    yield CacheEvent(
                        CacheEventKind.STORED,
                        page.tenant,
                        (one,),
                        page.parent,
                        page.token_ids,
                        page.namespace,
                        page.salted,
                        page.group,
                        page.window,
                    )
