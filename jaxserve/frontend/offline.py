"""Runs many requests to completion in the caller's thread: the loop beneath `LLM` and the offline batch."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

import tqdm

from jaxserve.engine.channel import EngineClient
from jaxserve.frontend.delta import Cause, DeadlineError, Delta, EngineDeadError, PromptLogprobs
from jaxserve.frontend.frontend import FrontEnd, Prepared
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import FinishReason


@dataclasses.dataclass(frozen=True)
class FinishedSample:
    """Holds a finished sample. error: one line when finish_reason is ERROR, ABORT or DEADLINE. logprobs: of its token
    ids, where it wants them.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    error: str = ""
    logprobs: LogprobColumns | None = None


@dataclasses.dataclass(frozen=True)
class FinishedRequest:
    """Holds a finished request. samples: by index; error: that of the first that failed. num_truncated_tokens: cut off
    the prompt, which prompt_token_ids do not have. prompt_logprobs: of its prompt, where it wants them and they are
    there.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    samples: tuple[FinishedSample, ...]
    num_cached_tokens: int = 0
    num_truncated_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def error(self) -> str:
        return next((sample.error for sample in self.samples if sample.error), "")


class _CollectedSample:
    """Collects the deltas of one sample."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[LogprobColumns] = []

    def add(self, delta: Delta) -> None:
        self._token_ids.extend(delta.token_ids)
        self._texts.append(delta.text)
        if delta.logprobs is not None:
            self._logprobs.append(delta.logprobs)

    def finished(self, reason: FinishReason, error: str) -> FinishedSample:
        logprobs = LogprobColumns.joined(self._logprobs) if self._logprobs else None
        return FinishedSample(tuple(self._token_ids), "".join(self._texts), reason, error, logprobs)


class _Collected:
    """Collects the deltas of a request's samples."""

    def __init__(self, prepared: Prepared):
        self.num_samples = prepared.params.n
        self._prompt_token_ids = prepared.prompt_token_ids
        self._prompt_logprobs: PromptLogprobs | None = None
        self._samples = [_CollectedSample() for _ in range(self.num_samples)]
        self._finished: dict[int, FinishedSample] = {}

    def add(self, delta: Delta) -> FinishedRequest | None:
        sample = self._samples[delta.index]
        sample.add(delta)
        self._prompt_logprobs = delta.prompt_logprobs or self._prompt_logprobs
        if delta.finish_reason is None:
            return None
        self._finished[delta.index] = sample.finished(delta.finish_reason, delta.error)
        if not delta.ends_request:
            return None
        return FinishedRequest(
            request_id=delta.request_id,
            prompt_token_ids=self._prompt_token_ids,
            samples=tuple([finished for _, finished in sorted(self._finished.items())]),
            num_cached_tokens=delta.cached_tokens,
            num_truncated_tokens=delta.truncated_tokens,
            prompt_logprobs=self._prompt_logprobs,
        )


def run_all(
    front_end: FrontEnd,
    client: EngineClient,
    requests: Iterable[Prepared | None],
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Generator[FinishedRequest, None, None]:
    """Yields each request's completion as it finishes; takes requests from the iterable only as there is room.

    At most twice max_num_seqs samples are unfinished when a request is taken, which keeps the engine busy and memory
    bounded. A request whose deadline passes ends with DEADLINE, before it starts or between two steps. Leaving the
    iteration early aborts the unfinished requests.

    Args:
        requests: None means that no request is available now; it may only occur while requests are unfinished.
        on_tokens: called after each step with the output tokens that it gave; an exception of it ends the iteration.

    Raises:
        EngineDeadError: the engine failed.
    """
    source = iter(requests)
    window = 2 * front_end.ready.max_num_seqs
    under_way: dict[str, _Collected] = {}
    taken: Prepared | None = None  # waits for room for all of its samples
    exhausted, num_samples = False, 0
    try:
        while True:
            while (taken is not None or not exhausted) and num_samples < window and front_end.has_room:
                try:
                    prepared = next(source) if taken is None else taken
                except StopIteration:
                    exhausted = True
                    break
                taken = None
                if prepared is None:
                    break
                if not front_end.has_room_for(prepared.params.n):
                    taken = prepared
                    break
                try:
                    front_end.start(prepared)
                except DeadlineError as error:
                    yield _too_late(prepared, str(error))
                else:
                    under_way[prepared.request_id] = _Collected(prepared)
                    num_samples += prepared.params.n
            if not under_way and taken is None and exhausted:
                return
            deltas = [delta for message in client.receive() for delta in front_end.handle(message)]
            deltas += front_end.expire()
            on_tokens(sum(len(delta.token_ids) for delta in deltas))
            for delta in deltas:
                if delta.cause is Cause.ENGINE:
                    under_way.clear()
                    raise EngineDeadError(f"the engine has ended: {delta.error}")
                completion = under_way[delta.request_id].add(delta)
                if completion is not None:
                    num_samples -= under_way.pop(delta.request_id).num_samples
                    yield completion
    finally:
        for request_id in under_way:
            front_end.abort(request_id)


def _too_late(prepared: Prepared, error: str) -> FinishedRequest:
    sample = FinishedSample((), "", FinishReason.DEADLINE, error)
    return FinishedRequest(prepared.request_id, prepared.prompt_token_ids, (sample,) * prepared.params.n)


class _Terminal:
    """Wraps standard error for a progress bar and ignores its errors: an unwritable bar stops no run."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class TokenBar:
    """Shows a progress bar over requests, with output tokens per second.

    Args:
        total: number of requests, None when unknown.
        done: requests of an earlier run, which the bar starts with.
    """

    def __init__(self, total: int | None, done: int = 0, *, unit: str = "prompt", enabled: bool = True):
        self._bar = tqdm.tqdm(
            total=total,
            initial=done,
            unit=unit,
            desc="Generating",
            dynamic_ncols=True,
            disable=not enabled,
            file=_Terminal(sys.stderr),
        )
        self._start = time.perf_counter()
        self._output_tokens = 0
        self._prompt_tokens = 0

    def add_tokens(self, count: int) -> None:
        """Counts output tokens of unfinished and finished requests alike."""
        self._output_tokens += count
        self._bar.update(0)

    def add_request(self, prompt_tokens: int = 0) -> None:
        """Counts a finished request."""
        self._prompt_tokens += prompt_tokens
        self._bar.set_postfix_str(self.speed, refresh=False)
        self._bar.update(1)

    @property
    def speed(self) -> str:
        """Formats tokens per second since the bar was created."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return f"in {self._prompt_tokens / seconds:.0f} tok/s, out {self._output_tokens / seconds:.0f} tok/s"

    def close(self) -> None:
        self._bar.close()
