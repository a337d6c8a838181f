"""Translates requests to engine messages and engine messages to deltas, without input or output of its own.

`LLM` drives it in the caller's thread, `AsyncFrontEnd` on an event loop. Nothing here blocks, waits or starts threads.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence, Set

from jaxserve.config.failpoints import Failpoints
from jaxserve.config.shown import shown_seconds
from jaxserve.config.structured_outputs_config import StructuredOutputsConfig
from jaxserve.engine.channel import EngineSender
from jaxserve.engine.messages import (
    AddRequest,
    EngineReady,
    EngineStats,
    FromEngine,
)
from jaxserve.frontend.admission import Admission
from jaxserve.frontend.beams import stop_tokens
from jaxserve.frontend.delta import (
    Cause,
    DeadlineError,
    Delta,
    DuplicateRequestError,
    EngineDeadError,
    QueueFullError,
)
from jaxserve.frontend.logprob_queue import LogprobQueue
from jaxserve.frontend.open_requests import OpenRequest, OpenRequests, OpenSample
from jaxserve.frontend.open_search import OpenSearch
from jaxserve.frontend.output import FaultyOutput, OutputState
from jaxserve.frontend.output_handler import OutputHandler
from jaxserve.frontend.preparation import Preparation, Prepared
from jaxserve.frontend.preparation_steps import finish
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.pooling_params import PoolingParams
from jaxserve.request import EngineRequest, FinishReason, RequestOptions
from jaxserve.request_checks import check_samples
from jaxserve.sampling_params import ROW_FIELDS, SAMPLING_FIELDS, SamplingParams
from jaxserve.telemetry.request_meter import RequestMeter
from jaxserve.telemetry.request_trace import RequestTrace

_log = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 64 * 1024 * 1024
"""Maximum bytes of requests that wait for an engine's process to read them; a stopped process reads none."""


class FrontEnd:
    """Tracks every unfinished request of one engine. Not thread-safe, except `prepare`.

    Args:
        tokenizer: None serves token ids only: text prompts and stop strings are then refused.
        seed: base of the seeds drawn for requests that set none (the same requests in the same order then draw the same
            seeds); None draws them from the operating system's randomness.
        clock: seconds as `time.time` gives them, which deadlines are compared with.
        failpoints: as `EngineConfig.failpoints`; only those at "detokenize" count here.
        admission: decides which requests are let in; None bounds their number alone.
        metrics: what requests are counted in; None counts nothing.
        grammars: bounds the grammars of structured outputs.
    """

    def __init__(
        self,
        client: EngineSender,
        tokenizer: Tokenizer | None,
        *,
        seed: int | None = None,
        clock: Callable[[], float] = time.time,
        failpoints: Sequence[str] = (),
        admission: Admission | None = None,
        metrics: RequestMeter | None = None,
        grammars: StructuredOutputsConfig = StructuredOutputsConfig(),
    ):
        self._client = client
        self._metrics = metrics
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._clock = clock
        self._admission = admission
        ready = client.ready
        self._limits = ready.limits
        self._preparation = Preparation(tokenizer, ready.limits, grammars)
        self._max_open = ready.max_num_waiting + ready.max_num_seqs
        self._requests = OpenRequests()
        self._outputs = OutputHandler(client, self._requests, self._limits, admission, clock)
        self._detokenize_hit = Failpoints(failpoints).at("detokenize")

    @property
    def ready(self) -> EngineReady:
        """Ready message of the engine."""
        return self._client.ready

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    @property
    def stats(self) -> EngineStats:
        """Latest counts of the engine."""
        return self._outputs.stats

    @property
    def failure(self) -> str:
        """The engine's last line once it has ended; empty while it runs."""
        return self._outputs.failure

    @property
    def num_open(self) -> int:
        """Number of requests without their last delta."""
        return len(self._requests)

    @property
    def has_room(self) -> bool:
        """Returns whether another request would be accepted now. Requests that the engine has yet to release count."""
        return self.has_room_for(1)

    def has_room_for(self, samples: int) -> bool:
        """Returns whether a request of so many samples would be accepted now."""
        return self._requests.num_unreleased + samples <= self._max_open

    @property
    def next_deadline(self) -> float | None:
        """Time at which `expire` next has something to do."""
        return self._requests.next_deadline

    def now(self) -> float:
        """Returns the time that deadlines are compared with, in seconds of `time.time`."""
        return self._clock()

    # ---- requests ------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | PoolingParams,
        options: RequestOptions = RequestOptions(),
        *,
        request_id: str | None = None,
        owner: str = "",
    ) -> str:
        """Tokenizes, validates and sends a request; returns its id (a new one when request_id is None).

        params.seed None draws a seed. owner: whose request it is; owners may use the same ids without noticing one
        another. Nothing is sent when an error is raised.

        Raises:
            ValueError: the request can never be valid.
            InfeasibleError: the request can never be served on this server.
            DuplicateRequestError: an unfinished request of the owner has this id.
            QueueFullError: too many requests are unfinished, or a limit of the tenant is reached.
            DeadlineError: the deadline has already passed, or is out of reach.
            EngineDeadError: the engine has ended.
        """
        self.check_accepting(params, options)
        self.check_new(request_id, options.deadline, owner)
        return self.start(self.prepare(prompt, params, options, request_id=request_id), owner)

    def prepare(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | PoolingParams,
        options: RequestOptions = RequestOptions(),
        *,
        request_id: str | None = None,
        shown_token_ids: Set[int] = frozenset(),
    ) -> Prepared:
        """Runs the part of `submit` that depends on the request alone; may run in any thread. Raises ValueError.

        shown_token_ids: special tokens that the text shows.
        """
        return finish(self._preparation.steps(prompt, params, options, request_id, shown_token_ids))

    @property
    def preparation(self) -> Preparation:
        """Steps of `prepare`."""
        return self._preparation

    def check_accepting(
        self, params: SamplingParams | PoolingParams, options: RequestOptions, prompt_tokens: int = 1
    ) -> None:
        """Raises QueueFullError, DeadlineError or EngineDeadError where `start` would, before a prompt is tokenized in
        vain, and ValueError for more samples than may ever be asked for.

        Args:
            params: of the request.
            options: of the request.
            prompt_tokens: tokens of the prompt, at least.
        """
        if self._outputs.failure:
            raise EngineDeadError(f"the engine has ended: {self._outputs.failure}")
        if isinstance(params, SamplingParams):
            check_samples(params, self._limits)
        if self._admission is not None:
            self._admission.check(
                options.tenant,
                prompt_tokens,
                params.max_tokens,
                self._clock(),
                deadline=options.deadline,
                ending=self._requests.num_ending,
                samples=params.n,
            )
        elif not self.has_room_for(params.n):
            raise QueueFullError(
                f"{self._requests.num_unreleased} requests are unfinished; at most {self._max_open} "
                f"(max_num_seqs + max_num_waiting) are allowed{_with_samples(params.n)}: try again later"
            )
        if self._client.unsent_bytes > MAX_UNSENT_BYTES:
            raise QueueFullError(
                f"{self._client.unsent_bytes} bytes of requests wait for the engine to take them; at most "
                f"{MAX_UNSENT_BYTES} may: try again later"
            )

    def check_new(self, request_id: str | None, deadline: float | None, owner: str = "") -> None:
        """Raises DuplicateRequestError or DeadlineError where `start` would, before a prompt is tokenized in vain.

        Invalid ids are left to `prepare`.
        """
        if isinstance(request_id, str) and self._requests.find(owner, request_id) is not None:
            raise DuplicateRequestError(f"request_id {request_id!r} belongs to an unfinished request; choose another")
        if deadline is not None and deadline <= (now := self._clock()):
            raise DeadlineError(f"deadline passed {shown_seconds(now - deadline)} before the request arrived")

    def start(
        self, prepared: Prepared, owner: str = "", arrived: float | None = None, trace: RequestTrace | None = None
    ) -> str:
        """Sends a prepared request to the engine and returns its id. Raises as `submit` does, but for ValueError.

        owner: whose request it is. arrived: of the metrics' clock; None is now. trace: the request's place in a trace.
        """
        request_id, params, options = prepared.request_id, prepared.params, prepared.options
        self.check_accepting(params, options, len(prepared.prompt_token_ids))
        deadline = options.deadline
        self.check_new(request_id, deadline, owner)
        now = self._clock()
        stop_token_ids = stop_tokens(params, self._limits)
        resolved = {name: SAMPLING_FIELDS[name].resolved(getattr(params, name)) for name in ROW_FIELDS}
        resolved["stop_token_ids"] = stop_token_ids
        if params.seed is None:
            resolved["seed"] = self._random.getrandbits(63)
        engine_ids = self._requests.engine_ids(request_id, params.n)
        request = EngineRequest(
            request_id=engine_ids[0],
            prompt_token_ids=prepared.prompt_token_ids,
            max_tokens=prepared.max_tokens,
            min_tokens=params.min_tokens,
            **resolved,
            options=prepared.options,
            arrival_time=now,
            needed_tokens=_needed_tokens(prepared, stop_token_ids),
            bad_words_token_ids=prepared.bad_words_token_ids,
            logprobs=self._limits.resolved_logprobs(params.logprobs),
            prompt_logprobs=self._limits.resolved_logprobs(params.prompt_logprobs),
            prompt_logprobs_start=prepared.prompt_logprobs_start,
            grammar=prepared.grammar,
            pooling=None if prepared.pooling is None else prepared.pooling.kind(self._limits),
        )
        search = OpenSearch(params, request, self._limits) if params.use_beam_search else None
        beams = [] if search is None else search.step(self._requests.engine_id)
        samples = {
            index: OpenSample(index, engine_id, self._output(prepared, stop_token_ids), _logprob_queue(request, index))
            for index, engine_id in enumerate(engine_ids)
        }
        num_tokens, ticket = len(request.prompt_token_ids), None
        if self._admission is not None:
            ticket = self._admission.accept(
                options.tenant, num_tokens, params.max_tokens, now, deadline=deadline, samples=params.n
            )
        opened = OpenRequest(owner, request_id, num_tokens, deadline, samples, ticket)
        opened.truncated_tokens = prepared.truncated_tokens
        opened.pooling, opened.search = prepared.pooling, search
        if self._metrics is not None:
            opened.life = self._metrics.begin(request_id, num_tokens, request.max_tokens, arrived, trace, params.n)
        # Before the engine has it: the thread that runs an engine of this process asks whether any request is open.
        self._requests.add(opened)
        self._requests.add_beams(opened, [beam.request_id for beam in beams])
        try:
            for first in beams or [request]:
                self._client.send(AddRequest(first, () if beams else tuple(engine_ids[1:])))
        except OSError as error:
            self._outputs.end_early(opened, FinishReason.ERROR, "the engine cannot be reached", Cause.ENGINE)
            raise EngineDeadError(f"the engine cannot be reached: {error}") from error
        return request_id

    def _output(self, prepared: Prepared, stop_token_ids: tuple[int, ...]) -> OutputState:
        prompt, params, shown, generated = prepared.prompt_token_ids, prepared.params, None, None
        if self._tokenizer is not None and params.detokenize and prepared.pooling is None:
            shown = self._tokenizer.detokenizer(
                prompt,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
                shown_token_ids=prepared.shown_token_ids,
            )
            if params.stop and params.skip_special_tokens:
                generated = self._tokenizer.detokenizer(prompt, skip_special_tokens=False)
        include_stop = params.include_stop_str_in_output
        if (hit := self._detokenize_hit) is not None:
            name = prepared.request_id
            return FaultyOutput(
                shown, generated, params.stop, params.min_tokens, stop_token_ids, include_stop, lambda: hit((name,))
            )
        return OutputState(shown, generated, params.stop, params.min_tokens, stop_token_ids, include_stop)

    def abort(
        self,
        request_id: str,
        error: str = "aborted by the client",
        cause: Cause = Cause.CLIENT,
        *,
        owner: str = "",
    ) -> list[Delta]:
        """Ends a request of the owner and returns the last deltas of its samples; none when there is no such unfinished
        request."""
        opened = self._requests.find(owner, request_id)
        return [] if opened is None else self._outputs.end_early(opened, FinishReason.ABORT, error, cause)

    def expire(self, now: float | None = None) -> list[Delta]:
        """Ends the requests whose deadline has passed, with DEADLINE. now: None is the clock's time."""
        return self._outputs.expire(now)

    def end_all(self, error: str, cause: Cause = Cause.CLOSING) -> list[Delta]:
        """Ends every open request with ERROR and this line, and returns their last deltas."""
        return self._outputs.end_all(error, cause)

    def handle(self, message: FromEngine) -> list[Delta]:
        """Returns the deltas that follow from a message of the engine.

        Never raises because of one request's content.
        """
        return self._outputs.handle(message)


def _with_samples(count: int) -> str:
    """Returns what an error line says of a request of several samples."""
    return f", and this one has {count} samples" if count > 1 else ""


def _logprob_queue(request: EngineRequest, index: int) -> LogprobQueue | None:
    """Returns what keeps the log-probabilities of a sample; those of the prompt come with the first one."""
    if request.logprobs is None and (index or request.prompt_logprobs is None):
        return None
    return LogprobQueue(request if not index else request.sample(index, request.request_id))


def _needed_tokens(prepared: Prepared, stop_token_ids: tuple[int, ...]) -> int:
    """Returns the output tokens that the request takes at least: all, where neither token nor text can stop it."""
    if prepared.grammar:
        return 1  # it ends where its grammar does
    endless = not stop_token_ids and not prepared.params.stop
    return prepared.max_tokens if endless else max(1, prepared.params.min_tokens)
