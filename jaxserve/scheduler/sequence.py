"""The scheduler's record of one request while it lives."""

from __future__ import annotations

from jaxserve.request import EngineRequest, RequestStatus


class Sequence:
    """A request, its tokens so far, and what it holds.

    order: place in the order of arrival. num_computed: tokens whose keys and values are in pages (or will be, by the
    steps dispatched). num_pending: tokens sampled by dispatched steps whose ids the host has not read yet.
    """

    def __init__(self, request: EngineRequest, order: int):
        self.request = request
        self.order = order
        self.status = RequestStatus.WAITING
        self.output_token_ids: list[int] = []
        self.num_computed = 0
        self.num_pending = 0
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.pages: list[int] = []
        self.slot: int | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_known(self) -> int:
        """Tokens whose ids the host knows."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, the pending ones included."""
        return self.num_known + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Tokens left to compute; 0 when the last token allowed is sampled, which needs no computing."""
        if len(self.output_token_ids) + self.num_pending >= self.request.max_tokens:
            return 0
        return self.num_tokens - self.num_computed

    @property
    def decoding(self) -> bool:
        """Only the token sampled last is left to compute."""
        return self.num_computed >= self.num_prompt_tokens and self.num_tokens - self.num_computed == 1

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def known_token_ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Ids of the known tokens at positions start to stop - 1 (fewer where not known yet)."""
        prompt = self.request.prompt_token_ids
        split = len(prompt)
        if start >= split:
            return tuple(self.output_token_ids[start - split : stop - split])
        return prompt[start:stop] + tuple(self.output_token_ids[: max(0, stop - split)])
