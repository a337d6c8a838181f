"""Adapts limits to the load: the number of running requests to prompt lengths, the step's size to the queue."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxserve.config.scheduling import AdaptationConfig


class AdaptiveBatchSize:
    """Limits the number of running requests to target tokens over the moving average of prompt lengths, within
    bounds."""

    def __init__(self, config: AdaptationConfig) -> None:
        self._config = config
        self._average: float | None = None

    @property
    def average(self) -> float | None:
        """Returns the moving average of prompt lengths in tokens, which starts at the first prompt; None before it.
        None before it."""
        return self._average

    @property
    def limit(self) -> int:
        """Returns the maximum number of running requests; max_batch_size before the first prompt."""
        config = self._config
        if self._average is None:
            return config.max_batch_size
        wanted = int(config.target_batch_tokens / self._average)
        return min(max(wanted, config.min_batch_size), config.max_batch_size)

    def observe(self, prompt_tokens: int) -> None:
        """Adds the prompt of one more request, of at least one token, to the average."""
        if self._average is None:
            self._average = float(prompt_tokens)
        else:
            self._average += self._config.batch_size_smoothing * (prompt_tokens - self._average)


@dataclasses.dataclass(frozen=True)
class Profile:
    """Bounds what a step may compute under a load: its tokens, prefill's share of them beside decodes, and whether
    prompts may be split."""

    name: Literal["latency", "balanced", "throughput"]
    max_num_batched_tokens: int
    prefill_share: float
    enable_chunked_prefill: bool


class LoadProfile:
    """Selects the profile for a load; it changes only when the load passes a bound by more than the hysteresis."""

    def __init__(self, config: AdaptationConfig) -> None:
        self._bounds = (config.load_low, config.load_high)
        self._hysteresis = config.load_hysteresis
        self._profiles = (
            Profile("latency", config.latency_tokens, config.latency_prefill_share, False),
            Profile("balanced", config.balanced_tokens, config.balanced_prefill_share, True),
            Profile("throughput", config.throughput_tokens, config.throughput_prefill_share, True),
        )
        self._current: int | None = None

    def update(self, load: float) -> Profile:
        """Returns the profile from now on.

        Args:
            load: unfinished requests over max_num_seqs; the first call applies no margin.
        """
        margin = 0.0 if self._current is None else self._hysteresis
        low, high = self._bounds
        rise = (load >= low + margin) + (load >= high + margin)
        fall = (load >= low - margin) + (load >= high - margin)
        # Bounds that a rising load has passed hold in any case; those that a falling load has not left hold if held.
        self._current = rise if self._current is None else max(rise, min(fall, self._current))
        return self._profiles[self._current]
