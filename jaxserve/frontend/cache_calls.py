"""Asks an engine to flush its prefix cache, and waits for the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from jaxserve.engine.messages import EngineFailed, FlushPrefixCache, FromEngine, PrefixCacheFlushed, ToEngine
from jaxserve.frontend.delta import EngineDeadError

ANSWER_SECONDS = 60.0
"""Seconds within which an engine must answer. It does so between two steps."""


class CacheCalls:
    """Makes any number of calls at a time. Must be used on one event loop. send: sends a message to the engine."""

    def __init__(self, send: Callable[[ToEngine], None]):
        self._send = send
        self._number = 0
        self._answers: dict[int, asyncio.Future[int]] = {}
        self._failure = ""

    async def flush(self) -> int:
        """Forgets all pages that the prefix cache holds; returns how many became free. Running requests go on.

        Raises EngineDeadError where the engine has ended, or does not answer.
        """
        if self._failure:
            raise EngineDeadError(self._failure)
        self._number += 1
        number = self._number
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(FlushPrefixCache(number))
            return await asyncio.wait_for(answer, ANSWER_SECONDS)
        except TimeoutError:
            raise EngineDeadError(f"the engine has not answered within {ANSWER_SECONDS:g} s") from None
        except OSError as error:
            raise EngineDeadError(f"the engine cannot be reached: {error}") from error
        finally:
            del self._answers[number]

    def handle(self, message: FromEngine) -> None:
        """Takes the engine's messages, those that answer calls."""
        if isinstance(message, EngineFailed):
            self.close(f"the engine has ended: {message.error}")
        elif isinstance(message, PrefixCacheFlushed):
            answer = self._answers.get(message.number)
            if answer is not None and not answer.done():
                answer.set_result(message.num_pages)

    def close(self, reason: str) -> None:
        """Ends all calls with EngineDeadError."""
        self._failure = self._failure or reason
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineDeadError(reason))
