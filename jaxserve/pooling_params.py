"""Defines what a request for an embedding may ask for, and makes the embedding of a pooled hidden state. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from jaxserve.config.pooler_config import POOLING_TYPES
from jaxserve.config.sampling_fields import MAX_INT32
from jaxserve.config.shown import shown
from jaxserve.request import Pooling
from jaxserve.request_checks import InfeasibleError, ModelLimits


def pooling_of(name: str, value: object) -> Pooling:
    """Returns the kind of pooling that a text names, in upper or lower case. Raises ValueError naming the field."""
    kind = Pooling.__members__.get(value.upper()) if isinstance(value, str) else None
    if kind is None:
        raise ValueError(f"{name} is {shown(value)}; it must be one of {', '.join(POOLING_TYPES)}")
    return kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """Controls how a prompt is embedded. Names are vLLM's. Raises ValueError, where it is made, naming the field.

    Attributes:
        pooling_type: LAST, MEAN or CLS: the final hidden state of the last token, the mean of all tokens', or that of
            the first. None: as the server is configured, else as the checkpoint says, else LAST.
        normalize: the embedding has length 1. None: as for pooling_type; else true.
        dimensions: only the first so many numbers are kept, and normalized anew where they are normalized: for models
            that were trained so (Matryoshka). None keeps all.
        truncate_prompt_tokens: a longer prompt is cut to its last so many tokens; -1 cuts it to what the model takes.
            None refuses a prompt that is too long.
    """

    pooling_type: str | None = None
    normalize: bool | None = None
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None

    max_tokens: ClassVar[int] = 1
    """Where requests are admitted, an embedding counts as one output token."""

    n: ClassVar[int] = 1
    """And as one sample."""

    def __post_init__(self) -> None:
        if self.pooling_type is not None:
            object.__setattr__(self, "pooling_type", pooling_of("pooling_type", self.pooling_type).name)
        if self.normalize is not None and not isinstance(self.normalize, bool):
            raise ValueError(f"normalize is {shown(self.normalize)}; it must be true or false")
        _check_whole("dimensions", self.dimensions, 1)
        _check_whole("truncate_prompt_tokens", self.truncate_prompt_tokens, -1)
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens is 0; it must be at least 1, or -1 for what the model takes")

    def kind(self, limits: ModelLimits) -> Pooling:
        """Returns the kind of pooling, of the model where the request does not say."""
        return limits.pooling if self.pooling_type is None else Pooling[self.pooling_type]

    def check(self, limits: ModelLimits) -> None:
        """Checks what depends on the model. Raises ValueError."""
        if self.dimensions is not None and self.dimensions > limits.embedding_size:
            raise ValueError(
                f"dimensions is {self.dimensions}; the model's embeddings have {limits.embedding_size}: ask for at "
                "most as many"
            )
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens > most_tokens(limits):
            raise ValueError(
                f"truncate_prompt_tokens is {self.truncate_prompt_tokens}; the model takes at most "
                f"{most_tokens(limits)} tokens: lower it, or give -1"
            )

    def kept_tokens(self, limits: ModelLimits) -> int | None:
        """Returns the tokens at the end of a prompt that are embedded; None for all."""
        return most_tokens(limits) if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens

    def embedding(self, pooled: bytes, limits: ModelLimits) -> bytes:
        """Makes the embedding of a pooled hidden state.

        Args:
            pooled: float64 numbers, as bytes.
            limits: of the model.

        Returns:
            Its numbers as float32, in little-endian order.
        """
        values = np.frombuffer(pooled, np.float64)[: self.dimensions]
        if limits.normalize if self.normalize is None else self.normalize:
            length = np.sqrt(np.sum(np.square(values)))
            values = values / max(length, _LEAST_LENGTH)
        return values.astype("<f4").tobytes()


_LEAST_LENGTH = 1e-12
"""Stands for the length of a vector of zeros, as in torch's normalize."""


def check_pooled_length(length: int, limits: ModelLimits, *, size: str = "") -> None:
    """Checks how long a prompt to be embedded is; arguments and errors are those of `request.check_length`."""
    prompt = f"prompt has {f'{size}, at least ' if size else ''}{length} tokens"
    if not length:
        raise ValueError("prompt is empty; at least one token is needed")
    for name, limit, remedy in (
        ("max_model_len", limits.max_model_len, "shorten it or set truncate_prompt_tokens"),
        ("max_num_batched_tokens", limits.max_prompt_len, "without chunked prefill it must fit: shorten it"),
    ):
        if length > limit:
            raise ValueError(f"{prompt}; at most {name} {limit} are allowed: {remedy}")
    if length > limits.pool_tokens:
        raise InfeasibleError(
            f"{prompt}; they exceed the page pool of {limits.pool_tokens} tokens: shorten it or give the server more "
            "pages"
        )


def most_tokens(limits: ModelLimits) -> int:
    """Returns the tokens of the longest prompt that can be embedded."""
    return min(limits.max_model_len, limits.max_prompt_len, limits.pool_tokens)


def cosine(first: bytes, second: bytes) -> float:
    """Returns the cosine of the angle between two embeddings, each float32 numbers as bytes."""
    a, b = (np.frombuffer(data, "<f4").astype(np.float64) for data in (first, second))
    return float(a @ b / max(float(np.sqrt(a @ a) * np.sqrt(b @ b)), _LEAST_LENGTH))


def pair_scores(embeddings: Sequence[bytes], num_first: int) -> list[float]:
    """Returns the cosine of each pair: of the first `num_first` embeddings with the others, one with each of several or
    each with its own.
    """
    first, second = embeddings[:num_first], embeddings[num_first:]
    firsts = [first[0]] * len(second) if num_first == 1 else first
    return [cosine(one, other) for one, other in zip(firsts, second, strict=True)]


def _check_whole(name: str, value: object, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_INT32:
        raise ValueError(f"{name} is {shown(value)}; it must be a whole number from {least} to {MAX_INT32}")
