"""Runs the engine in the caller's own process, where `receive` runs a step. It serves `LLM`, tests and debugging."""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from collections.abc import Sequence

from jaxserve.config.settings import EngineConfig
from jaxserve.engine.channel import END_SECONDS
from jaxserve.engine.constraints.start import start_grammars
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import EngineFailed, EngineReady, FromEngine, Progress, Shutdown, ToEngine
from jaxserve.engine.step_executor import EngineBrokenError
from jaxserve.runner.model_runner import ModelRunner, annotate
from jaxserve.runner.protocol import Runner
from jaxserve.telemetry.batch_timeline import BatchTimelineFile

_log = logging.getLogger(__name__)


class InlineEngine:
    """Implements EngineClient without a second process. Any runner will do; by default the model of `config` is loaded.

    `send` may be called from any thread; everything else happens in the thread that calls `receive`.
    """

    def __init__(self, config: EngineConfig, runner: Runner | None = None, *, progress: bool = False):
        start = time.perf_counter()
        self.core = EngineCore(
            config,
            runner or ModelRunner(config, progress=progress),
            annotate=annotate,
            grammars=start_grammars(config, now=False),
        )
        self.ready: EngineReady = self.core.ready(time.perf_counter() - start)
        self._composition = BatchTimelineFile(self.core.recorder, config.composition_dir)
        self._failed = False
        self._beat = 0
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()

    @property
    def unsent_bytes(self) -> int:
        return 0

    def send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def receive(self) -> Sequence[FromEngine]:
        """Handles sent messages, runs one step if there is work, and returns the resulting messages; empty when
        idle."""
        messages: list[FromEngine] = []
        if self._failed:
            return messages
        pause = self.core.pause if self.core.busy else None
        if pause:
            with contextlib.suppress(queue.Empty):  # the pause is over
                messages.extend(self.core.handle(self._inbox.get(timeout=pause)))
        while not self._inbox.empty():
            messages.extend(self.core.handle(self._inbox.get()))
        if self.core.busy:
            try:
                messages.extend(self.core.step())
            except EngineBrokenError as error:  # the log has the faults that led to it
                self._failed = True
                messages.append(EngineFailed(str(error)))
            except Exception as error:  # whatever it is, every request under way must learn of it
                self._failed = True
                _log.exception("an engine step failed")
                messages.append(EngineFailed(f"engine step failed: {type(error).__name__}: {error}"))
        return messages

    def progress(self) -> Progress:
        self._beat += 1
        return self.core.progress(self._beat)

    def kill(self) -> None:
        """Does nothing: a thread cannot be ended from outside; it ends with the process."""

    def close(self, seconds: float = END_SECONDS) -> str:
        self.send(Shutdown())
        self._composition.close()
        if not self._failed:
            self.core.close()
        return ""
