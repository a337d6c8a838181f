"""Builds OpenAI's response objects of completions and chat completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.frontend.openai import CHAT_URL


@dataclasses.dataclass(frozen=True)
class Answer:
    """Holds one sample that a prompt was answered with.

    prompt_token_ids, logprobs and prompt_logprobs (as `LogprobShapes` makes them): None where the response does not
    show them. truncated_tokens: cut off the prompt. index: of the sample; the prompt's tokens count with the first.
    message: of a chat; None where its content is the text.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    token_ids: Sequence[int] | None = None
    prompt_token_ids: Sequence[int] | None = None
    truncated_tokens: int = 0
    logprobs: dict[str, Any] | None = None
    prompt_logprobs: list[Any] | None = None
    index: int = 0
    message: Mapping[str, Any] | None = None


def response_id(url: str, request_id: object) -> str:
    """Returns the id of a response object."""
    return f"{'chatcmpl' if url == CHAT_URL else 'cmpl'}-{request_id}"


def response_body(url: str, request_id: object, model: str, created: int, answers: Sequence[Answer]) -> dict[str, Any]:
    """Builds the response object of a finished request; a choice's token_ids are vLLM's addition to OpenAI's.

    Args:
        url: of the request, one of openai.URLS.
        request_id: determines the id.
        model: name in the response.
        created: seconds since the epoch.
        answers: the samples of the first prompt, those of the second, and so on; each is a choice.
    """
    chat = url == CHAT_URL
    body = {
        "id": response_id(url, request_id),
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [_choice(chat, index, answer) for index, answer in enumerate(answers)],
        "usage": usage(answers),
    }
    if chat and answers[0].prompt_logprobs is not None:  # vLLM's place
        body["prompt_logprobs"] = answers[0].prompt_logprobs
    return body


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Builds the usage object of a request with these answers.

    Where tokens were cut off prompts, it has their number, which is an addition to OpenAI's fields.
    """
    firsts = [answer for answer in answers if not answer.index]
    prompt_tokens = sum(answer.prompt_tokens for answer in firsts)
    output_tokens = sum(answer.output_tokens for answer in answers)
    details = {"cached_tokens": sum(answer.cached_tokens for answer in firsts)}
    if truncated := sum(answer.truncated_tokens for answer in firsts):
        details["truncated_tokens"] = truncated
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": details,
    }


def _choice(chat: bool, index: int, answer: Answer) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index}
    if chat:
        choice["message"] = answer.message or {"role": "assistant", "content": answer.text}
    else:
        choice["text"] = answer.text
    choice |= {"logprobs": answer.logprobs, "finish_reason": answer.finish_reason}
    if answer.token_ids is not None:
        choice["token_ids"] = list(answer.token_ids)
    if answer.prompt_token_ids is not None:
        choice["prompt_token_ids"] = list(answer.prompt_token_ids)
    if answer.prompt_logprobs is not None and not chat:
        choice["prompt_logprobs"] = answer.prompt_logprobs
    return choice
