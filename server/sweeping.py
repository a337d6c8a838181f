"""Looks regularly at what clients hold open, for both ports by the same times."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

_log = logging.getLogger("jaxserve.server")

SWEEP_SECONDS = 0.25
LOG_SECONDS = 5.0
"""Minimum seconds between two lines about what was ended."""
GRACE_SECONDS = 1.0
"""Minimum wait for its client before something may be ended to reduce the number or bytes of what waits."""


async def sweep_regularly(sweep: Callable[[], None], what: str) -> None:
    """Calls `sweep`, which ends what exceeds a bound, until canceled. what: names it in the log."""
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        try:
            sweep()
        except Exception:  # the bounds must be kept for as long as the server lives
            _log.exception("%s could not be checked", what)
