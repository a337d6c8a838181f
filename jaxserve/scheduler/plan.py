"""What one step computes: made by the scheduler, carried out by the runner."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxserve.kv_cache.page_pool import PageCopy
from jaxserve.request import EngineRequest
from jaxserve.scheduler.buckets import Buckets


@dataclasses.dataclass(frozen=True)
class Swap:
    """The pages of one sequence that change sides before a step, in table order.

    slot: None for a swap-out (device page to host page). For a swap-in (host page to device page) the slot that the
    sequence gets: the first entries of its page table become the destinations. The same plan has a chunk of that
    sequence, so what is restored is read at once.
    """

    request_id: str
    copies: tuple[PageCopy, ...]
    slot: int | None


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """One request's share of a step.

    order: its place in the order of arrival, which tells apart two requests that used one id after another.
    slot: its row in the device's slot arrays.
    start: tokens of the sequence computed before this step; the first token here has position `start`.
    token_ids: the ids to compute. Empty in a row that decodes: its one token is the one sampled last in the slot,
    whose id only the device may know yet.
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
    sample: bool
    suppress_stop: bool
    first_new_page: int
    new_pages: tuple[int, ...]
    admit: EngineRequest | None

    @property
    def decodes(self) -> bool:
        return not self.token_ids

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) or 1


@dataclasses.dataclass(frozen=True, eq=False)
class DecodeRows:
    """The R rows of a step that decode, as columns. Each computes the token sampled last and samples the next one.

    request_ids: R of them; orders: int64 [R]; slots, starts: int32 [R]; suppress_stop: bool [R]; as in `RowPlan`.
    page_rows, pages: int32 [P], the pages taken for this step and the row of each; a row takes one at most, for the
    tokens from `start` on.
    page_size: tokens a page.
    """

    request_ids: tuple[str, ...]
    orders: np.ndarray
    slots: np.ndarray
    starts: np.ndarray
    suppress_stop: np.ndarray
    page_rows: np.ndarray
    pages: np.ndarray
    page_size: int

    def __len__(self) -> int:
        return len(self.request_ids)

    def rows(self) -> Iterator[RowPlan]:
        """The same row by row."""
        new = dict(zip(self.page_rows.tolist(), self.pages.tolist(), strict=True))
        columns = zip(
            self.request_ids,
            self.orders.tolist(),
            self.slots.tolist(),
            self.starts.tolist(),
            self.suppress_stop.tolist(),
            strict=True,
        )
        for row, (request_id, order, slot, start, suppress_stop) in enumerate(columns):
            pages = (new[row],) if row in new else ()
            held = -(-(start + 1) // self.page_size)
            yield RowPlan(request_id, order, slot, start, (), True, suppress_stop, held - len(pages), pages, None)

    def part(self, begin: int, end: int) -> DecodeRows:
        """Rows `begin` to `end` - 1."""
        within = (self.page_rows >= begin) & (self.page_rows < end)
        return DecodeRows(
            request_ids=self.request_ids[begin:end],
            orders=self.orders[begin:end],
            slots=self.slots[begin:end],
            starts=self.starts[begin:end],
            suppress_stop=self.suppress_stop[begin:end],
            page_rows=self.page_rows[within] - begin,
            pages=self.pages[within],
            page_size=self.page_size,
        )

    @classmethod
    def of(cls, rows: Sequence[RowPlan], page_size: int) -> DecodeRows:
        """The columns of rows that decode and take a page at most."""
        new = [(index, page) for index, row in enumerate(rows) for page in row.new_pages]
        return cls(
            request_ids=tuple(row.request_id for row in rows),
            orders=np.array([row.order for row in rows], np.int64),
            slots=np.array([row.slot for row in rows], np.int32),
            starts=np.array([row.start for row in rows], np.int32),
            suppress_stop=np.array([row.suppress_stop for row in rows], bool),
            page_rows=np.array([index for index, _ in new], np.int32),
            pages=np.array([page for _, page in new], np.int32),
            page_size=page_size,
        )


NO_DECODES = DecodeRows.of((), 1)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step: first the rows that decode, then chunks of prompts, in the order in which they are packed, and the
    shapes they are padded to.

    token_bucket: tokens of the forward program. row_bucket: rows of the sample program; 0 when no row samples.
    num_sampled: rows that sample.
    swaps: carried out one after another before the forward program: a page freed by one may be filled by a later one
    or by the step itself.
    """

    step: int
    decodes: DecodeRows
    chunks: tuple[RowPlan, ...]
    token_bucket: int
    row_bucket: int
    num_tokens: int
    num_sampled: int
    swaps: tuple[Swap, ...] = ()

    @property
    def rows(self) -> tuple[RowPlan, ...]:
        """All rows one by one, in order: for reading, not for the hot path."""
        return (*self.decodes.rows(), *self.chunks)

    @property
    def sampled(self) -> tuple[RowPlan, ...]:
        """The rows that sample, in the order of `StepResult`."""
        return tuple(row for row in self.rows if row.sample)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of the rows, in order."""
        return (*self.decodes.request_ids, *(row.request_id for row in self.chunks))

    @property
    def num_rows(self) -> int:
        return len(self.decodes) + len(self.chunks)

    @property
    def num_prefill_tokens(self) -> int:
        return self.num_tokens - len(self.decodes)

    @property
    def decode_only(self) -> bool:
        """Whether no row computes more than one token."""
        return self.num_tokens == self.num_rows

    @property
    def padding(self) -> int:
        return self.token_bucket - self.num_tokens

    def parts(self, most_rows: int, buckets: Buckets) -> list[StepPlan]:
        """The same work as steps of at most `most_rows` rows, to be carried out one after another; the first makes the
        copies of pages. Rows keep their order, so the ids of the parts, put together, are those of the step."""
        decoding, parts = len(self.decodes), []
        for begin in range(0, self.num_rows, most_rows):
            end = begin + most_rows
            decodes = self.decodes.part(begin, end)
            chunks = self.chunks[max(0, begin - decoding) : max(0, end - decoding)]
            num_tokens = len(decodes) + sum(row.num_tokens for row in chunks)
            num_sampled = len(decodes) + sum(row.sample for row in chunks)
            parts.append(
                dataclasses.replace(
                    self,
                    decodes=decodes,
                    chunks=chunks,
                    token_bucket=buckets.token_bucket(num_tokens),
                    row_bucket=buckets.row_bucket(num_sampled),
                    num_tokens=num_tokens,
                    num_sampled=num_sampled,
                    swaps=() if parts else self.swaps,
                )
            )
        return parts


@dataclasses.dataclass(frozen=True, eq=False)
class Stretch:
    """Steps of the same R rows, which all decode, taken at once: `starts` int32 [R] are as of the first of them."""

    request_ids: tuple[str, ...]
    starts: np.ndarray
    steps: int


@dataclasses.dataclass(frozen=True, eq=False)
class StepResult:
    """The sampled ids of a step, one for each of `StepPlan.sampled` in order: int32 [num_sampled], or a sequence.

    NOT_FINITE stands for a row whose logits were not finite: that request fails, its neighbours do not.
    """

    token_ids: Sequence[int] | np.ndarray


NOT_FINITE = -1
