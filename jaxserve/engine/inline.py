"""The engine in the caller's own process: `receive` runs a step. For `LLM`, tests and debugging."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence

from jaxserve.config import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import EngineReady, FromEngine, Shutdown, ToEngine
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.protocol import Runner


class InlineEngine:
    """EngineClient without a second process. Any runner will do; by default the model of `config` is loaded.

    `send` may be called from any thread; everything else happens in the thread that calls `receive`.
    """

    def __init__(self, config: EngineConfig, runner: Runner | None = None, *, progress: bool = False):
        start = time.perf_counter()
        self.core = EngineCore(config, runner or ModelRunner(config, progress=progress))
        self.ready: EngineReady = self.core.ready(time.perf_counter() - start)
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()

    def send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def receive(self) -> Sequence[FromEngine]:
        """Takes in what was sent, runs one step if there is work, and returns what came of it; empty when idle."""
        messages: list[FromEngine] = []
        while not self._inbox.empty():
            messages.extend(self.core.handle(self._inbox.get()))
        if self.core.busy:
            messages.extend(self.core.step())
        return messages

    def close(self) -> None:
        self.send(Shutdown())
