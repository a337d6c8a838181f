"""Connects a front end to an engine through one interface, in one process or in two.

`EngineClient` is the front end's side. `InlineEngine` runs the engine's steps in the caller's thread (`LLM`, tests);
`jaxserve.engine.process.EngineProcess` runs it in a process of its own and talks msgpack over a socket pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxserve.engine.messages import EngineReady, FromEngine, Progress, ToEngine

END_SECONDS = 10.0
"""Seconds that a closing engine may take to end before it is killed."""


class EngineSender(Protocol):
    """Sends a front end's messages to the engine."""

    @property
    def ready(self) -> EngineReady:
        """Returns the message with which the engine reported that it was ready."""
        ...

    @property
    def unsent_bytes(self) -> int:
        """Returns the bytes of messages that the engine's process has not received yet."""
        ...

    def send(self, message: ToEngine) -> None:
        """Queues a message; never waits for the engine, whatever state it is in."""
        ...


class EngineClient(EngineSender, Protocol):
    """Represents the engine to the front end. Not thread-safe, except that `receive` may run in a thread of its own."""

    def receive(self) -> Sequence[FromEngine]:
        """Returns the next messages in order, blocking until there is one.

        Inline: runs one step if there is work; returns an empty sequence when idle.
        Returns [EngineFailed] once when the engine has died, whatever the cause.
        """
        ...

    def progress(self) -> Progress:
        """Asks how far the engine's loop is and returns its latest answer; never waits. The beat is 0 before the first
        answer."""
        ...

    def kill(self) -> None:
        """Ends an engine that hangs, without asking it; idempotent, never waits."""
        ...

    def close(self, seconds: float = END_SECONDS) -> str:
        """Ends the engine; idempotent.

        Args:
            seconds: time until it is killed.

        Returns:
            One line on what went wrong, or "".
        """
        ...


@runtime_checkable
class PolledEngineClient(EngineClient, Protocol):
    """Represents an engine whose messages arrive at a descriptor, so that an event loop needs no thread to wait for
    them."""

    def fileno(self) -> int:
        """Returns the descriptor, which is readable when `poll` has something to return."""
        ...

    def poll(self) -> Sequence[FromEngine] | None:
        """Returns the messages that have arrived, in order, without ever waiting.

        None when there are no more: `receive` then returns why the engine has ended, for which it may wait.
        """
        ...
