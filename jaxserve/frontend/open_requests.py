"""Keeps the unfinished requests of a front end: by owner and id, by the engine's name for them, and by deadline."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable

from jaxserve.frontend.admission import Ticket
from jaxserve.frontend.logprob_queue import LogprobQueue
from jaxserve.frontend.open_search import OpenSearch
from jaxserve.frontend.output import OutputState
from jaxserve.pooling_params import PoolingParams
from jaxserve.telemetry.request_meter import UNCOUNTED, RequestLife


@dataclasses.dataclass(eq=False)
class OpenSample:
    """Tracks a sample without its last delta.

    engine_id: its name in messages (see `OpenRequests.engine_ids`); that of a beam search's output is in none.
    logprobs: those of its tokens, where it wants any.
    """

    index: int
    engine_id: str
    output: OutputState
    logprobs: LogprobQueue | None = None


@dataclasses.dataclass(eq=False)
class OpenRequest:
    """Tracks a request without its last delta.

    samples: those without theirs, by index. output_tokens: of those that have ended. ticket: of the admission, where
    there is one. life: counts the request. truncated_tokens: cut off its prompt. pooling: what it asks for, where that
    is an embedding. search: of a beam search, whose outputs are the samples.
    """

    owner: str
    request_id: str
    prompt_tokens: int
    deadline: float | None
    samples: dict[int, OpenSample]
    ticket: Ticket | None = None
    cached_tokens: int = 0
    output_tokens: int = 0
    life: RequestLife = UNCOUNTED
    truncated_tokens: int = 0
    pooling: PoolingParams | None = None
    search: OpenSearch | None = None

    @property
    def tokens_so_far(self) -> int:
        """Returns the output tokens of all samples; of a beam search those of one beam."""
        if self.search is not None:
            return self.search.length
        return self.output_tokens + sum(sample.output.num_tokens for sample in self.samples.values())


class OpenRequests:
    """Holds the requests without their last delta, and the names of those that the engine has yet to release."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], OpenRequest] = {}  # by owner and request id
        self._by_engine_id: dict[str, tuple[OpenRequest, OpenSample]] = {}
        self._beams: dict[str, OpenRequest] = {}  # by the engine's names of the requests of a beam search
        self._ending: set[str] = set()  # engine ids of finished samples that the engine has yet to confirm
        self._deadlines: list[tuple[float, int, OpenRequest]] = []  # heap with numbers; finished ones are skipped
        self._number = 0

    def __len__(self) -> int:
        return len(self._open)

    @property
    def num_ending(self) -> int:
        """Number of finished samples that the engine has yet to release."""
        return len(self._ending)

    @property
    def num_unreleased(self) -> int:
        """Number of samples that the engine has not released, finished or not."""
        return len(self._by_engine_id) + len(self._ending)

    @property
    def next_deadline(self) -> float | None:
        """Earliest deadline of an open request."""
        while self._deadlines and not self._deadlines[0][2].samples:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def all(self) -> list[OpenRequest]:
        """Returns the open requests, in the order of their arrival."""
        return list(self._open.values())

    def find(self, owner: str, request_id: str) -> OpenRequest | None:
        """Returns an owner's open request of this id."""
        return self._open.get((owner, request_id))

    def find_engine(self, engine_id: str) -> tuple[OpenRequest, OpenSample] | None:
        """Returns the open sample that the engine knows by this name, and its request."""
        return self._by_engine_id.get(engine_id)

    def is_ending(self, engine_id: str) -> bool:
        """Tells whether the sample of this name is finished and not released."""
        return engine_id in self._ending

    def engine_ids(self, request_id: str, count: int) -> list[str]:
        """Returns names for the samples of a request: its id, then that id with the sample's index."""
        return [self.engine_id(f"{request_id}/{index}" if index else request_id) for index in range(count)]

    def engine_id(self, name: str) -> str:
        """Returns a name that the engine does not know: the one that is wished for.

        A number is appended while the engine knows another sample by that name: of an earlier request, or another
        owner's.
        """
        engine_id, number = name, 1
        while engine_id in self._ending or engine_id in self._by_engine_id or engine_id in self._beams:
            number += 1
            engine_id = f"{name}#{number}"
        return engine_id

    def find_beam(self, engine_id: str) -> OpenRequest | None:
        """Returns the open beam search of which the engine knows a request by this name."""
        return self._beams.get(engine_id)

    def add_beams(self, opened: OpenRequest, engine_ids: Iterable[str]) -> None:
        """Adds the requests of a step of a beam search, which are sent to the engine."""
        self._beams.update(dict.fromkeys(engine_ids, opened))

    def remove_beam(self, engine_id: str, *, released: bool) -> None:
        """Removes a request of a beam search. released: the engine has no more to say of it."""
        del self._beams[engine_id]
        if not released:
            self._ending.add(engine_id)

    def add(self, opened: OpenRequest) -> None:
        """Adds a request that was sent to the engine."""
        self._open[opened.owner, opened.request_id] = opened
        for sample in opened.samples.values():
            self._by_engine_id[sample.engine_id] = opened, sample
        if opened.deadline is not None:
            self._number += 1
            heapq.heappush(self._deadlines, (opened.deadline, self._number, opened))

    def pop_expired(self, now: float) -> OpenRequest | None:
        """Returns an open request whose deadline has passed, which is not returned again; None when there is none."""
        deadline = self.next_deadline
        if deadline is None or deadline > now:
            return None
        return heapq.heappop(self._deadlines)[2]

    def remove(self, opened: OpenRequest, sample: OpenSample, *, released: bool) -> None:
        """Removes a finished sample, and with the last one the request. released: the engine has no more to say of
        it."""
        del opened.samples[sample.index]
        if not opened.samples:
            del self._open[opened.owner, opened.request_id]
        del self._by_engine_id[sample.engine_id]
        if not released:
            self._ending.add(sample.engine_id)

    def release(self, engine_id: str) -> None:
        """Records that the engine has released a sample."""
        self._ending.discard(engine_id)

    def release_all(self) -> None:
        """Records that the engine has ended."""
        self._ending.clear()
