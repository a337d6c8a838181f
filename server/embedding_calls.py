"""Embeds the inputs of one call, for every port: as many at a time as the engine runs, and all or none."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Sequence

from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.frontend.delta import Delta, QueueFullError
from jaxserve.pooling_params import PoolingParams
from jaxserve.request import RequestOptions
from jaxserve.serving.problem import RequestAbortedError, check_delta
from jaxserve.telemetry.request_trace import RequestTrace


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Holds the embedding of one input, as in `Delta`, and the input's tokens. truncated_tokens: cut off it, which
    prompt_tokens do not count. cached_tokens: of prompt_tokens, found in the prefix cache."""

    embedding: bytes
    prompt_tokens: int
    truncated_tokens: int = 0
    cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class EmbeddingCall:
    """Holds what is embedded, and for whom.

    Attributes:
        inputs: each a text or token ids.
        params: of all inputs.
        options: of all inputs.
        request_id: of one input; several get numbers behind it.
        owner: whose request it is.
        trace: its place in a trace.
    """

    inputs: Sequence[str | Sequence[int]]
    params: PoolingParams
    options: RequestOptions
    request_id: str
    owner: str
    trace: RequestTrace | None = None


async def embed_all(frontend: AsyncFrontEnd, call: EmbeddingCall) -> list[Embedded]:
    """Embeds every input; the first error, and being canceled, aborts the rest.

    Inputs beyond what runs at once wait here, and not in the engine's queue, so that a call of thousands leaves others
    their places there. Where even so the queue is full, the call goes on with the places that it has.

    Raises:
        Exception: as `AsyncFrontEnd.submit` does, and what `check_delta` raises for an input that failed.
    """
    for prompt in call.inputs:
        frontend.check_size(prompt, call.params)
    run = _Run(frontend, call)
    try:
        return await run.run()
    finally:
        await run.cancel()


class _Run:
    """Runs one call with a task for each input under way."""

    def __init__(self, frontend: AsyncFrontEnd, call: EmbeddingCall):
        self._frontend = frontend
        self._call = call
        self._waiting = collections.deque(range(len(call.inputs)))
        self._found: dict[int, Embedded] = {}
        self._most = frontend.ready.max_num_seqs
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_active = 0

    async def run(self) -> list[Embedded]:
        self._start_task()
        while self._tasks:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            self._tasks -= done
            errors = [error for task in done if (error := task.exception()) is not None]
            if errors:
                raise errors[0]
        return [self._found[index] for index in range(len(self._call.inputs))]

    async def cancel(self) -> None:
        """Aborts what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start_task(self) -> None:
        """Starts another task if there is something left for it. Each starts the next, so that others have their turn
        between them.
        """
        if self._waiting and len(self._tasks) < self._most:
            self._tasks.add(asyncio.ensure_future(self._work()))

    async def _work(self) -> None:
        """Embeds one input after another, as long as any waits."""
        self._num_active += 1
        try:
            await self._work_on()
        finally:
            self._num_active -= 1

    async def _work_on(self) -> None:
        while self._waiting:
            index = self._waiting.popleft()
            try:
                self._found[index] = await self._embed(index)
            except QueueFullError:
                if self._num_active == 1:  # no place will become free by this call's own doing
                    raise
                self._waiting.appendleft(index)
                return

    async def _embed(self, index: int) -> Embedded:
        call = self._call
        name = call.request_id if len(call.inputs) == 1 else f"{call.request_id}-{index}"
        stream = await self._frontend.submit(
            call.inputs[index], call.params, call.options, request_id=name, owner=call.owner, trace=call.trace
        )
        async with stream:  # left early, it aborts the request
            self._start_task()
            last = Delta("")
            async for delta in stream:
                last = delta
        check_delta(last)
        if not last.embedding:
            raise RequestAbortedError(last.error or "the request was aborted")
        return Embedded(last.embedding, last.prompt_tokens, last.truncated_tokens, last.cached_tokens)
