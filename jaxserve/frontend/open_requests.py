"""Keeps the unfinished requests of a front end: by owner and id, by the engine's name for them, and by deadline."""

from __future__ import annotations

import dataclasses
import heapq

from jaxserve.frontend.admission import Ticket
from jaxserve.frontend.logprob_queue import LogprobQueue
from jaxserve.frontend.output import OutputState
from jaxserve.pooling_params import PoolingParams
from jaxserve.telemetry.request_meter import UNCOUNTED, RequestLife


@dataclasses.dataclass
class OpenRequest:
    """Tracks a request without its last delta.

    engine_id: its name in messages (see `OpenRequests.engine_id`). ticket: of the admission, where there is one.
    life: counts it. truncated_tokens: cut off its prompt. logprobs: those of its tokens, where it wants any. pooling:
    what it asks for, where that is an embedding.
    """

    owner: str
    request_id: str
    engine_id: str
    prompt_tokens: int
    deadline: float | None
    output: OutputState
    ticket: Ticket | None = None
    cached_tokens: int = 0
    life: RequestLife = UNCOUNTED
    truncated_tokens: int = 0
    logprobs: LogprobQueue | None = None
    pooling: PoolingParams | None = None


class OpenRequests:
    """Holds the requests without their last delta, and the names of those that the engine has yet to release."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], OpenRequest] = {}  # by owner and request id
        self._by_engine_id: dict[str, OpenRequest] = {}
        self._ending: set[str] = set()  # engine ids of finished requests that the engine has yet to confirm
        self._deadlines: list[tuple[float, str]] = []  # heap of (deadline, engine id); finished ones are skipped

    def __len__(self) -> int:
        return len(self._open)

    @property
    def num_ending(self) -> int:
        """Number of finished requests that the engine has yet to release."""
        return len(self._ending)

    @property
    def num_unreleased(self) -> int:
        """Number of requests that the engine has not released, finished or not."""
        return len(self._by_engine_id) + len(self._ending)

    @property
    def next_deadline(self) -> float | None:
        """Earliest deadline of an open request."""
        while self._deadlines and self._deadlines[0][1] not in self._by_engine_id:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def all(self) -> list[OpenRequest]:
        """Returns the open requests, in the order of their arrival."""
        return list(self._open.values())

    def find(self, owner: str, request_id: str) -> OpenRequest | None:
        """Returns an owner's open request of this id."""
        return self._open.get((owner, request_id))

    def find_engine(self, engine_id: str) -> OpenRequest | None:
        """Returns the open request that the engine knows by this name."""
        return self._by_engine_id.get(engine_id)

    def is_ending(self, engine_id: str) -> bool:
        """Tells whether the request of this name is finished and not released."""
        return engine_id in self._ending

    def engine_id(self, request_id: str) -> str:
        """Returns the request's id, with a number appended while the engine knows another request by that id: an
        earlier one, or another owner's.
        """
        engine_id, number = request_id, 1
        while engine_id in self._ending or engine_id in self._by_engine_id:
            number += 1
            engine_id = f"{request_id}#{number}"
        return engine_id

    def add(self, opened: OpenRequest) -> None:
        """Adds a request that was sent to the engine."""
        self._open[opened.owner, opened.request_id] = self._by_engine_id[opened.engine_id] = opened
        if opened.deadline is not None:
            heapq.heappush(self._deadlines, (opened.deadline, opened.engine_id))

    def pop_expired(self, now: float) -> OpenRequest | None:
        """Returns an open request whose deadline has passed, which is not returned again; None when there is none."""
        deadline = self.next_deadline
        if deadline is None or deadline > now:
            return None
        return self._by_engine_id[heapq.heappop(self._deadlines)[1]]

    def remove(self, opened: OpenRequest, *, released: bool) -> None:
        """Removes a finished request. released: the engine has no more to say of it."""
        del self._open[opened.owner, opened.request_id]
        del self._by_engine_id[opened.engine_id]
        if not released:
            self._ending.add(opened.engine_id)

    def release(self, engine_id: str) -> None:
        """Records that the engine has released a request."""
        self._ending.discard(engine_id)

    def release_all(self) -> None:
        """Records that the engine has ended."""
        self._ending.clear()
