"""Makes the masks of requests that forbid tokens by lists: bad_words, and allowed_token_ids too many for a slot."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as List

import numpy as np

from jaxserve.engine.constraints import pack_mask
from jaxserve.request import EngineRequest
from jaxserve.sampling_params import APART_FIELDS

_MOST_KEPT = 1024
"""Maximum number of requests whose fixed masks are kept; one that is not is made anew."""


class TokenMasks:
    """Implements `Constraints` for token lists.

    A bad word of several tokens forbids its last one where the output ends with the others, which may be from any
    earlier step; one of a single token is forbidden always.
    """

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._kept: OrderedDict[str, tuple[EngineRequest, np.ndarray]] = OrderedDict()

    def constrains(self, request: EngineRequest) -> bool:
        return bool(request.bad_words_token_ids) or _is_wide(request)

    def mask(self, request: EngineRequest, output_token_ids: List[int]) -> np.ndarray:
        mask = self._fixed(request)
        completing = [
            word[-1]
            for word in request.bad_words_token_ids
            if len(word) > 1 and _ends_with(output_token_ids, word[:-1])
        ]
        if completing:
            mask = mask.copy()
            _forbid(mask, completing)
        return mask

    def _fixed(self, request: EngineRequest) -> np.ndarray:
        """Returns the mask of what is forbidden whatever the output is; it must not be changed."""
        request_id, kept = request.request_id, self._kept.get(request.request_id)
        if kept is not None and kept[0] is request:
            self._kept.move_to_end(request_id)
            return kept[1]
        allowed = np.ones(self._vocab_size, bool)
        if _is_wide(request):
            allowed[:] = False
            allowed[list(request.allowed_token_ids or ())] = True
        allowed[[word[0] for word in request.bad_words_token_ids if len(word) == 1]] = False
        mask = pack_mask(allowed)
        mask.flags.writeable = False
        self._kept[request_id] = request, mask
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return mask


def _is_wide(request: EngineRequest) -> bool:
    ids = request.allowed_token_ids
    return ids is not None and not APART_FIELDS["allowed_token_ids"].used(ids)


def _ends_with(output_token_ids: List[int], prefix: tuple[int, ...]) -> bool:
    return len(output_token_ids) >= len(prefix) and tuple(output_token_ids[-len(prefix) :]) == prefix


def _forbid(mask: np.ndarray, token_ids: List[int]) -> None:
    for token_id in token_ids:
        mask[token_id // 32] &= np.uint32(~(1 << token_id % 32) & 0xFFFFFFFF)
