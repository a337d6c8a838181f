"""Warms the prefix cache: a prompt is computed, and nothing is generated."""

from __future__ import annotations

import dataclasses

from jaxserve.pooling_params import PoolingParams
from jaxserve.request import Pooling, RequestOptions
from jaxserve.request_checks import InfeasibleError

WARM_UP = PoolingParams(pooling_type=Pooling.LAST.name, dimensions=1)
"""What a warm-up asks the engine for: a prompt's last hidden state, for which all of its pages are computed and none of
its tokens need be computed again where they are cached."""


@dataclasses.dataclass(frozen=True)
class WarmedPrefix:
    """Holds what a warm-up did. num_cached_tokens: whose pages were there already. num_computed_tokens: the others.

    Only whole pages are kept: of a prompt, as many as its tokens fill.
    """

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int

    @property
    def num_computed_tokens(self) -> int:
        return self.num_prompt_tokens - self.num_cached_tokens


def check_warm_up(options: RequestOptions, *, prefix_caching: bool) -> None:
    """Checks that a warm-up can have an effect.

    Args:
        options: of the request.
        prefix_caching: `EngineReady.prefix_caching`.

    Raises:
        ValueError: the request opts out.
        InfeasibleError: the engine shares no pages.
    """
    if not options.prefix_caching:
        raise ValueError("prefix_caching is false; a warm-up fills the prefix cache: leave it out")
    if not prefix_caching:
        raise InfeasibleError(
            "enable_prefix_caching is False; this server shares no pages between requests, so that there is nothing "
            "to warm: set CacheConfig.enable_prefix_caching"
        )
