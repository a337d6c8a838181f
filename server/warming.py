"""Warms the prefix cache for every port."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.frontend.warm_prefix import WARM_UP, WarmedPrefix, check_warm_up
from jaxserve.request import RequestOptions
from jaxserve.serving.embedding_calls import EmbeddingCall, embed_all
from jaxserve.telemetry.request_trace import RequestTrace


async def warm_up(
    frontend: AsyncFrontEnd,
    prompts: Sequence[str | Sequence[int]],
    options: RequestOptions,
    request_id: str,
    owner: str,
    trace: RequestTrace | None = None,
) -> WarmedPrefix:
    """Computes prompts and keeps their pages; returns the tokens of all of them.

    Arguments and errors are those of `EmbeddingCall` and `embed_all`. Raises ValueError or InfeasibleError, too, where
    it could have no effect.
    """
    check_warm_up(options, prefix_caching=frontend.ready.prefix_caching)
    found = await embed_all(frontend, EmbeddingCall(prompts, WARM_UP, options, request_id, owner, trace))
    return WarmedPrefix(request_id, sum(one.prompt_tokens for one in found), sum(one.cached_tokens for one in found))
