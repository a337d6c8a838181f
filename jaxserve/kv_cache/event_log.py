"""Records which pages become findable in the prefix cache and which no longer are, for those who follow it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from jaxserve.kv_cache.page_groups import key_group

HASH_BYTES = 8
"""Bytes of a content key that name a page in events."""


def page_hash(key: bytes) -> int:
    """Returns the name of a page in events: 64 bits of its content key, with a sign.

    Keys are keyed hashes, so that a name tells nothing about tenant, salt or tokens to those without the secret. Pages
    of several groups of layers that hold the same tokens have names of their own.
    """
    return int.from_bytes(key[:HASH_BYTES], "little", signed=True) ^ key_group(key)


class CacheEventKind(enum.Enum):
    """Enumerates what can happen to pages: they can be found from now on, no longer, or none can that was named."""

    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"


@dataclasses.dataclass(frozen=True)
class CacheEvent:
    """Names pages of the prefix cache, and what has happened to them.

    tenant: whose they are. hashes: their names, as `page_hash` makes them. group: of layers that the pages belong to,
    None where there is only one.
    Only of stored ones, which are consecutive pages of one sequence: parent, the hash of the page before the first,
    None where there is none; token_ids of all pages, in order; namespace, a hash of tenant and salt, which differs
    where pages are not shared; salted, whether the salt is not empty; window, the positions that layers of the group
    attend to, None for all.
    """

    kind: CacheEventKind
    tenant: str = ""
    hashes: tuple[int, ...] = ()
    parent: int | None = None
    token_ids: tuple[int, ...] = ()
    namespace: int = 0
    salted: bool = False
    group: int | None = None
    window: int | None = None


class CacheEventLog:
    """Collects events until they are taken. It knows the pages that it has named, so each is named once.

    grouped: there are several groups of layers.
    """

    def __init__(self, *, grouped: bool = False) -> None:
        self._tenants: dict[bytes, str] = {}  # of the pages named, by content key
        self._events: list[CacheEvent] = []
        self._grouped = grouped
        self._removed: dict[tuple[str, int | None], list[int]] = {}  # by tenant and group, since the last other event

    def __contains__(self, key: bytes) -> bool:
        """Tells whether a page has been named as stored, and not as removed since."""
        return key in self._tenants

    def stored(self, event: CacheEvent, keys: Sequence[bytes]) -> None:
        """Records stored pages. keys: their content keys, none of which has been named."""
        self._flush_removed()
        self._tenants |= dict.fromkeys(keys, event.tenant)
        self._events.append(event)

    def removed(self, key: bytes) -> None:
        """Records that the page of a content key can no longer be found."""
        tenant = self._tenants.pop(key, None)
        if tenant is not None:
            group = key_group(key) if self._grouped else None
            self._removed.setdefault((tenant, group), []).append(page_hash(key))

    def cleared(self) -> None:
        """Records that no page can be found any more."""
        self._tenants.clear()
        self._removed.clear()
        self._events = [CacheEvent(CacheEventKind.CLEARED)]

    def take(self) -> tuple[CacheEvent, ...]:
        """Returns the events since the last call, in order."""
        self._flush_removed()
        events, self._events = tuple(self._events), []
        return events

    def _flush_removed(self) -> None:
        self._events += [
            CacheEvent(CacheEventKind.REMOVED, tenant, tuple(hashes), group=group)
            for (tenant, group), hashes in self._removed.items()
        ]
        self._removed.clear()
