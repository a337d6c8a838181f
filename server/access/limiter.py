"""Keeps the limits of each caller: calls at one time, and calls and tokens a minute, on all ports together."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable

from jaxserve.frontend.rates import Allowance
from jaxserve.serving.access.callers import Caller
from jaxserve.serving.problem import CallerLimitError

_BUSY_SECONDS = 1.0
"""Seconds after which a caller with too many calls at one time should try again."""


class CallLimiter:
    """Admits calls within their callers' limits. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._open: collections.Counter[str] = collections.Counter()
        self._allowances: dict[tuple[str, str], Allowance] = {}

    def opened(self, caller: Caller) -> None:
        """Admits and counts a call; `closed` must follow. Raises CallerLimitError, and then counts nothing."""
        limits = caller.limits
        if not limits.any:
            return
        most = limits.max_concurrent_requests
        if most is not None and self._open[caller.name] >= most:
            raise CallerLimitError(
                f"{most} calls of this key are open; at most {most} (max_concurrent_requests) may be: wait for one to "
                "end",
                _BUSY_SECONDS,
            )
        now = self._clock()
        requests = self._allowance(caller.name, "requests_per_minute", limits.requests_per_minute, now)
        tokens = self._allowance(caller.name, "tokens_per_minute", limits.tokens_per_minute, now)
        for allowance, name in ((requests, "requests_per_minute"), (tokens, "tokens_per_minute")):
            if allowance is not None and (seconds := allowance.seconds_until(1, now)) > 0:
                raise CallerLimitError(
                    f"this key has used up its {allowance.per_minute} {name.replace('_', ' ')} ({name}); try again in "
                    f"{math.ceil(seconds)} s",
                    seconds,
                )
        if requests is not None:
            requests.take(1, now)
        self._open[caller.name] += 1

    def closed(self, caller: Caller) -> None:
        """Counts the end of a call that was opened."""
        if caller.limits.any:
            self._open[caller.name] -= 1
            if not self._open[caller.name]:
                del self._open[caller.name]

    def charge(self, name: str, num_tokens: int) -> None:
        """Counts tokens of the caller of this name."""
        if (allowance := self._allowances.get((name, "tokens_per_minute"))) is not None:
            allowance.take(num_tokens, self._clock())

    def _allowance(self, name: str, kind: str, per_minute: int | None, now: float) -> Allowance | None:
        """Returns the caller's allowance, a new one where it has none or its limit was changed."""
        if per_minute is None:
            self._allowances.pop((name, kind), None)
            return None
        known = self._allowances.get((name, kind))
        if known is None or known.per_minute != per_minute:
            known = self._allowances[name, kind] = Allowance(per_minute, now)
        return known
