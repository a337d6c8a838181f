"""Parses bodies of warm-ups of the prefix cache, which are those of completions and chats without what is generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxserve.config.shown import shown
from jaxserve.frontend.openai import CHAT_URL, COMPLETIONS_URL, BodyRequest, Dialect, parse_body
from jaxserve.frontend.openai_chat import CHAT_FIELDS
from jaxserve.frontend.openai_checks import hint
from jaxserve.frontend.warm_prefix import WarmedPrefix
from jaxserve.request import OPTION_NAMES

WARM_UP_URL = "/v1/cache/warm_up"

WARM_UP_CHAT_FIELDS = CHAT_FIELDS - {"parallel_tool_calls", "include_reasoning"}
_COMMON_FIELDS = frozenset({"model", "user", "request_id", *OPTION_NAMES})


def parse_warm_up(
    body: Mapping[str, Any], *, allow_unknown: bool = False, lower_first: bool = True, max_prompts: int = 1
) -> BodyRequest:
    """Parses the body of a warm-up: `prompt` or `messages`, as they are in a completion or a chat.

    Args:
        body: the decoded JSON; a field that is null counts as absent.
        allow_unknown, lower_first, max_prompts: as in `Dialect`.

    Raises:
        ValueError: names the field.
    """
    fields = {name: value for name, value in body.items() if value is not None}
    if ("prompt" in fields) == ("messages" in fields):
        raise ValueError("body has " + ("both prompt and messages" if "prompt" in fields else "no prompt or messages"))
    known = _COMMON_FIELDS | (WARM_UP_CHAT_FIELDS if "messages" in fields else {"prompt"})
    unknown = [name for name in fields if name not in known]
    if unknown and not allow_unknown:
        raise ValueError(f"body has the unknown field {shown(unknown[0])}; {hint(unknown[0], set(known))}")
    url = CHAT_URL if "messages" in fields else COMPLETIONS_URL
    dialect = Dialect(streams=True, max_prompts=max_prompts, lower_first=lower_first)
    request = parse_body(url, {name: value for name, value in fields.items() if name in known}, dialect)
    return dataclasses.replace(request, unknown=unknown)


def warm_up_response(model: str, created: int, warmed: WarmedPrefix) -> dict[str, Any]:
    """Builds the response object of a warm-up. created: Unix seconds."""
    return {
        "id": warmed.request_id,
        "object": "cache.warm_up",
        "created": created,
        "model": model,
        "prompt_tokens": warmed.num_prompt_tokens,
        "cached_tokens": warmed.num_cached_tokens,
        "computed_tokens": warmed.num_computed_tokens,
    }
