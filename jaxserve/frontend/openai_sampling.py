"""Parses the sampling parameters of OpenAI's bodies: all rows of their table, by their names, and what OpenAI and vLLM
call otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.config.plain_params import params_of, plain_fields
from jaxserve.frontend.openai_checks import checked_flag
from jaxserve.frontend.openai_structured import FORMAT_FIELDS, parse_structured_outputs
from jaxserve.sampling_params import SAMPLING_FIELDS, SamplingParams

_LOGPROBS, _TOP_LOGPROBS, _STRUCTURED = "logprobs", "top_logprobs", "structured_outputs"


def sampling_names(is_chat: bool) -> set[str]:
    """Returns the names of all fields of a body that say something of sampling."""
    of_chats = ("max_completion_tokens", _TOP_LOGPROBS) if is_chat else ()
    return {*plain_fields(), *FORMAT_FIELDS, *of_chats}


def parse_params(fields: Mapping[str, Any], is_chat: bool, defaults: Mapping[str, Any]) -> SamplingParams:
    """Parses the sampling parameters of a body, of whose fields none is None. Raises ValueError naming the field.

    defaults: of parameters that the body does not have.
    """
    values = {name: fields[name] for name in plain_fields() if name in fields}
    if is_chat and "max_completion_tokens" in fields:
        if "max_tokens" in values:
            raise ValueError("max_tokens and max_completion_tokens are the same; give one of them")
        values["max_tokens"] = fields["max_completion_tokens"]
    if is_chat:
        _read_top_logprobs(fields, values)
    elif values.get(_LOGPROBS) is False:  # a chat's way to ask for none
        del values[_LOGPROBS]
    if (structured := parse_structured_outputs(fields)) is not None:
        values[_STRUCTURED] = structured
    return params_of(values, defaults)


def _read_top_logprobs(fields: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Reads a chat's `logprobs`, which is a flag, and `top_logprobs`, their number, as our `logprobs`."""
    wanted = checked_flag(_LOGPROBS, values.pop(_LOGPROBS, False))
    number = SAMPLING_FIELDS[_LOGPROBS].kind.checked(_TOP_LOGPROBS, fields.get(_TOP_LOGPROBS, 0))
    if wanted:
        values[_LOGPROBS] = number
    elif number:
        raise ValueError(f"top_logprobs is {number}; it needs logprobs: set logprobs to true")
