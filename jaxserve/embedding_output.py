"""Defines what `LLM.embed` and `AsyncLLM.encode` return. Names are vLLM's."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class EmbeddingOutput:
    """Holds an embedding: float32 numbers."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Number of the embedding's numbers."""
        return len(self.embedding)

    @classmethod
    def from_bytes(cls, data: bytes) -> EmbeddingOutput:
        """Reads float32 numbers in little-endian order."""
        return cls(np.frombuffer(data, "<f4").tolist())


@dataclasses.dataclass(frozen=True)
class EmbeddingRequestOutput:
    """Holds a prompt and its embedding.

    prompt: None when token ids were given. num_cached_tokens: prompt tokens taken from the prefix cache. error: one
    line when there is no embedding, because its deadline passed or it failed in the engine; outputs.embedding is then
    empty. num_truncated_tokens: cut off the beginning of the prompt, as truncate_prompt_tokens asks; prompt_token_ids
    are the others.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: EmbeddingOutput
    finished: bool = True
    num_cached_tokens: int = 0
    error: str = ""
    num_truncated_tokens: int = 0
