"""Delivers an engine's messages to an event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from jaxserve.engine.channel import END_SECONDS, EngineClient, PolledEngineClient
from jaxserve.engine.messages import EngineFailed, EngineReady, FromEngine, Progress, ToEngine

_log = logging.getLogger(__name__)

LONGEST_WAIT = 0.05
"""Maximum seconds that a message waits for the loop to rest."""

_LEAST_CPU = 1e-5
_USUAL_GAIN = 0.1
_MOST_OF_USUAL = 4.0
"""Maximum CPU time that counts for one delivery, over what one takes of late: tokens do not wait for the loop to rest
from other work, such as a message of megabytes."""


class EngineReader:
    """Implements EngineSender; passes the messages that its engine sends to `deliver`, on the loop, in order.

    The loop itself reads what a `PolledEngineClient` sends: a thread between them would be one more that must get the
    interpreter lock, and a processor, for each step. For any other client a thread waits.

    Args:
        share: maximum share of the loop's time for processing messages, mainly streaming tokens. Where it is used up,
            messages wait (LONGEST_WAIT at most) and arrive together, which costs less: one delta of a stream carries
            the tokens of several steps. 1 delivers everything at once.
        cpu_time: returns the CPU seconds of the thread that calls it.
    """

    def __init__(
        self,
        client: EngineClient,
        loop: asyncio.AbstractEventLoop,
        share: float = 1.0,
        cpu_time: Callable[[], float] = time.thread_time,
    ):
        self._client = client
        self._loop = loop
        self._share = share
        self._cpu_time = cpu_time
        self._delivered = (-math.inf, 0.0)  # when, on the loop's clock and in CPU seconds of its thread
        self._usual_cpu: float | None = None  # CPU seconds of the loop from one delivery to the next
        self._busy: Callable[[], bool] = lambda: False
        self._deliver: Callable[[Sequence[FromEngine]], None] = lambda messages: None
        self._sent = threading.Event()
        self._stopping = False
        self._polled = client if isinstance(client, PolledEngineClient) else None
        self._polling = False
        self._close_lock = threading.Lock()
        self._inbox: list[FromEngine] = []
        self._inbox_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine reader", daemon=True)

    def start(self, deliver: Callable[[Sequence[FromEngine]], None], busy: Callable[[], bool]) -> None:
        """Starts reading.

        Args:
            deliver: is called on the loop with messages.
            busy: returns whether the engine has work; called in the reader's thread, where there is one. An engine that
                runs in it (InlineEngine) is then called again at once; otherwise the reader sleeps until the next
                `send`.
        """
        self._deliver = deliver
        self._busy = busy
        if self._polled is None:
            self._thread.start()
        else:
            self._polling = True
            self._loop.call_soon(self._empty_inbox)  # for what arrived with the engine's first message

    def stop(self) -> None:
        """Stops reading; nothing is delivered from now on. Must be called on the loop, before `close`."""
        self._stopping = True
        self._stop_polling()

    @property
    def ready(self) -> EngineReady:
        return self._client.ready

    def send(self, message: ToEngine) -> None:
        self._client.send(message)
        self._sent.set()

    @property
    def unsent_bytes(self) -> int:
        return self._client.unsent_bytes

    def progress(self) -> Progress:
        """Returns `EngineClient.progress`."""
        return self._client.progress()

    def kill(self) -> None:
        """Calls `EngineClient.kill`."""
        self._client.kill()

    def close(self, seconds: float = END_SECONDS) -> str:
        """Ends the engine and the thread; may block for seconds, so call it off the loop. Idempotent, from any thread.
        `stop` comes before it.

        seconds: time after which the engine is killed, or given up. Returns one line on what went wrong, or "".
        """
        self._stopping = True
        self._sent.set()
        with self._close_lock:
            problem = self._client.close(seconds)
        if self._thread.ident is not None:
            self._thread.join(seconds)
        if self._thread.is_alive():
            problem = problem or f"the engine has not ended after {seconds:g} s"
        return problem

    def _run(self) -> None:
        while not self._stopping:
            self._sent.clear()  # before receive, so that a send during it is not missed below
            try:
                messages = self._client.receive()
            except Exception as error:  # whatever it is, the streams must learn that the engine is lost
                messages = [_unreadable(error)]
            if self._stopping:
                return  # an engine that we end is not one that fails
            if messages:
                if not self._hand_over(messages) or any(isinstance(message, EngineFailed) for message in messages):
                    return
            elif not self._busy():
                self._sent.wait()

    def _hand_over(self, messages: Sequence[FromEngine]) -> bool:
        """Queues messages for the loop, which is woken once however many wait; returns False when the loop has
        ended.
        """
        with self._inbox_lock:
            first = not self._inbox
            self._inbox.extend(messages)
        if first:
            try:
                self._loop.call_soon_threadsafe(self._deliver_soon)
            except RuntimeError:
                return False
        return True

    def _deliver_soon(self) -> None:
        """Delivers what has arrived when the loop has rested long enough from the delivery before."""
        then, cpu_then = self._delivered
        wait = 0.0
        if self._share < 1:
            wait = self._counted(self._cpu_time() - cpu_then) / self._share - (self._loop.time() - then)
        if wait > 0:
            if self._polled is not None and self._polling:
                self._loop.remove_reader(self._polled.fileno())
            self._loop.call_later(min(wait, LONGEST_WAIT), self._empty_inbox)
        else:
            self._empty_inbox()

    def _counted(self, cpu: float) -> float:
        """Returns how much of the loop's CPU time since a delivery counts as its own."""
        return cpu if self._usual_cpu is None else min(cpu, _MOST_OF_USUAL * self._usual_cpu)

    def _begin_delivery(self) -> None:
        then, cpu_then = self._delivered
        self._delivered = self._loop.time(), self._cpu_time()
        if then > -math.inf:
            cpu = self._counted(self._delivered[1] - cpu_then)
            usual = cpu if self._usual_cpu is None else self._usual_cpu
            self._usual_cpu = max(usual + _USUAL_GAIN * (cpu - usual), _LEAST_CPU)

    def _empty_inbox(self) -> None:
        if self._polled is not None and self._polling:
            self._poll(self._polled)
            return
        self._begin_delivery()
        with self._inbox_lock:
            messages, self._inbox = self._inbox, []
        self._deliver(messages)

    def _poll(self, client: PolledEngineClient) -> None:
        """Delivers what has arrived and waits for more, until the engine has ended."""
        self._begin_delivery()
        try:
            messages = client.poll()
        except Exception as error:  # as in `_run`
            messages = [_unreadable(error)]
        if messages is None:
            # How the engine ended may take seconds to learn, for which the loop does not wait.
            self._stop_polling()
            self._thread.start()
            return
        if any(isinstance(message, EngineFailed) for message in messages):
            self._stop_polling()
        else:
            self._loop.add_reader(client.fileno(), self._deliver_soon)
        if messages:
            self._deliver(messages)

    def _stop_polling(self) -> None:
        if self._polled is not None and self._polling:
            self._polling = False
            self._loop.remove_reader(self._polled.fileno())


def _unreadable(error: Exception) -> EngineFailed:
    _log.error("the engine's messages cannot be received", exc_info=error)
    return EngineFailed(f"the engine's messages cannot be received: {error}")
