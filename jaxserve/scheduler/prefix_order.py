"""Looks up what waiting requests would find in the prefix cache, for policies and predictions that count it."""

from __future__ import annotations

from jaxserve.scheduler.prefix_cache import PrefixCache
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.waiting import Waiting


class PrefixOrder:
    """Sets `Sequence.num_found` of new requests and, where the policy orders by it, updates it when pages are committed
    that continue what they found.

    For that each request waits for the content key of the first page that it did not find, so a commit costs a look-up
    for each page and a new place in the queue for each request that gains. Pages that are reclaimed are noticed at
    admission only. watching: False where the policy does not order by it.
    """

    def __init__(self, cache: PrefixCache, waiting: Waiting, *, watching: bool):
        self._cache = cache
        self._waiting = waiting
        self._watching = cache.watched = watching
        self._missing: dict[bytes, list[Sequence]] = {}
        self._num_entries = 0

    def arrived(self, sequence: Sequence) -> None:
        """Looks up a new request, which is in no queue yet."""
        if self._watching:
            self._look_up(sequence)
        else:
            sequence.num_found = self._cache.num_tokens(self._cache.find(sequence))

    def update(self) -> None:
        """Gives the requests that gained by what was committed a new place."""
        if not self._watching:
            return
        keys, self._cache.committed_keys = self._cache.committed_keys, []
        for key in keys:
            entries = self._missing.pop(key, ())
            self._num_entries -= len(entries)
            for sequence in entries:
                if sequence.waits_new:
                    self._waiting.reorder(sequence, self._look_up)

    def _look_up(self, sequence: Sequence) -> None:
        found = len(self._cache.find(sequence))
        sequence.num_found = found * self._cache.page_size
        key = self._cache.next_key(sequence, found, sequence.num_skippable)
        if key is not None:
            self._missing.setdefault(key, []).append(sequence)
            self._num_entries += 1
        if self._num_entries > 2 * len(self._waiting) + 64:
            self._drop_others()

    def _drop_others(self) -> None:
        """Drops the entries of requests that no longer wait."""
        kept = {key: [one for one in entries if one.waits_new] for key, entries in self._missing.items()}
        self._missing = {key: entries for key, entries in kept.items() if entries}
        self._num_entries = sum(map(len, self._missing.values()))
