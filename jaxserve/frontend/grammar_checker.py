"""Checks the grammars of requests within a budget, in processes of their own that are ended when they exceed it.

What a grammar costs to compile cannot be told from its text, and a thread that compiles one cannot be stopped. What
passes here is compiled again in the engine, with the same limits. The processes start with the first grammars.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import threading
from typing import Any

from jaxserve.config.structured_outputs_config import StructuredOutputsConfig
from jaxserve.frontend.worker_process import WorkerProcess
from jaxserve.structured_outputs import StructuredOutputsParams

_START_SECONDS = 60.0
"""Maximum seconds that a process takes to start; it reads the vocabulary."""
_WALL_FACTOR = 10.0
"""Wall-clock seconds per second of CPU time: the machine may be busy."""


class GrammarProcessError(ChildProcessError):
    """The process that checks grammars cannot be started, for any grammar."""


class GrammarChecker:
    """Checks grammars against one tokenizer. Thread-safe.

    Remembers the last grammars that passed, and no others: a client may send one after another for ever.

    Args:
        directory: of the tokenizer.
        config: bounds the grammars.
    """

    def __init__(self, directory: pathlib.Path, config: StructuredOutputsConfig = StructuredOutputsConfig()):
        self._directory = directory
        self._config = config
        self._idle: list[WorkerProcess] = []
        self._places = threading.BoundedSemaphore(config.grammar_processes)
        self._lock = threading.Lock()
        self._passed: collections.OrderedDict[bytes, str] = collections.OrderedDict()  # by digest

    def known(self, params: StructuredOutputsParams) -> str | None:
        """Returns the grammar if it has passed before, at once; else None."""
        digest = params.digest()
        with self._lock:
            grammar = self._passed.get(digest)
            if grammar is not None:
                self._passed.move_to_end(digest)
            return grammar

    def check_size(self, params: StructuredOutputsParams) -> None:
        """Raises ValueError for a grammar that is too large, at once."""
        size = params.num_bytes
        if size > self._config.max_grammar_bytes:
            raise ValueError(
                f"structured_outputs.{params.kind} has {size} bytes; at most {self._config.max_grammar_bytes} "
                "(max_grammar_bytes) are allowed: make it shorter"
            )

    def check(self, params: StructuredOutputsParams) -> str:
        """Returns the grammar in the form that the engine takes. Waits for a process unless it has passed before.

        Raises:
            ValueError: one line, for a grammar that cannot be used or exceeds the budget.
            GrammarProcessError: no process can be started.
        """
        self.check_size(params)
        grammar = self.known(params)
        if grammar is not None:
            return grammar
        with self._places:
            answer, fault = self._ask(json.dumps(params.as_dict()).encode())
        if answer is None:
            raise ValueError(f"structured_outputs.{params.kind} is refused: {fault}")
        if "error" in answer:
            raise ValueError(answer["error"])
        with self._lock:
            self._passed[params.digest()] = answer["grammar"]
            while len(self._passed) > self._config.max_checked_grammars:
                self._passed.popitem(last=False)
        return answer["grammar"]

    def close(self) -> None:
        """Ends the processes that are idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()

    def _ask(self, request: bytes) -> tuple[dict[str, Any] | None, str]:
        """Returns the answer of a process; None with the reason where the grammar has ended it."""
        fault = ""
        for _ in range(2):
            worker = self._take()
            answer = worker.ask(request, _WALL_FACTOR * self._config.max_grammar_seconds)
            if answer is not None:
                with self._lock:
                    self._idle.append(worker)
                return answer, ""
            fault, killed = worker.fault, worker.was_killed
            worker.end()
            if not killed:  # by others, such as a system that runs out of memory
                break
        if fault:
            return None, f"it ends the process that compiles it, as what is too deep or too large does ({fault})"
        seconds = self._config.max_grammar_seconds
        return None, f"it takes more than its budget of {seconds:g} s (max_grammar_seconds)"

    def _take(self) -> WorkerProcess:
        """Returns a process that is running and not in use."""
        while True:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                return self._start()
            if not worker.has_ended:
                return worker
            worker.end()

    def _start(self) -> WorkerProcess:
        try:
            worker = WorkerProcess("jaxserve.frontend.grammar_worker", "grammars")
        except OSError as error:
            raise GrammarProcessError(f"the process for grammars cannot be started: {error}") from error
        start = {"directory": str(self._directory), "config": dataclasses.asdict(self._config)}
        answer = worker.ask(json.dumps(start).encode(), _START_SECONDS)
        if answer is None:
            fault = worker.fault or f"the process for grammars has not started within {_START_SECONDS:g} s"
            worker.end()
            raise GrammarProcessError(fault)
        if "error" in answer:
            worker.end()
            raise ValueError(answer["error"])
        return worker
