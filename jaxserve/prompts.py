"""Prompts of `LLM` and `AsyncLLM`, and the values that are given for each of them or for all."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxserve.request import OPTION_NAMES, RequestOptions
from jaxserve.request_checks import InfeasibleError

Prompt = str | Mapping[str, Any]
"""A prompt: text, `{"prompt": text}` or `{"prompt_token_ids": ids}`."""


@contextlib.contextmanager
def naming_prompt(which: str) -> Iterator[None]:
    """Puts in front of a ValueError which of several prompts it is about."""
    try:
        yield
    except ValueError as error:
        kind = InfeasibleError if isinstance(error, InfeasibleError) else ValueError
        raise kind(f"{which}: {error}") from error


def one_each(name: str, prompts: Sequence[Prompt], value: Any) -> Sequence[Any]:
    """Returns the values for the prompts: a list or tuple has one for each, any other value applies to all."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return [value] * len(prompts)
    if len(value) != len(prompts):
        raise ValueError(f"{name} has {len(value)} items for {len(prompts)} prompts; give one each")
    return value


def options_each(prompts: Sequence[Prompt], *values: Any) -> list[Callable[[], RequestOptions]]:
    """Returns what makes the options of each prompt, and raises ValueError for a value that is invalid.

    values: of the fields of RequestOptions, in order; each for all prompts, or one for each.
    """
    columns = [one_each(name, prompts, value) for name, value in zip(OPTION_NAMES, values, strict=True)]
    return [functools.partial(RequestOptions, *row) for row in zip(*columns, strict=True)]


def prompt_content(prompt: Prompt) -> str | Sequence[int]:
    """Returns the text or token ids of a prompt. Raises ValueError when it is neither."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        if set(prompt) == {"prompt"} and isinstance(prompt["prompt"], str):
            return prompt["prompt"]
        if set(prompt) == {"prompt_token_ids"} and not isinstance(prompt["prompt_token_ids"], str):
            return prompt["prompt_token_ids"]
        raise ValueError(f"prompt has the keys {sorted(prompt)}; it takes either 'prompt' or 'prompt_token_ids'")
    raise ValueError(
        f"prompt is of type {type(prompt).__name__}; it must be text, {{'prompt': text}} or {{'prompt_token_ids': ids}}"
    )
