"""Constrains the tokens that requests may sample, by masks that are made while the device computes.

A mask is packed: uint32 [ceil(vocab_size / 32)], where bit v % 32 of word v // 32 allows token v.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as List
from typing import Protocol

import numpy as np

from jaxserve.request import EngineRequest
from jaxserve.scheduler import Sequence

_log = logging.getLogger(__name__)

ALL = 0xFFFFFFFF
"""A word of a mask that allows each of its tokens."""


class Constraints(Protocol):
    """Decides which tokens a request may sample. It is asked in the engine's process, between two steps."""

    def constrains(self, request: EngineRequest) -> bool:
        """Tells whether a request is constrained at all; called once, when it arrives."""
        ...

    def mask(self, request: EngineRequest, output_token_ids: List[int]) -> np.ndarray:
        """Returns the packed mask of the token that follows `output_token_ids`, all of the request's output so far."""
        ...


def pack_mask(allowed: np.ndarray) -> np.ndarray:
    """Packs bool [vocab_size], True for each token that may be drawn."""
    bits = np.zeros(-(-len(allowed) // 32) * 32, bool)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def masks_of(
    constraints: Constraints, sequences: List[Sequence | None], vocab_size: int
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Makes the masks of a step, uint32 [M, words], one for each of the sequences whose samples want one.

    A sequence that has ended (None) gets a mask that allows every token, since its sample is discarded. So does one
    whose mask cannot be made; the second result lists such requests, each with a one-line reason, and they must end.
    """
    words = -(-vocab_size // 32)
    masks = np.full((len(sequences), words), ALL, np.uint32)
    failed: list[tuple[str, str]] = []
    for place, sequence in enumerate(sequences):
        if sequence is None:
            continue
        try:
            mask = constraints.mask(sequence.request, sequence.output_token_ids)
            if mask.shape != (words,) or mask.dtype != np.uint32:
                raise ValueError(f"mask is {mask.dtype}{list(mask.shape)}; it must be uint32{[words]}, packed")
        except Exception as error:  # whatever a constraint stumbles over concerns its request alone
            _log.error("the mask of request %r cannot be made: %s", sequence.request_id, error, exc_info=error)
            failed.append((sequence.request_id, f"its mask cannot be made: {type(error).__name__}: {error}"))
        else:
            masks[place] = mask
    return masks, failed
