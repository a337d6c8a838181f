"""Turns what a step changed into messages for the front end, and records it."""

from __future__ import annotations

from collections.abc import Callable

from jaxserve.engine.messages import EngineOutput, FromEngine, Logprobs, TokenBatch
from jaxserve.request import FinishReason
from jaxserve.scheduler import SequenceUpdate, StepUpdate
from jaxserve.telemetry.engine_events import EngineEvents
from jaxserve.telemetry.engine_meter import EngineMeter


class OutputMessages:
    """Makes the messages about requests' tokens and ends.

    Args:
        events: the recorder of what happens.
        meter: knows how long a request waited and was prefilled.
        forget: is called with the id of each request that has ended.

    Attributes:
        prompt_tokens: of all requests that got their first token so far.
        generation_tokens: drawn so far.
    """

    def __init__(self, events: EngineEvents, meter: EngineMeter, forget: Callable[[str], None]):
        self._events = events
        self._meter = meter
        self._forget = forget
        self.prompt_tokens = 0
        self.generation_tokens = 0

    def of_step(self, update: StepUpdate, now: float) -> list[FromEngine]:
        """Returns the messages of a step's update and records its events."""
        messages: list[FromEngine] = []
        self._events.gaps_exceeded(update.gaps, now)
        request_ids = update.request_ids
        if request_ids:
            messages.append(TokenBatch(request_ids, tuple(update.token_ids), now))
        if (scored := update.scored) is not None:
            logprobs = Logprobs.of(scored.logprobs)
            messages.append(TokenBatch(scored.request_ids, tuple(scored.token_ids), now, logprobs))
            request_ids += scored.request_ids
        if update.others:
            request_ids += tuple(other.sequence.request_id for other in update.others for _ in other.token_ids)
        if request_ids:
            self.generation_tokens += len(request_ids)
            self._events.tokens(request_ids, now)
        messages += [self.of_request(other, now) for other in update.others]
        return messages

    def of_request(self, update: SequenceUpdate, now: float) -> EngineOutput:
        """Returns the message of one request's update and records its events."""
        sequence, phases, pooled = update.sequence, (None, None), b""
        if sequence.pooled is not None and update.finish_reason is FinishReason.STOP:
            pooled = sequence.pooled.vector(sequence.num_prompt_tokens).tobytes()
            self.prompt_tokens += sequence.num_prompt_tokens
            phases = self._meter.phases(sequence.request_id, now)
        if update.token_ids and len(sequence.output_token_ids) == len(update.token_ids):
            if sequence.prompt is None or not sequence.prompt.counted:
                self.prompt_tokens += sequence.num_prompt_tokens
            if sequence.prompt is not None:
                sequence.prompt.counted = True
            self._events.first_token(sequence, now)
            phases = self._meter.phases(sequence.request_id, now)
        if update.finish_reason is not None:
            self._events.finished(sequence, update.finish_reason, now)
            self._forget(sequence.request_id)
        cached = sequence.num_cached_tokens
        logprobs = Logprobs.of(update.logprobs), Logprobs.of(update.prompt_logprobs)
        return EngineOutput(
            sequence.request_id,
            update.token_ids,
            update.finish_reason,
            update.error,
            cached,
            now,
            *phases,
            *logprobs,
            pooled=pooled,
        )
