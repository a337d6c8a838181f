"""Routes that turn text into token ids and back, in vLLM's shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxserve.config.id_checks import first_wrong_id
from jaxserve.config.sampling_fields import check_count
from jaxserve.config.shown import shown
from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.frontend.openai_chat import Chat, parse_chat
from jaxserve.frontend.openai_checks import check_neutral, check_text, checked_flag, hint
from jaxserve.frontend.preparation_steps import Steps
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.serving.http_port.errors import check_model
from jaxserve.serving.http_port.exchange import ClientGoneError, Exchange
from jaxserve.serving.served_model import ServedModel

_BYTES_PER_ID = 16
"""Bytes that decoding takes per token id; the text counts as the largest text that can be encoded."""

MAX_DETOKENIZED = 2**20
"""Maximum number of token ids of one call: they are decoded in one call."""

_TEXT_FIELDS = ("model", "prompt", "add_special_tokens", "return_token_strs")
_CHAT_FIELDS = (
    "model",
    "messages",
    "add_special_tokens",
    "return_token_strs",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "tools",
    "tool_choice",
    "reasoning_effort",
)
_CHAT_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "chat_template": (),
    "mm_processor_kwargs": ({},),
}


@dataclasses.dataclass(frozen=True)
class TokenizeRequest:
    """Holds a request for token ids, of a text or of a chat."""

    model: str | None
    prompt: str | None
    chat: Chat | None
    add_special_tokens: bool
    return_token_strs: bool


@dataclasses.dataclass(frozen=True)
class DetokenizeRequest:
    """Holds a request for the text of token ids."""

    model: str | None
    tokens: Sequence[int]


def parse_tokenize(body: Mapping[str, Any]) -> TokenizeRequest:
    """Parses a body. Raises ValueError naming the field."""
    fields = {name: value for name, value in body.items() if value is not None}
    if ("prompt" in fields) == ("messages" in fields):
        raise ValueError(
            "body has " + ("both prompt and messages" if fields.get("prompt") else "no prompt or messages")
        )
    is_chat = "messages" in fields
    _check_known(fields, _CHAT_FIELDS if is_chat else _TEXT_FIELDS, _CHAT_NEUTRAL if is_chat else {})
    check_text("prompt", fields.get("prompt", ""))
    return TokenizeRequest(
        fields.get("model"),
        fields.get("prompt"),
        parse_chat(fields) if is_chat else None,
        checked_flag("add_special_tokens", fields.get("add_special_tokens", not is_chat)),
        checked_flag("return_token_strs", fields.get("return_token_strs", False)),
    )


def parse_detokenize(body: Mapping[str, Any]) -> DetokenizeRequest:
    """Parses a body. Raises ValueError naming the field."""
    fields = {name: value for name, value in body.items() if value is not None}
    _check_known(fields, ("model", "tokens"), {})
    tokens = fields.get("tokens")
    if not isinstance(tokens, list):
        raise ValueError(f"tokens is {shown(tokens)}; it must be a list of token ids")
    check_count("tokens", len(tokens), MAX_DETOKENIZED, "ids")
    if (index := first_wrong_id(tokens)) is not None:
        raise ValueError(f"tokens[{index}] is {shown(tokens[index])}; it must be a token id")
    return DetokenizeRequest(fields.get("model"), tokens)


def _check_known(fields: Mapping[str, Any], known: Sequence[str], neutral: Mapping[str, Sequence[Any]]) -> None:
    for name, value in fields.items():
        if name in neutral:
            check_neutral(name, value, neutral[name])
        elif name not in known:
            raise ValueError(f"body has the unknown field {shown(name)}; {hint(name, {*known, *neutral})}")
    check_text("model", fields.get("model", ""))


class _Call:
    """Answers one kind of call; an ASGI application. answer: reads the body, and returns the response's."""

    def __init__(
        self,
        served: ServedModel,
        max_body_bytes: int,
        answer: Callable[[ServedModel, AsyncFrontEnd, Exchange], Awaitable[bytes]],
    ):
        self._served = served
        self._max_body_bytes = max_body_bytes
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._max_body_bytes)
        try:
            await exchange.answer(200, await self._answer(self._served, self._served.started(), exchange))
        except ClientGoneError:
            return
        except Exception as error:
            await exchange.fail(error)


def router(served: ServedModel, max_body_bytes: int) -> APIRouter:
    """Returns the routes. served: the model."""
    calls = {"/tokenize": _tokenize, "/detokenize": _detokenize}
    return APIRouter(
        routes=[
            Route(url, _Call(served, max_body_bytes, answer), methods=["POST"], name=url)
            for url, answer in calls.items()
        ]
    )


async def _tokenize(served: ServedModel, frontend: AsyncFrontEnd, exchange: Exchange) -> bytes:
    request = await exchange.read_json(frontend, parse_tokenize)
    check_model(served.name, request.model)
    tokenizer = served.tokenizer()
    text = request.prompt
    if (chat := request.chat) is not None:
        text = await frontend.render_chat(chat)
    assert text is not None  # a request has a prompt or a chat
    limits = frontend.ready.limits
    return await frontend.work(_tokenize_steps(tokenizer, text, request, limits.max_model_len), 4 * len(text))


def _tokenize_steps(tokenizer: Tokenizer, text: str, request: TokenizeRequest, max_model_len: int) -> Steps[bytes]:
    """Encodes the response in steps."""
    yield 0
    ids: list[bytes] = []
    texts: list[bytes] = []
    count = 0

    def take(token_ids: list[int], _: int) -> None:
        nonlocal count
        if token_ids:
            count += len(token_ids)
            ids.append(msgspec.json.encode(token_ids)[1:-1])
            if request.return_token_strs:
                texts.append(msgspec.json.encode(tokenizer.token_texts(token_ids))[1:-1])

    yield from tokenizer.encode_steps(text, take, request.add_special_tokens)
    strings = b"[%b]" % b",".join(texts) if request.return_token_strs else b"null"
    return b'{"count":%d,"max_model_len":%d,"tokens":[%b],"token_strs":%b}' % (
        count,
        max_model_len,
        b",".join(ids),
        strings,
    )


async def _detokenize(served: ServedModel, frontend: AsyncFrontEnd, exchange: Exchange) -> bytes:
    request = await exchange.read_json(frontend, parse_detokenize)
    check_model(served.name, request.model)
    steps = _detokenize_steps(served.tokenizer(), request.tokens, frontend.ready.limits.vocab_size)
    return await frontend.work(steps, _BYTES_PER_ID * len(request.tokens))


def _detokenize_steps(tokenizer: Tokenizer, token_ids: Sequence[int], vocab_size: int) -> Steps[bytes]:
    """Encodes the response in steps."""
    parts: list[bytes] = []
    # A text in JSON is what is written of its parts, one behind the other.
    yield from tokenizer.decode_steps(token_ids, lambda text: parts.append(msgspec.json.encode(text)[1:-1]), vocab_size)
    return b'{"prompt":"%b"}' % b"".join(parts)
