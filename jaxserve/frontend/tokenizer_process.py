"""Encodes and decodes long texts in a process of its own, of low priority, which starts with the first of them.

A thread of the front end that encodes for seconds competes with the threads that read and write streams: for the
interpreter lock now and then, and always for a processor, where a thread cannot be given a lower priority without
delaying whoever waits for a lock that it holds. A process can. And the tokenizers library holds the lock while it takes
token ids from a list: 30 ms for a million. Here they pass as bytes, and results return in parts of bounded size.
"""

from __future__ import annotations

import array
import logging
import threading

import tokenizers

from jaxserve.frontend.worker_process import WorkerProcess

LONG_TEXT = 256 * 1024
"""Length in characters above which a text is long."""
LONG_IDS = 64 * 1024
"""Number of token ids above which their text is long."""

CHARACTERS_PER_PART = 64 * 1024
"""Maximum number of characters of a text that are handled at one time, as IDS_PER_PART for token ids."""

ENCODE, DECODE = b"e", b"d"
"""Requests: the text, or the token ids as uint32 in the order of the machine, follow a flag: of special tokens, whether
they are added, or skipped."""

_SECONDS = 120.0
"""Time in which a piece of a text must be encoded, or token ids decoded, or the process start."""

_log = logging.getLogger(__name__)


class TokenizerProcess:
    """Encodes and decodes as a tokenizer's backend does, one call after another. Thread-safe."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self._lock = threading.Lock()
        self._worker: WorkerProcess | None = None
        self._unusable = False

    def encode(self, text: str, add_special_tokens: bool) -> list[list[int]] | None:
        """Returns the token ids of a text without lone surrogates, in parts; None where the process does not answer,
        which the log tells."""
        parts = self._ask(ENCODE, add_special_tokens, text.encode())
        return None if parts is None else [array.array("I", part).tolist() for part in parts]

    def decode(self, token_ids: array.array[int], skip_special_tokens: bool) -> list[str] | None:
        """Returns the text of token ids, of type "I", in parts; None as `encode` does."""
        parts = self._ask(DECODE, skip_special_tokens, token_ids.tobytes())
        return None if parts is None else [part.decode() for part in parts]

    def _ask(self, kind: bytes, special: bool, data: bytes) -> list[bytes] | None:
        with self._lock:
            worker = self._running()
            if worker is None:
                return None
            answer = worker.ask_parts(b"%b%c%b" % (kind, special, data), _SECONDS)
            if answer is not None:
                return answer
            done = "encoded" if kind == ENCODE else "decoded"
            _log.warning("a long text is %s here: %s", done, worker.fault or f"no answer within {_SECONDS:g} s")
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
                _log.warning("long texts are encoded and decoded here: their process does not start: %s", error)
        return self._worker

    def _started(self) -> WorkerProcess:
        """Starts the process. Raises OSError."""
        worker = WorkerProcess("jaxserve.frontend.tokenizer_worker", "long texts")
        if worker.ask_parts(self._backend.to_str().encode(), _SECONDS) is None:
            raise ChildProcessError(worker.fault or f"it takes more than {_SECONDS:g} s")
        return worker
