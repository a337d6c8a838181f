"""Checks grammars in a process: `python -m jaxserve.frontend.grammar_worker FD`, see `GrammarChecker`.

When the front end dies, it reads the end of the stream and ends too; while it works, its own timer ends it.
"""

from __future__ import annotations

import json
import pathlib
import queue
import resource
import signal
import socket
import sys
import threading
import time
from typing import Any

import llguidance
import numpy as np

from jaxserve.config.structured_outputs_config import StructuredOutputsConfig
from jaxserve.engine.constraints.limits import first_line, parser_limits
from jaxserve.engine.constraints.vocabulary import Vocabulary, load_vocabulary
from jaxserve.engine.framing import FrameReader, frames
from jaxserve.frontend.grammar_text import grammar_of
from jaxserve.structured_outputs import ReplyStructuredOutputs, StructuredOutputsParams

_FIRST_TOKENS = 3
"""Tokens of an output that a check follows, on two paths."""

_STACK_BYTES = 1024 * 1024
"""Stack of the thread that compiles; it is smaller than that of the engine's threads, which then have enough."""


def serve(connection: socket.socket) -> None:
    """Checks the grammars of the front end at the other end of the socket, until it closes."""
    reader = FrameReader(connection)
    first = reader.read()
    if first is None:
        return
    start = json.loads(first[0])
    try:
        check = _Check(StructuredOutputsConfig(**start["config"]), load_vocabulary(start["directory"]))
    except ValueError as error:
        connection.sendall(frames([json.dumps({"error": str(error)}).encode()]))
        return
    connection.sendall(frames([b"{}"]))
    while (payloads := reader.read()) is not None:
        for payload in payloads:
            connection.sendall(frames([json.dumps(check(json.loads(payload))).encode()]))


class _Check:
    """Checks grammars within a budget that starts at construction."""

    def __init__(self, config: StructuredOutputsConfig, vocabulary: Vocabulary):
        self._config = config
        self._vocabulary = vocabulary
        self._asked: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.stack_size(_STACK_BYTES)
        threading.Thread(target=self._run, daemon=True).start()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform.startswith("linux"):
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + (config.max_grammar_memory << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)

    def __call__(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Returns the response: the grammar, or an error. The process ends when its time is over."""
        signal.setitimer(signal.ITIMER_VIRTUAL, self._config.max_grammar_seconds)
        try:
            self._asked.put(fields)
            return self._answers.get()
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _run(self) -> None:
        while True:
            fields = self._asked.get()
            params = ReplyStructuredOutputs(**fields)
            try:
                answer = {"grammar": self._checked(params)}
            except ValueError as error:
                answer = {"error": f"{params.where}{str(error).removeprefix(params.kind)}"}
            except RecursionError:
                answer = {"error": f"{params.where} is nested too deep: make it flatter"}
            except MemoryError:
                memory = self._config.max_grammar_memory
                answer = {"error": f"{params.where} needs more than {memory} MiB of memory (max_grammar_memory)"}
            self._answers.put(answer)

    def _checked(self, params: StructuredOutputsParams) -> str:
        """Returns the grammar, compiled once as the engine compiles it. Raises ValueError, one line that begins with
        the field of `params`."""
        vocabulary, began = self._vocabulary, time.process_time()
        grammar = grammar_of(params, vocabulary.special, self._config.max_grammar_depth)
        matcher = llguidance.LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=parser_limits())
        for path in (0, -1):
            if error := self._error(matcher.deep_copy(), path):
                raise ValueError(f"{params.kind} is refused: {first_line(error)}")
        if (seconds := time.process_time() - began) > (most := self._config.max_grammar_seconds):
            raise ValueError(
                f"{params.kind} needs {seconds:.2f} s to be compiled; its budget is {most:g} s (max_grammar_seconds)"
            )
        return grammar

    def _error(self, matcher: llguidance.LLMatcher, path: int) -> str:
        """Returns the error of a matcher, or of the first tokens of an output: some grammars grow with the first token
        alone. path: index of the token that is taken, among those that may follow.
        """
        vocabulary = self._vocabulary
        mask = np.empty(vocabulary.words, np.uint32)
        for _ in range(_FIRST_TOKENS):
            if matcher.is_error():
                break
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: vocabulary.end_id])
            if not len(allowed) or matcher.is_error():
                break
            matcher.consume_token(int(allowed[path]))
        return matcher.get_error() if matcher.is_error() else ""


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the front end decides when to end
        signal.signal(ignored, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))
