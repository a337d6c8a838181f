"""The engine in the caller's own thread: `receive` runs a step. For `LLM`, tests and debugging."""

from __future__ import annotations

import time
from collections.abc import Sequence

from jaxserve.config import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import EngineReady, FromEngine, Shutdown, ToEngine
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.protocol import Runner


class InlineEngine:
    """EngineClient without a second process. Any runner will do; by default the model of `config` is loaded."""

    def __init__(self, config: EngineConfig, runner: Runner | None = None, *, progress: bool = False):
        start = time.perf_counter()
        self.core = EngineCore(config, runner or ModelRunner(config, progress=progress))
        self.ready: EngineReady = self.core.ready(time.perf_counter() - start)
        self._messages: list[FromEngine] = []

    def send(self, message: ToEngine) -> None:
        self._messages.extend(self.core.handle(message))

    def receive(self) -> Sequence[FromEngine]:
        """What has happened since the last call, after one step if there is work; empty when idle."""
        if self.core.busy:
            self._messages.extend(self.core.step())
        messages, self._messages = self._messages, []
        return messages

    def close(self) -> None:
        self.send(Shutdown())
