"""How a front end reaches an engine: one interface, in one process or in two.

`EngineClient` is the front end's side. `InlineEngine` runs the engine's steps in the caller's thread (`LLM`, tests);
`jaxserve.engine.process.EngineProcess` runs it in a process of its own and talks msgpack over a socket pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jaxserve.engine.messages import EngineReady, FromEngine, ToEngine


class EngineClient(Protocol):
    """The engine as the front end sees it. Not thread-safe, except that `receive` may run in a thread of its own."""

    @property
    def ready(self) -> EngineReady:
        """What the engine said when it became ready."""
        ...

    def send(self, message: ToEngine) -> None:
        """Queues a message; never blocks on a step."""
        ...

    def receive(self) -> Sequence[FromEngine]:
        """The next messages in order, blocking until there is one.

        Inline: runs one step if there is work; returns an empty sequence when idle.
        Returns [EngineFailed] once when the engine has died, whatever the cause.
        """
        ...

    def close(self) -> None:
        """Ends the engine; idempotent."""
        ...
