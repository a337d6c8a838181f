"""The thread that waits for an engine's messages on behalf of an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence

from jaxserve.engine.channel import EngineClient
from jaxserve.engine.messages import EngineFailed, EngineReady, FromEngine, ToEngine

_log = logging.getLogger(__name__)

JOIN_SECONDS = 10.0


class EngineReader:
    """An EngineClient whose messages go to `deliver`, on the loop, in order.

    busy: whether the engine has work, asked in the reader's thread. An engine that runs in the caller's thread
    (InlineEngine) is then called again at once; otherwise the reader sleeps until the next `send`.
    """

    def __init__(self, client: EngineClient, loop: asyncio.AbstractEventLoop):
        self._client = client
        self._loop = loop
        self._busy: Callable[[], bool] = lambda: False
        self._deliver: Callable[[Sequence[FromEngine]], None] = lambda messages: None
        self._sent = threading.Event()
        self._stopping = False
        self._close_lock = threading.Lock()
        self._inbox: list[FromEngine] = []
        self._inbox_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine reader", daemon=True)

    def start(self, deliver: Callable[[Sequence[FromEngine]], None], busy: Callable[[], bool]) -> None:
        """Begins to read."""
        self._deliver = deliver
        self._busy = busy
        self._thread.start()

    @property
    def ready(self) -> EngineReady:
        return self._client.ready

    def send(self, message: ToEngine) -> None:
        self._client.send(message)
        self._sent.set()

    def receive(self) -> Sequence[FromEngine]:
        """Not for use: messages go to `deliver`."""
        raise AssertionError("messages of this engine are delivered on the loop")

    def close(self) -> None:
        """Ends the engine and the thread; may take seconds, so not on the loop. Idempotent, from any thread."""
        self._stopping = True
        self._sent.set()
        with self._close_lock:
            self._client.close()
        self._thread.join(JOIN_SECONDS)
        if self._thread.is_alive():
            _log.warning("the engine has not ended after %g s", JOIN_SECONDS)

    def _run(self) -> None:
        while not self._stopping:
            self._sent.clear()  # before receive, so that a send during it is not missed below
            try:
                messages = self._client.receive()
            except Exception as error:  # whatever it is, the streams must learn that the engine is lost
                _log.exception("the engine's messages cannot be received")
                messages = [EngineFailed(f"the engine's messages cannot be received: {error}")]
            if self._stopping:
                return  # an engine that we end is not one that fails
            if messages:
                if not self._hand_over(messages) or any(isinstance(message, EngineFailed) for message in messages):
                    return
            elif not self._busy():
                self._sent.wait()

    def _hand_over(self, messages: Sequence[FromEngine]) -> bool:
        """Leaves messages for the loop, which is woken once however many wait; False when the loop has ended."""
        with self._inbox_lock:
            first = not self._inbox
            self._inbox.extend(messages)
        if first:
            try:
                self._loop.call_soon_threadsafe(self._empty_inbox)
            except RuntimeError:
                return False
        return True

    def _empty_inbox(self) -> None:
        with self._inbox_lock:
            messages, self._inbox = self._inbox, []
        self._deliver(messages)
