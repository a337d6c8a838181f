"""An engine whose answers can be worked out by hand: it repeats the prompt (without <bos>), a token a step, then ends.

Log-probabilities are those of `fake_logprobs`: that of id i at position p is -p - i / 256.

Tests hold it still with `pause` and let it take single steps, so nothing depends on how long anything takes.
"""

from __future__ import annotations

import dataclasses
import pathlib
import threading
from collections.abc import Sequence

import numpy as np

from jaxserve.engine.messages import (
    AbortRequest,
    AddRequest,
    CacheEvents,
    CaptureProfile,
    CaptureTimeline,
    EngineFailed,
    EngineOutput,
    EngineReady,
    EngineStats,
    FlushPrefixCache,
    FollowCacheEvents,
    FromEngine,
    Logprobs,
    PrefixCacheFlushed,
    ProfileCaptured,
    Progress,
    Shutdown,
    TimelineEvents,
    ToEngine,
)
from jaxserve.kv_cache.event_log import CacheEvent
from jaxserve.models.tiny.tiny_tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, build_tokenizer
from jaxserve.request import EngineRequest, FinishReason, Pooling
from jaxserve.runner.fake import fake_logprobs
from tests.engine_ready import engine_ready

WAIT_SECONDS = 60.0

EMBEDDING_SIZE = 160
FLUSHED_PAGES = 3
"""Pages that become free whenever the prefix cache is flushed."""

READY = engine_ready(
    vocab_size=VOCAB_SIZE,
    max_model_len=512,
    eos_token_ids=(EOS_ID,),
    usable_pages=16,
    max_num_seqs=8,
    max_num_waiting=32,
    num_parameters=1234,
    architecture="EchoForCausalLM",
    num_executables=7,
    compile_seconds=1.5,
    start_seconds=2.5,
    embedding_size=EMBEDDING_SIZE,
)
"""A context of 512 tokens and a pool of 256: some prompts fit one and not the other."""


def save_tokenizer(directory: pathlib.Path) -> pathlib.Path:
    """The tiny model's tokenizer as a checkpoint directory; <bos> stands before every text."""
    build_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def pooled(request: EngineRequest) -> bytes:
    """The pooled hidden state that the echo engine gives: how often each of the first EMBEDDING_SIZE ids occurs, and in
    the last place a number for the kind of pooling.
    """
    counts = np.bincount(np.minimum(request.prompt_token_ids, EMBEDDING_SIZE - 1), minlength=EMBEDDING_SIZE)
    values = counts.astype(np.float64)
    assert request.pooling is not None
    values[-1] = 1 + list(Pooling).index(request.pooling)
    return values.tobytes()


@dataclasses.dataclass
class _Running:
    """A sample; that of index i begins i tokens further on."""

    request: EngineRequest
    index: int = 0
    produced: int = 0

    def next_token(self) -> int:
        answer = [token_id for token_id in self.request.prompt_token_ids if token_id != BOS_ID]
        answer.append(EOS_ID)
        return answer[(self.index + self.produced) % len(answer)]

    def logprobs(self, token_id: int) -> tuple[Logprobs | None, Logprobs | None]:
        """Those of the token just produced, and with the first one those of the prompt."""
        request, prompt, start = self.request, None, self.request.prompt_logprobs_start
        if request.prompt_logprobs is not None and self.produced == 1 and len(request.prompt_token_ids) > start:
            tokens = list(enumerate(request.prompt_token_ids))[start:]
            prompt = Logprobs.of(fake_logprobs(tokens, request.prompt_logprobs))
        if request.logprobs is None:
            return None, prompt
        position = len(request.prompt_token_ids) + self.produced - 1
        return Logprobs.of(fake_logprobs([(position, token_id)], request.logprobs)), prompt


class EchoEngine:
    """EngineClient. `requests`, `aborted` and `followed` (numbers of FollowCacheEvents) are what it was sent, in order.

    state: what it says of its progress: "healthy", "stuck" in a step, or "silent". problem: what `close` returns.
    """

    def __init__(self, ready: EngineReady = READY):
        self.ready = ready
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.closed = False
        self._changed = threading.Condition()
        self._running: dict[str, _Running] = {}
        self._outbox: list[FromEngine] = []
        self._steps: int | None = None
        self._generated = 0
        self._beat = 0
        self.followed: list[int] = []
        self.state = "healthy"
        self.killed = False
        self.problem = ""

    @property
    def unsent_bytes(self) -> int:
        return 0

    def progress(self) -> Progress:
        self._beat += self.state != "silent"
        return Progress(self._beat, 0, self.state == "stuck")

    def kill(self) -> None:
        self.killed = True
        self.send(Shutdown())

    def send(self, message: ToEngine) -> None:
        with self._changed:
            match message:
                case AddRequest(request, sample_ids):
                    self.requests.append(request)
                    for index, name in enumerate((request.request_id, *sample_ids)):
                        self._running[name] = _Running(request, index)
                case AbortRequest(request_id):
                    self.aborted.append(request_id)
                    if self._running.pop(request_id, None) is not None:
                        self._outbox.append(EngineOutput(request_id, (), FinishReason.ABORT))
                case CaptureTimeline(on):
                    self._outbox.append(TimelineEvents((), last=not on))
                case CaptureProfile(directory):
                    (pathlib.Path(directory) / "echo.txt").write_text("profile")
                    self._outbox.append(ProfileCaptured(directory))
                case FlushPrefixCache(number):
                    self._outbox.append(PrefixCacheFlushed(number, FLUSHED_PAGES))
                case FollowCacheEvents(number):
                    self.followed.append(number)
                case Shutdown():
                    self.closed = True
            self._changed.notify_all()

    def receive(self) -> Sequence[FromEngine]:
        with self._changed:
            self._changed.wait_for(lambda: self._outbox or self.closed or self._may_step())
            if self._may_step() and not self.closed:
                self._step()
            messages, self._outbox = self._outbox, []
            return messages

    def close(self, seconds: float = 0.0) -> str:
        self.send(Shutdown())
        return self.problem

    def pause(self) -> None:
        """No further step is taken until `allow` or `resume`."""
        with self._changed:
            self._steps = 0

    def allow(self, steps: int) -> None:
        """That many more steps may be taken."""
        with self._changed:
            self._steps = (self._steps or 0) + steps
            self._changed.notify_all()

    def resume(self) -> None:
        """Steps follow one another freely again."""
        with self._changed:
            self._steps = None
            self._changed.notify_all()

    def fail_request(self, request_id: str, error: str) -> None:
        """Ends one request as the engine would when its row cannot be computed."""
        self._emit(EngineOutput(request_id, (), FinishReason.ERROR, error), request_id)

    def finish_request(self, request_id: str, reason: FinishReason) -> None:
        """Ends one request of the engine's own accord."""
        self._emit(EngineOutput(request_id, (), reason), request_id)

    def die(self, error: str) -> None:
        """The engine is gone, with every request."""
        self._emit(EngineFailed(error), *self._running)

    def tell(self, *events: CacheEvent) -> None:
        """Sends events of the prefix cache to those who follow it."""
        self._emit(CacheEvents(self.followed[-1], events))

    def wait_for_followers(self, count: int) -> None:
        """Returns when its prefix cache has been followed, or left, so many times."""
        self._wait(lambda: len(self.followed) >= count)

    def wait_for_requests(self, count: int) -> None:
        """Returns when so many requests have arrived."""
        self._wait(lambda: len(self.requests) >= count)

    def wait_for_abort(self, request_id: str) -> None:
        """Returns when the abort of this request has arrived."""
        self._wait(lambda: request_id in self.aborted)

    def wait_until_gone(self, request_id: str) -> None:
        """Returns when this request has finished or was aborted."""
        self._wait(lambda: request_id not in self._running)

    def _wait(self, condition) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_SECONDS), "the engine was not sent what the test waits for"

    def _emit(self, message: FromEngine, *request_ids: str) -> None:
        with self._changed:
            for request_id in request_ids:
                self._running.pop(request_id, None)
            self._outbox.append(message)
            self._changed.notify_all()

    def _may_step(self) -> bool:
        return bool(self._running) and self._steps != 0

    def _step(self) -> None:
        """One token for every running request."""
        if self._steps is not None:
            self._steps -= 1
        for request_id, running in list(self._running.items()):
            token_id = running.next_token()
            running.produced += 1
            if running.request.pooling is not None:
                del self._running[request_id]
                self._changed.notify_all()
                self._outbox.append(EngineOutput(request_id, (), FinishReason.STOP, pooled=pooled(running.request)))
                continue
            reason = None
            if token_id in running.request.stop_token_ids:
                reason = FinishReason.STOP
            elif running.produced >= running.request.max_tokens:
                reason = FinishReason.LENGTH
            if reason is not None:
                del self._running[request_id]
                self._changed.notify_all()
            self._generated += 1
            logprobs = running.logprobs(token_id)
            self._outbox.append(EngineOutput(request_id, (token_id,), reason, "", 1, 0.0, None, None, *logprobs))
        self._outbox.append(EngineStats(num_running=len(self._running), generation_tokens=self._generated))
