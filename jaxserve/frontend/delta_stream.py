"""Streams the deltas of one request to whoever reads them."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from types import TracebackType

from jaxserve.config.failpoints import Hit
from jaxserve.frontend.delta import Delta
from jaxserve.logprob_columns import LogprobColumns

Abort = Callable[[str, str], bool]


class DeltaStream:
    """Iterates asynchronously over one request's deltas and ends after the last one, that of its last sample.

    Closing it (`aclose`, or leaving `async with`) before then, or cancelling the task that waits in it, aborts the
    request. Only one task may read it.

    Args:
        abort: ends an unfinished request, given its id and owner.
        request_id: of the request.
        owner: whose request it is.
    """

    def __init__(self, abort: Abort, request_id: str, owner: str = ""):
        self._abort = abort
        self._request_id = request_id
        self._owner = owner
        self._unread: dict[int, list[Delta]] = {}  # by sample
        self._num_unread = 0
        self._news: asyncio.Future[None] | None = None  # what the reader waits for
        self._finished = False
        self._closed = False

    @property
    def request_id(self) -> str:
        return self._request_id

    @property
    def owner(self) -> str:
        """Whose request it is."""
        return self._owner

    @property
    def finished(self) -> bool:
        """Whether the last delta has arrived, read or not."""
        return self._finished

    def __aiter__(self) -> DeltaStream:
        return self

    @property
    def num_unread(self) -> int:
        """Number of token ids that wait to be read."""
        return self._num_unread

    async def __anext__(self) -> Delta:
        while not self._unread:
            if self._finished or self._closed:
                raise StopAsyncIteration
            self._news = asyncio.get_running_loop().create_future()
            try:
                await self._news
            except asyncio.CancelledError:
                self.close()
                raise
            finally:
                self._news = None
        unread = self._unread.pop(next(iter(self._unread)))
        delta = unread[0] if len(unread) == 1 else merged(unread)
        self._num_unread -= len(delta.token_ids)
        return delta

    def push(self, delta: Delta) -> None:
        """Adds a delta; called by the front end. Never waits."""
        unread = self._unread.setdefault(delta.index, [])
        unread.append(delta)
        self._num_unread += len(delta.token_ids)
        if len(unread) > 64:  # keeps what is unread small: not one object a token
            self._unread[delta.index] = [merged(unread)]
        self._finished = delta.ends_request
        self._wake()

    def drop_unread(self) -> None:
        """Discards unread deltas."""
        self._unread, self._num_unread = {}, 0

    def close(self) -> None:
        """Ends the stream and aborts the request if it is unfinished; idempotent. Unread news are dropped."""
        self._closed = True
        if not self._finished:
            self._abort(self._request_id, self._owner)
        self.drop_unread()  # with the last delta: a closed stream's is never read
        self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def aclose(self) -> None:
        """Calls `close`, for `contextlib.aclosing` and `async with`."""
        self.close()

    async def __aenter__(self) -> DeltaStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class FaultyStream(DeltaStream):
    """Passes the failpoint "send" before a delta is handed to whoever sends it. hit: passes it."""

    def __init__(self, abort: Abort, request_id: str, owner: str, hit: Hit):
        super().__init__(abort, request_id, owner)
        self._hit = hit

    async def __anext__(self) -> Delta:
        delta = await super().__anext__()
        self._hit((self.request_id,))
        return delta


def merged(deltas: Sequence[Delta]) -> Delta:
    """Merges deltas of a sample into one."""
    logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    return dataclasses.replace(
        deltas[-1],
        token_ids=tuple([token_id for delta in deltas for token_id in delta.token_ids]),
        text="".join([delta.text for delta in deltas]),
        logprobs=LogprobColumns.joined(logprobs) if logprobs else None,
        prompt_logprobs=next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None),
    )
