"""Parses OpenAI's completion and chat completion bodies, for the HTTP port and the batch command alike."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.config.sampling_fields import check_count
from jaxserve.config.shown import shown
from jaxserve.frontend.chat_format import ReplyPlan
from jaxserve.frontend.openai_chat import CHAT_FIELDS, NEUTRAL_EFFORTS, Chat, parse_chat
from jaxserve.frontend.openai_checks import check_neutral, check_text, checked_flag, checked_object, hint
from jaxserve.frontend.openai_logprobs import check_prompt_logprobs, with_echo
from jaxserve.frontend.openai_sampling import parse_params, sampling_names
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.request import OPTION_NAMES, RequestOptions
from jaxserve.sampling_params import SamplingParams

COMPLETIONS_URL = "/v1/completions"
CHAT_URL = "/v1/chat/completions"
URLS = (COMPLETIONS_URL, CHAT_URL)

_NEUTRAL: Mapping[str, Sequence[Any]] = {
    # OpenAI's
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "verbosity": ("medium",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    # vLLM's
    "chat_template": (),
    "documents": ([],),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "prompt_embeds": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
"""Unsupported fields of OpenAI and vLLM with the values that have no effect; null never has. Those that are sampling
parameters count only while these are not in their table.
"""

_STREAMING: Mapping[str, Sequence[Any]] = {
    "stream": (False,),
    "stream_options": ({"include_usage": False, "include_obfuscation": True},),
    "echo": (False,),
    "return_token_ids": (False,),
}
"""Fields that only a front that streams supports, with the values that have no effect elsewhere."""

_OF_URL: Mapping[str, Mapping[str, Sequence[Any]]] = {
    COMPLETIONS_URL: {
        "add_special_tokens": (True,),
        "top_logprobs": (0,),
        "continue_final_message": (False,),
        "include_reasoning": (True,),
        "parallel_tool_calls": (True, False),
        "reasoning_effort": NEUTRAL_EFFORTS,
        "tool_choice": ("none", "auto"),
        "tools": ([],),
    },
    CHAT_URL: {"add_special_tokens": (False,), "echo": (False,)},
}
"""Unsupported fields whose neutral values depend on what is asked for."""

_LABELS = ("user", "safety_identifier", "prompt_cache_key")
"""OpenAI's fields that label a request and do not affect its response."""

_EVERYWHERE = ("model", "metadata", "return_tokens_as_token_ids")

_STREAM_OPTIONS = ("include_usage", "include_obfuscation")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """Says how a front differs from others in what it accepts.

    streams: supports `stream`, `stream_options`, `echo`, `return_token_ids` and `request_id`. max_prompts: of one
    request. lower_first: a lower `priority` is more urgent, as in vLLM; else a higher one is. allow_unknown: passes
    over unknown fields, and names them in the result.
    """

    streams: bool = False
    max_prompts: int = 1
    lower_first: bool = False
    allow_unknown: bool = False


BATCH = Dialect()


@dataclasses.dataclass(frozen=True)
class BodyRequest:
    """Holds a parsed request body.

    Attributes:
        prompts: of a completion: each a text or token ids. chat: of a chat. One of them is set.
        model: the requested model name, None when it has none.
        options: as the body gives them; a higher priority is more urgent, whatever the dialect.
        stream, include_usage: the answer is streamed, and ends with the usage.
        echo: texts begin with their prompts.
        echo_only: the answer is the prompt alone; `params` have it draw one token, which is left out.
        return_token_ids: the answer has token ids, besides texts.
        prompt_logprobs: the answer has those of the prompt, apart from the tokens' own. tokens_as_ids: tokens with
            log-probabilities are spelled by their ids.
        request_id: chosen by the client, or None.
        unknown: names of fields that were passed over.
    """

    prompts: Sequence[str | Sequence[int]]
    chat: Chat | None
    params: SamplingParams
    model: str | None
    options: RequestOptions = RequestOptions()
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    echo_only: bool = False
    return_token_ids: bool = False
    prompt_logprobs: bool = False
    tokens_as_ids: bool = False
    request_id: str | None = None
    unknown: Sequence[str] = ()

    def single_prompt(self, tokenizer: Tokenizer | None) -> str | Sequence[int]:
        """Returns the prompt of a request that has one; a chat's is rendered. Raises ValueError."""
        if self.chat is None:
            (prompt,) = self.prompts
            return prompt
        if tokenizer is None:
            raise ValueError("messages need a tokenizer, and this server has none; send a prompt of token ids")
        return tokenizer.render_chat(self.chat.messages, **tokenizer.chat_format.arguments(self.chat))

    def reply_plan(self, tokenizer: Tokenizer | None, prompt: str | Sequence[int]) -> ReplyPlan:
        """Returns how the replies to the request's prompt are parsed: those of a completion are not. Raises
        ValueError.
        """
        if self.chat is None or tokenizer is None or not isinstance(prompt, str):
            return ReplyPlan(self.params)
        return tokenizer.chat_format.plan(self.chat, prompt, self.params)


def parse_body(
    url: str, body: Mapping[str, Any], dialect: Dialect = BATCH, defaults: Mapping[str, Any] = {}
) -> BodyRequest:
    """Parses the body of a request to one of URLS. A field that is null counts as absent.

    The fields of RequestOptions are additions to OpenAI's, as in the gRPC API; others are vLLM's.

    Args:
        url: the path that the body is for.
        body: the decoded JSON.
        dialect: what the front accepts.
        defaults: of sampling parameters that the body does not set (`EngineReady.sampling_defaults`).

    Raises:
        ValueError: names the field: unknown fields, wrong types, values out of range, and unsupported fields that would
            change the response.
    """
    fields = {name: value for name, value in body.items() if value is not None}
    own = "prompt" if url == COMPLETIONS_URL else "messages"
    unknown = _check_names(url, own, fields, dialect)
    for name in (*_LABELS, "model"):
        check_text(name, fields.get(name, ""))
    metadata = fields.get("metadata", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"metadata is {shown(metadata)}; it must be an object whose values are texts")
    if own not in fields:
        raise ValueError(f"body has no {own}")
    stream, echo = (checked_flag(name, fields.get(name, False)) for name in ("stream", "echo"))
    check_prompt_logprobs(fields, stream)
    echo_only = echo and fields.get("max_tokens") == 0 and fields["max_tokens"] is not False
    params = parse_params(with_echo(fields, echo_only) if echo else fields, url == CHAT_URL, defaults)
    chat = parse_chat(fields) if own == "messages" else None
    return BodyRequest(
        prompts=() if chat is not None else _parse_prompts(fields["prompt"], dialect.max_prompts),
        chat=chat,
        params=params,
        model=fields.get("model"),
        options=_parse_options(fields, dialect),
        stream=stream,
        include_usage=_parse_stream_options(fields.get("stream_options"), stream),
        echo=echo,
        echo_only=echo_only,
        return_token_ids=checked_flag("return_token_ids", fields.get("return_token_ids", False)),
        prompt_logprobs="prompt_logprobs" in fields,
        tokens_as_ids=checked_flag("return_tokens_as_token_ids", fields.get("return_tokens_as_token_ids", False)),
        request_id=fields.get("request_id"),
        unknown=unknown,
    )


def field_names(url: str) -> list[str]:
    """Returns the names of all fields that a body to `url` may have."""
    own = "prompt" if url == COMPLETIONS_URL else "messages"
    return sorted(_supported(url, own, Dialect(streams=True)) | set(_neutral(url, Dialect(streams=True))))


def neutral_values(url: str) -> Mapping[str, Sequence[Any]]:
    """Returns the fields to `url` that are accepted, over HTTP, with values that have no effect, and these values."""
    return _neutral(url, Dialect(streams=True))


def _neutral(url: str, dialect: Dialect) -> dict[str, Sequence[Any]]:
    neutral = {**_NEUTRAL, **({} if dialect.streams else _STREAMING), **_OF_URL[url]}
    supported = sampling_names(url == CHAT_URL)
    return {name: values for name, values in neutral.items() if name not in supported}


def _supported(url: str, own: str, dialect: Dialect) -> set[str]:
    names = {own, *_EVERYWHERE, *_LABELS, *sampling_names(url == CHAT_URL), *OPTION_NAMES}
    if url == CHAT_URL:
        names |= CHAT_FIELDS
    if dialect.streams:
        names |= {*_STREAMING, "request_id"}
    return names


def _check_names(url: str, own: str, fields: Mapping[str, Any], dialect: Dialect) -> list[str]:
    """Checks the fields that must be neutral; returns the names of unknown ones, where they are allowed."""
    neutral, supported = _neutral(url, dialect), _supported(url, own, dialect)
    unknown = []
    for name, value in fields.items():
        if name in neutral:
            check_neutral(name, value, neutral[name])
        elif name not in supported:
            if not dialect.allow_unknown:
                raise ValueError(f"body has the unknown field {shown(name)}; {hint(name, supported | set(neutral))}")
            unknown.append(name)
    return unknown


def _parse_options(fields: Mapping[str, Any], dialect: Dialect) -> RequestOptions:
    options = RequestOptions(**{name: fields[name] for name in OPTION_NAMES if name in fields})
    return dataclasses.replace(options, priority=-options.priority) if dialect.lower_first else options


def _parse_stream_options(options: Any, stream: bool) -> bool:
    """Returns whether the usage is asked for. include_obfuscation has no effect: no stream here is padded."""
    if options is None:
        return False
    checked_object("stream_options", options)
    for name, value in options.items():
        if name not in _STREAM_OPTIONS:
            raise ValueError(f"stream_options has the unknown field {shown(name)}; {hint(name, set(_STREAM_OPTIONS))}")
        if value is not None:
            checked_flag(f"stream_options.{name}", value)
    if options.get("include_usage") and not stream:
        raise ValueError("stream_options is given without stream; set stream to true, or leave it out")
    return bool(options.get("include_usage"))


def _parse_prompts(prompt: Any, most: int) -> list[str | list[int]]:
    """Parses one prompt, a text or token ids, or a list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise ValueError(f"prompt is of type {type(prompt).__name__}; it must be text or a list of token ids")
    if not prompt or not any(isinstance(item, str | list) for item in itertools.islice(prompt, 2)):
        return [prompt]
    if most == 1 and len(prompt) > 1:
        raise ValueError(f"prompt is a list of {len(prompt)} prompts; send one prompt a request")
    check_count("prompt", len(prompt), most, "prompts")
    for index, item in enumerate(prompt):
        if not isinstance(item, str | list):
            raise ValueError(f"prompt[{index}] is {shown(item)}; a list of prompts has texts and lists of token ids")
    return prompt
