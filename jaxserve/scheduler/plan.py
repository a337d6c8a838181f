"""What one step computes: made by the scheduler, carried out by the runner."""

from __future__ import annotations

import dataclasses

from jaxserve.request import EngineRequest


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """One request's share of a step.

    order: its place in the order of arrival, which tells apart two requests that used one id after another.
    slot: its row in the device's slot arrays.
    start: tokens of the sequence computed before this step; the first token here has position `start`.
    token_ids: ids known to the host. from_slot: one more token follows them, the one sampled last, whose id only the
    device may know yet: it is read from the slot.
    sample: the last token's hidden state yields a new token, of position `start + num_tokens`.
    suppress_stop: stop token ids cannot be drawn yet (min_tokens).
    first_new_page, new_pages: the pages taken for this step and the index in the page table of the first of them.
    admit: set in the step that gives the request its slot; its sampling parameters are written there.
    """

    request_id: str
    order: int
    slot: int
    start: int
    token_ids: tuple[int, ...]
    from_slot: bool
    sample: bool
    suppress_stop: bool
    first_new_page: int
    new_pages: tuple[int, ...]
    admit: EngineRequest | None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.from_slot


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step: rows in the order in which they are packed, and the shapes they are padded to.

    token_bucket: tokens of the forward program. row_bucket: rows of the sample program; 0 when no row samples.
    """

    step: int
    rows: tuple[RowPlan, ...]
    token_bucket: int
    row_bucket: int
    num_tokens: int
    num_prefill_tokens: int

    @property
    def sampled(self) -> tuple[RowPlan, ...]:
        return tuple(row for row in self.rows if row.sample)

    @property
    def decode_only(self) -> bool:
        """Whether no row computes more than one token."""
        return self.num_tokens == len(self.rows)

    @property
    def padding(self) -> int:
        return self.token_bucket - self.num_tokens


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The sampled ids of a step, one for each of `StepPlan.sampled` in order.

    NOT_FINITE stands for a row whose logits were not finite: that request fails, its neighbours do not.
    """

    token_ids: tuple[int, ...]


NOT_FINITE = -1
