"""Streams what happens to pages of the prefix cache to a gateway, in the messages of smg-grpc-proto.

A stream begins with a snapshot: all pages that are known, in chunks, the first of which clears what the gateway knew.
Its batches are numbered one after the other, and no two streams share numbers, so that a gap tells nothing of others.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from smg_grpc_proto.generated import common_pb2 as pb

from jaxserve.frontend.cache_followers import CacheFollower
from jaxserve.kv_cache.event_log import CacheEvent, CacheEventKind
from jaxserve.serving.grpc_port.call_interceptor import CallContext

HEARTBEAT_SECONDS = 1.0
"""Seconds without events after which a batch with the load alone is sent."""

SNAPSHOT_PAGES = 256
"""Pages of one chunk of a snapshot."""

_EVENT_PAGES = 256
"""Maximum number of pages of one event; more become several."""


class EventStream:
    """Makes the batches of one stream.

    Args:
        tenant: whose requests the gateway's are, "" for nobody's in particular: their pages without a salt are the ones
            that it finds by their tokens alone. All others have a namespace of their own.
        page_size: tokens per page.
        start: number that the gateway has seen last; batches are numbered from behind it.
    """

    def __init__(self, tenant: str, page_size: int, start: int):
        self._tenant = tenant
        self._page_size = page_size
        self._number = start
        self._num_events = 0
        self._num_loads = 0

    def snapshot(self, events: Sequence[CacheEvent], missed_before: bool) -> Iterator[pb.KvEventBatch]:
        """Yields the chunks of a snapshot, of which there is at least one. missed_before: as in `CacheFollower`."""
        chunks = [events[start : start + SNAPSHOT_PAGES] for start in range(0, len(events), SNAPSHOT_PAGES)]
        num_pages = sum(len(event.hashes) for event in events)
        for index, chunk in enumerate(chunks or [()]):
            batch = self._batch([] if index else [CacheEvent(CacheEventKind.CLEARED)], chunk, synthesized=True)
            batch.snapshot.CopyFrom(
                pb.KvSnapshotChunk(
                    index=index, count=max(len(chunks), 1), blocks=num_pages, unknown_before=int(missed_before)
                )
            )
            yield batch

    def batch(self, events: Sequence[CacheEvent]) -> pb.KvEventBatch:
        """Returns the batch of new events."""
        return self._batch(events)

    def heartbeat(self) -> pb.KvEventBatch:
        """Returns a batch that has no events, and the number of the one before."""
        return pb.KvEventBatch(sequence_number=self._number, timestamp=time.time(), dp_rank=0)

    def with_load(self, batch: pb.KvEventBatch, load: pb.EngineLoad, *, alone: bool) -> pb.KvEventBatch:
        """Adds the worker's load to a batch and returns it. alone: it has nothing else."""
        self._num_loads += 1
        load.sample, load.load_only = self._num_loads, alone
        batch.load.CopyFrom(load)
        return batch

    def _batch(self, *groups: Sequence[CacheEvent], synthesized: bool = False) -> pb.KvEventBatch:
        self._number += 1
        batch = pb.KvEventBatch(sequence_number=self._number, timestamp=time.time(), dp_rank=0)
        for event in itertools.chain(*groups):
            for message in self._messages(event):
                if not synthesized:
                    self._num_events += 1
                    message.event_id = self._num_events
                batch.events.append(message)
        return batch

    def _messages(self, event: CacheEvent) -> Iterator[pb.KvCacheEvent]:
        if event.kind is CacheEventKind.CLEARED:
            yield pb.KvCacheEvent(cleared=pb.KvCacheCleared())
            return
        for first in range(0, len(event.hashes), _EVENT_PAGES):
            hashes = event.hashes[first : first + _EVENT_PAGES]
            if event.kind is CacheEventKind.REMOVED:
                removed = pb.KvBlocksRemoved(
                    block_hashes=hashes, cache_level=0, tier=pb.KV_CACHE_TIER_DEVICE, group_idx=event.group
                )
                yield pb.KvCacheEvent(removed=removed)
            else:
                parent = event.hashes[first - 1] if first else event.parent
                yield pb.KvCacheEvent(stored=self._stored(event, first, hashes, parent))

    def _stored(self, event: CacheEvent, first: int, hashes: Sequence[int], parent: int | None) -> pb.KvBlocksStored:
        size = self._page_size
        own = event.tenant == self._tenant and not event.salted
        return pb.KvBlocksStored(
            blocks=[
                pb.KvBlock(
                    block_hash=name,
                    token_ids=event.token_ids[place * size : (place + 1) * size],
                    block_size=size,
                    cache_level=0,
                )
                for place, name in enumerate(hashes, start=first)
            ],
            parent_block_hash=parent,
            tier=pb.KV_CACHE_TIER_DEVICE,
            group_idx=event.group,
            kv_cache_spec_kind=_kind(event),
            kv_cache_spec_sliding_window=event.window,
            # What separates pages that hold the same tokens: a hash, from which tenant and salt cannot be guessed.
            cache_salt=None if own else f"{event.namespace & (2**64 - 1):016x}",
        )


def _kind(event: CacheEvent) -> str | None:
    """Returns vLLM's name of what the layers of a page's group attend to; None where there is one group for all."""
    if event.window is not None:
        return "sliding_window"
    return None if event.group is None else "full_attention"


async def stream_events(
    follower: CacheFollower, stream: EventStream, load: Callable[[], pb.EngineLoad], context: CallContext | Any
) -> None:
    """Writes batches until the call or the engine ends, or the reader is too far behind.

    Raises as `CacheFollower.next` does.
    """
    for batch in stream.snapshot(follower.snapshot, follower.missed_before):
        await context.write(stream.with_load(batch, load(), alone=False))
    while True:
        events = await follower.next(HEARTBEAT_SECONDS)
        batch = stream.batch(events) if events else stream.heartbeat()
        await context.write(stream.with_load(batch, load(), alone=not events))
