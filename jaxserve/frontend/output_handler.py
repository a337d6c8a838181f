"""Turns what the engine sends into deltas of the open requests, and ends requests before the engine does."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from jaxserve.engine.channel import EngineSender
from jaxserve.engine.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineOutput,
    EngineReady,
    EngineStats,
    FromEngine,
    Progress,
    ToEngine,
    TokenBatch,
)
from jaxserve.frontend.admission import Admission
from jaxserve.frontend.delta import Cause, Delta
from jaxserve.frontend.open_requests import OpenRequest, OpenRequests, OpenSample
from jaxserve.frontend.open_search import OpenSearch
from jaxserve.request import FinishReason, is_of_options
from jaxserve.request_checks import ModelLimits

_log = logging.getLogger(__name__)


class OutputHandler:
    """Follows the open requests from their start to their last delta.

    Args:
        client: the engine, which is told of requests that end here, and of the next requests of beam searches.
        requests: the open requests.
        limits: the engine's limits.
        admission: is told of requests that have ended; None where there is none.
        clock: seconds as `time.time` gives them.

    Attributes:
        stats: latest counts of the engine.
        failure: the engine's last line once it has ended; empty while it runs.
    """

    def __init__(
        self,
        client: EngineSender,
        requests: OpenRequests,
        limits: ModelLimits,
        admission: Admission | None,
        clock: Callable[[], float],
    ):
        self._client = client
        self._requests = requests
        self._limits = limits
        self._admission = admission
        self._clock = clock
        self.stats = EngineStats()
        self.failure = ""

    def expire(self, now: float | None = None) -> list[Delta]:
        """Ends the requests whose deadline has passed, with DEADLINE. now: None is the clock's time."""
        now = self._clock() if now is None else now
        deltas = []
        while (opened := self._requests.pop_expired(now)) is not None:
            error = f"deadline passed after {opened.tokens_so_far} output tokens"
            deltas += self.end_early(opened, FinishReason.DEADLINE, error, Cause.DEADLINE)
        return deltas

    def end_all(self, error: str, cause: Cause = Cause.CLOSING) -> list[Delta]:
        """Ends every open request with ERROR and this line, and returns their last deltas."""
        ends = [self.end_early(opened, FinishReason.ERROR, error, cause) for opened in self._requests.all()]
        return [delta for deltas in ends for delta in deltas]

    def handle(self, message: FromEngine) -> list[Delta]:
        """Returns the deltas that follow from a message of the engine.

        Never raises because of one request's content.
        """
        match message:
            case TokenBatch():
                return self._handle_batch(message)
            case EngineOutput():
                if (opened := self._requests.find_beam(message.request_id)) is not None:
                    return self._handle_beam(opened, message)
                delta = self._handle_output(message)
                return [] if delta is None else [delta]
            case EngineStats():
                self.stats = message
            case EngineFailed():
                self.failure = self.failure or message.error or "the engine failed"
                self._requests.release_all()
                return self.end_all(self.failure, Cause.ENGINE)
            case EngineReady() | Progress():
                pass
        return []

    def _handle_batch(self, message: TokenBatch) -> list[Delta]:
        deltas = []
        logprobs = None if message.logprobs is None else message.logprobs.columns()
        for place, (request_id, token_id) in enumerate(zip(message.request_ids, message.token_ids, strict=True)):
            found = self._opened(request_id)
            if found is None:
                continue
            opened, sample = found
            opened.life.tokens(1, message.time, sample.index)
            if logprobs is not None and sample.logprobs is not None:
                sample.logprobs.add(logprobs.part(place, place + 1), None)
            delta = self._advance(opened, sample, (token_id,), None, "")
            if delta is not None:
                deltas.append(delta)
        return deltas

    def _handle_output(self, message: EngineOutput) -> Delta | None:
        found = self._opened(message.request_id)
        if found is None:
            if message.finish_reason is not None:
                self._requests.release(message.request_id)
            return None
        opened, sample = found
        opened.cached_tokens = max(opened.cached_tokens, message.num_cached_tokens)
        opened.life.tokens(len(message.token_ids), message.time, sample.index)
        if message.queue_seconds is not None and message.prefill_seconds is not None:
            opened.life.phases(message.queue_seconds, message.prefill_seconds)
        if message.pooled and opened.pooling is not None:
            return self._embedded(opened, sample, opened.pooling.embedding(message.pooled, self._limits))
        if sample.logprobs is not None:
            columns = (message.logprobs, message.prompt_logprobs)
            sample.logprobs.add(*(None if one is None else one.columns() for one in columns))
        return self._advance(opened, sample, message.token_ids, message.finish_reason, message.error)

    def _handle_beam(self, opened: OpenRequest, message: EngineOutput) -> list[Delta]:
        """Handles the answer to one request of a beam search, which is its only output. Returns the search's outputs
        when that was the last one."""
        search, reason = opened.search, message.finish_reason
        assert search is not None
        self._requests.remove_beam(message.request_id, released=True)
        if not search.length:
            opened.cached_tokens = message.num_cached_tokens
        if message.queue_seconds is not None and message.prefill_seconds is not None:
            opened.life.phases(message.queue_seconds, message.prefill_seconds)
        if message.logprobs is None or reason not in (FinishReason.STOP, FinishReason.LENGTH):
            search.failed(message.request_id)
            reason = FinishReason.ERROR if reason in (None, FinishReason.STOP, FinishReason.LENGTH) else reason
            error = message.error or f"the engine ended a beam with {reason.value}"
            return self.end_early(opened, reason, error, _cause_of(reason, error))
        self._started(opened)
        if message.prompt_logprobs is not None and (queue := opened.samples[0].logprobs) is not None:
            queue.add(None, message.prompt_logprobs.columns())
        if not search.answer(message.request_id, message.logprobs.columns()):
            return []
        opened.life.tokens(1, message.time)  # a step is a token of the best beam
        if not search.done:
            arrival_time = self._clock() if self._client.ready.due_after_arrival else None
            beams = search.step(self._requests.engine_id, arrival_time)
            self._requests.add_beams(opened, [beam.request_id for beam in beams])
            for beam in beams:
                self._send_if_alive(AddRequest(beam))
            return []
        deltas = []
        for sample, beam in zip(list(opened.samples.values()), search.best(), strict=True):
            if sample.logprobs is not None:
                sample.logprobs.add(beam.logprobs(sample.logprobs.width), None)
            reason = FinishReason.STOP if beam.stopped else FinishReason.LENGTH
            deltas.append(self._advance(opened, sample, beam.token_ids, reason, ""))
        return [delta for delta in deltas if delta is not None]

    def _started(self, opened: OpenRequest) -> None:
        """Tells the admission, once, that a request has its first output."""
        if opened.ticket is not None and opened.ticket.started is None and self._admission is not None:
            self._admission.started(opened.ticket, self._clock())

    def _embedded(self, opened: OpenRequest, sample: OpenSample, embedding: bytes) -> Delta:
        """Ends a request for an embedding with its result."""
        opened.life.embedded()
        if opened.ticket is not None and self._admission is not None:
            self._admission.started(opened.ticket, self._clock())
        self._forget(opened, sample, FinishReason.STOP, told_engine=True)
        delta = self._delta(opened, sample, "", FinishReason.STOP)
        assert delta is not None  # it has a finish reason
        return dataclasses.replace(delta, embedding=embedding)

    def _opened(self, engine_id: str) -> tuple[OpenRequest, OpenSample] | None:
        """Returns the sample an engine message refers to; None for one that has ended here, unknown to the engine."""
        found = self._requests.find_engine(engine_id)
        if found is None and not self._requests.is_ending(engine_id):
            _log.warning("the engine sent output of a request that is not open: %r", engine_id)
        return found

    def _advance(
        self,
        opened: OpenRequest,
        sample: OpenSample,
        token_ids: tuple[int, ...],
        ended: FinishReason | None,
        error: str,
    ) -> Delta | None:
        """Processes the engine's next tokens of one sample.

        ended: set with the last ones; error as in EngineOutput.
        """
        reason, cause = ended, None
        if token_ids:
            self._started(opened)
        try:
            text = sample.output.add(token_ids, reason)
        except Exception:  # one request's text must not stop the others' streams
            _log.exception("output of request %r cannot be turned into text", opened.request_id)
            self._forget(opened, sample, FinishReason.ERROR, told_engine=reason is not None)
            return Delta(
                opened.request_id,
                finish_reason=FinishReason.ERROR,
                error="the output cannot be turned into text; see the server's log",
                cause=Cause.REQUEST,
                prompt_tokens=opened.prompt_tokens,
                output_tokens=sample.output.num_tokens,
                cached_tokens=opened.cached_tokens,
                owner=opened.owner,
                index=sample.index,
                samples_left=len(opened.samples),
            )
        if sample.output.stopped and reason in (None, FinishReason.LENGTH, FinishReason.STOP):
            reason, error = FinishReason.STOP, ""
        if reason in (FinishReason.ABORT, FinishReason.DEADLINE, FinishReason.ERROR):
            cause = _cause_of(reason, error)
            error = error or f"the engine ended the request with {reason.value}"
        if reason is not None:
            self._forget(opened, sample, reason, told_engine=ended is not None)
        return self._delta(opened, sample, text, reason, error, cause)

    def _delta(
        self,
        opened: OpenRequest,
        sample: OpenSample,
        text: str,
        reason: FinishReason | None,
        error: str = "",
        cause: Cause | None = None,
    ) -> Delta | None:
        output, queue = sample.output, sample.logprobs
        token_ids = output.take_token_ids()
        if reason is None:
            opened.life.charged(output.num_tokens, sample.index)
            if not token_ids and not text and (queue is None or not queue.has_prompt):
                return None
        return Delta(
            request_id=opened.request_id,
            token_ids=token_ids,
            text=text,
            finish_reason=reason,
            error=error,
            cause=cause,
            stop_string=output.stop_string if reason is FinishReason.STOP else None,
            prompt_tokens=opened.prompt_tokens,
            output_tokens=output.num_tokens,
            cached_tokens=opened.cached_tokens,
            owner=opened.owner,
            index=sample.index,
            samples_left=len(opened.samples),
            truncated_tokens=opened.truncated_tokens,
            logprobs=None if queue is None else queue.take(len(token_ids)),
            prompt_logprobs=None if queue is None else queue.take_prompt(),
        )

    def end_early(self, opened: OpenRequest, reason: FinishReason, error: str, cause: Cause) -> list[Delta]:
        """Ends every sample of a request: the last ones first, which wait for the first to compute the prompt."""
        deltas, told_engine = [], bool(self.failure)
        texts: dict[int, str] = {}
        if opened.search is not None:
            texts = self._abandon(opened, opened.search)
            told_engine = True  # which knows the beams alone
        for sample in reversed(list(opened.samples.values())):
            text = texts.get(sample.index, "") + sample.output.finish()
            self._forget(opened, sample, reason, told_engine=told_engine)
            delta = self._delta(opened, sample, text, reason, error, cause)
            assert delta is not None  # it has a finish reason
            deltas.append(delta)
        return deltas

    def _abandon(self, opened: OpenRequest, search: OpenSearch) -> dict[int, str]:
        """Ends the beams of a search, whose samples become the likeliest ones so far; returns the texts of these."""
        for engine_id in search.in_flight:
            self._requests.remove_beam(engine_id, released=bool(self.failure))
            if not self.failure:
                self._send_if_alive(AbortRequest(engine_id))
        texts = {}
        for sample, beam in zip(opened.samples.values(), search.best(), strict=False):
            if sample.logprobs is not None:
                sample.logprobs.add(beam.logprobs(sample.logprobs.width), None)
            try:
                texts[sample.index] = sample.output.add(beam.token_ids, None)
            except Exception:  # as in `_advance`
                _log.exception("output of request %r cannot be turned into text", opened.request_id)
        return texts

    def _forget(self, opened: OpenRequest, sample: OpenSample, reason: FinishReason, *, told_engine: bool) -> None:
        """Closes a sample, and with its last one the request, which ends with `reason`.

        reason: why it ended. told_engine: the engine has ended it too; else an abort is sent, and its outputs until
        then are ignored.
        """
        self._requests.remove(opened, sample, released=told_engine)
        opened.output_tokens += sample.output.num_tokens
        opened.life.charged(sample.output.num_tokens, sample.index)
        if not opened.samples:
            if opened.ticket is not None and self._admission is not None:
                generates = opened.pooling is None
                self._admission.ended(opened.ticket, opened.output_tokens, self._clock(), reason, generates=generates)
            opened.life.finish(reason, opened.output_tokens, opened.cached_tokens)
        if not told_engine:
            self._send_if_alive(AbortRequest(sample.engine_id))

    def _send_if_alive(self, message: ToEngine) -> None:
        try:
            self._client.send(message)
        except OSError:
            # The engine is gone; `receive` says so, with the reason, and that ends every request.
            _log.debug("the engine cannot be reached", exc_info=True)


def _cause_of(reason: FinishReason, error: str) -> Cause:
    """Returns why the engine has ended a request that did not come to its end. error: the engine's line."""
    if reason is FinishReason.DEADLINE:
        return Cause.DEADLINE
    return Cause.OPTIONS if is_of_options(error) else Cause.REQUEST
