"""Encodes long texts in a process of its own, of low priority, which starts with the first of them.

A thread of the front end that encodes for seconds competes with the threads that read and write streams: for the
interpreter lock now and then, and always for a processor, where a thread cannot be given a lower priority without
delaying whoever waits for a lock that it holds. A process can.
"""

from __future__ import annotations

import array
import logging
import threading

import tokenizers

from jaxserve.frontend.worker_process import WorkerProcess

LONG_TEXT = 256 * 1024
"""Length in characters above which a text is long."""

_SECONDS = 120.0
"""Time in which a piece of a text must be encoded, or the process start."""

_log = logging.getLogger(__name__)


class EncoderProcess:
    """Encodes as a tokenizer's backend does, one piece after another. Thread-safe."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self._lock = threading.Lock()
        self._worker: WorkerProcess | None = None
        self._unusable = False

    def encode(self, text: str, add_special_tokens: bool) -> list[int] | None:
        """Returns the token ids of a text without lone surrogates; None where the process does not answer, which the
        log tells."""
        with self._lock:
            worker = self._running()
            if worker is None:
                return None
            answer = worker.ask_bytes(bytes([add_special_tokens]) + text.encode(), _SECONDS)
            if answer is not None:
                return array.array("i", answer).tolist()
            _log.warning("a long text is encoded here: %s", worker.fault or f"no answer within {_SECONDS:g} s")
            worker.end()
            self._worker = None
            return None

    def _running(self) -> WorkerProcess | None:
        """Returns the process, and starts it where there is none; None where that fails, now and from then on."""
        if self._worker is None and not self._unusable:
            try:
                self._worker = self._started()
            except OSError as error:
                self._unusable = True
                _log.warning("long texts are encoded here: their process does not start: %s", error)
        return self._worker

    def _started(self) -> WorkerProcess:
        """Starts the process. Raises OSError."""
        worker = WorkerProcess("jaxserve.frontend.encoder_worker", "long texts")
        if worker.ask_bytes(self._backend.to_str().encode(), _SECONDS) is None:
            raise ChildProcessError(worker.fault or f"it takes more than {_SECONDS:g} s")
        return worker
