"""An engine that a test plays by hand, and one that answers by a rule; no model, no jax."""

import threading
from collections import deque

from jaxserve.engine.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineOutput,
    EngineStats,
    Progress,
    Shutdown,
)
from jaxserve.request import FinishReason, RequestOptions
from tests.engine_ready import changed, engine_ready

READY = engine_ready(
    vocab_size=300, max_model_len=64, eos_token_ids=(2,), usable_pages=3, max_num_seqs=2, max_num_waiting=2
)
"""Context 64, a pool of 48 tokens, four unfinished requests at most."""


def asked(request_id=None, **options):
    """What `submit` takes beside prompt and parameters, of one flat list of names."""
    return {"request_id": request_id, "options": RequestOptions(**options)}


class HealthyEngine:
    """What the watchdog asks of an engine, answered as one that is never stuck does."""

    unsent_bytes = 0
    _beat = 0

    def progress(self):
        self._beat += 1
        return Progress(self._beat, 0, False)

    def kill(self):
        pass


class HandPlayedEngine(HealthyEngine):
    """Records what is sent; `receive` blocks until the test `play`s messages. Works from several threads."""

    def __init__(self, **ready):
        self.ready = changed(READY, **ready)
        self.sent = []
        self.closed = False
        self.send_error = None
        self._messages = deque()
        self._changed = threading.Condition()

    def send(self, message):
        if self.send_error is not None:
            raise self.send_error
        with self._changed:
            self.sent.append(message)
            self._changed.notify_all()

    def play(self, *messages):
        with self._changed:
            self._messages.append(list(messages))
            self._changed.notify_all()

    def receive(self):
        with self._changed:
            self._changed.wait_for(lambda: self._messages or self.closed)
            return self._messages.popleft() if self._messages else [EngineFailed("closed")]

    def close(self, seconds=0.0):
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        return ""

    @property
    def requests(self):
        """The requests that were added, by id."""
        return {message.request.request_id: message.request for message in self.sent if isinstance(message, AddRequest)}

    @property
    def aborted(self):
        return [message.request_id for message in self.sent if isinstance(message, AbortRequest)]


class RuleEngine(HealthyEngine):
    """An inline engine: each `receive` is a step that gives every running request its next token.

    The rule: the output is the prompt without its <bos> (id 1), one token a step, then the eos id 2. A prompt that
    holds token 0 fails in its first step. Sample i of a request begins i tokens further on. At most max_num_seqs
    requests run at once, in order of arrival.
    on_step: called before each step with its number (from 1); may raise.
    """

    def __init__(self, on_step=None, **ready):
        self.ready = changed(READY, max_model_len=512, usable_pages=64, **ready)
        self.requests = []  # every request that was ever added
        self.max_unfinished = 0
        self.closed = False
        self.dead = ""
        self._on_step = on_step
        self._steps = 0
        self._live = {}  # id -> [id, request, tokens given, index]
        self._out = []

    def send(self, message):
        assert not self.closed
        match message:
            case AddRequest(request, sample_ids):
                self.requests.append(request)
                for index, name in enumerate((request.request_id, *sample_ids)):
                    assert name not in self._live
                    self._live[name] = [name, request, 0, index]
                self.max_unfinished = max(self.max_unfinished, len(self._live))
            case AbortRequest(request_id):
                if self._live.pop(request_id, None) is not None:
                    self._out.append(EngineOutput(request_id, (), FinishReason.ABORT, "aborted"))
            case Shutdown():
                self.close()

    def receive(self):
        assert not self.closed
        if self.dead:
            return [EngineFailed(self.dead)]
        out, self._out = self._out, []
        if self._live:
            self._steps += 1
            if self._on_step is not None:
                self._on_step(self._steps)
            if self.dead:
                return [EngineFailed(self.dead)]
            running = list(self._live.values())[: self.ready.max_num_seqs]
            out += [self._step(entry) for entry in running]
            out.append(EngineStats(num_running=len(running), num_steps=self._steps))
        return out

    def _step(self, entry):
        name, request, given, index = entry
        answer = [token_id for token_id in request.prompt_token_ids if token_id != 1] + [2]
        if 0 in answer:
            del self._live[name]
            return EngineOutput(name, (), FinishReason.ERROR, "logits are not finite")
        token_id = answer[index + given] if index + given < len(answer) else 2
        entry[2] = given + 1
        reason = None
        if token_id in request.stop_token_ids and given + 1 > request.min_tokens:
            reason = FinishReason.STOP
        elif given + 1 == request.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            del self._live[name]
        return EngineOutput(name, (token_id,), reason)

    def close(self, seconds=0.0):
        self.closed = True
        return ""
