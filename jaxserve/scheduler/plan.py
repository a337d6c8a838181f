"""The plan of one step: the scheduler makes it and the runner carries it out."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxserve.kv_cache.page_pool import PageCopy
from jaxserve.request import EngineRequest
from jaxserve.scheduler.buckets import Buckets

TABLE_RUN = 64
"""Pages of one `PageTableWrite` at most."""


@dataclasses.dataclass(frozen=True)
class PageTableWrite:
    """A run of entries of one page table, set before the forward program: those from `first` on become `pages`.

    group: of the layers whose table it is; 0 where all layers are alike. pages: at most TABLE_RUN.

    The pages that rows take for their own tokens need none: `RowPlan.new_pages` and `DecodeRows.pages` say them.
    """

    group: int
    slot: int
    first: int
    pages: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.pages) <= TABLE_RUN:
            raise ValueError(f"pages has {len(self.pages)} pages; one write has 1 to {TABLE_RUN}: make several")


def table_writes(group: int, slot: int, pages: Sequence[int]) -> list[PageTableWrite]:
    """Splits the first entries of a page table into runs of at most TABLE_RUN."""
    runs = range(0, len(pages), TABLE_RUN)
    return [PageTableWrite(group, slot, first, tuple(pages[first : first + TABLE_RUN])) for first in runs]


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """One request's share of a step.

    order: its place in the order of arrival, which tells apart two requests that used one id after another.
    slot: its row in the device's slot arrays.
    start: tokens of the sequence computed before this step; the first token here has position `start`.
    token_ids: the ids to compute. Empty in a row that decodes: its first token is the one sampled last in the slot,
    whose id only the device may know yet.
    first_new_page, new_pages: the pages taken for this step and the index in the page table of the first of them.
    admit: set in the step that gives the request its slot; its sampling parameters are written there.
    count: tokens of a row that decodes, as in `DecodeRows`.
    """

    request_id: str
    order: int
    slot: int
    start: int
    token_ids: tuple[int, ...]
    first_new_page: int
    new_pages: tuple[int, ...]
    admit: EngineRequest | None
    count: int = 1

    @property
    def decodes(self) -> bool:
        return not self.token_ids

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) or self.count


@dataclasses.dataclass(frozen=True, eq=False)
class DecodeRows:
    """The R rows of a step that decode, as columns. Each computes the token sampled last and samples the next one.

    request_ids: R of them; orders: int64 [R]; slots, starts: int32 [R]; as in `RowPlan`.
    page_rows, pages: int32 [P], the pages taken for this step and the row of each; a row takes one at most, for the
    tokens from `start` on.
    page_size: tokens a page.
    counts: int32 [R], tokens of each row: the one sampled last and guesses of the device's, whose samples tell how many
    of them hold. None is one each. A `start` then counts what steps in flight yield at most; what they do yield, and so
    the true position, only the device knows.
    """

    request_ids: tuple[str, ...]
    orders: np.ndarray
    slots: np.ndarray
    starts: np.ndarray
    page_rows: np.ndarray
    pages: np.ndarray
    page_size: int
    counts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.request_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.request_ids) if self.counts is None else int(self.counts.sum())

    def rows(self) -> Iterator[RowPlan]:
        """Yields the same row by row."""
        new = dict(zip(self.page_rows.tolist(), self.pages.tolist(), strict=True))
        counts = [1] * len(self) if self.counts is None else self.counts.tolist()
        columns = zip(
            self.request_ids, self.orders.tolist(), self.slots.tolist(), self.starts.tolist(), counts, strict=True
        )
        for row, (request_id, order, slot, start, count) in enumerate(columns):
            pages = (new[row],) if row in new else ()
            held = -(-(start + count) // self.page_size)
            yield RowPlan(request_id, order, slot, start, (), held - len(pages), pages, None, count)

    def part(self, begin: int, end: int) -> DecodeRows:
        """Returns rows `begin` to `end` - 1."""
        within = (self.page_rows >= begin) & (self.page_rows < end)
        return DecodeRows(
            request_ids=self.request_ids[begin:end],
            orders=self.orders[begin:end],
            slots=self.slots[begin:end],
            starts=self.starts[begin:end],
            page_rows=self.page_rows[within] - begin,
            pages=self.pages[within],
            page_size=self.page_size,
            counts=None if self.counts is None else self.counts[begin:end],
        )

    @classmethod
    def of(cls, rows: Sequence[RowPlan], page_size: int) -> DecodeRows:
        """Makes the columns of rows that decode one token and take a page at most."""
        new = [(index, page) for index, row in enumerate(rows) for page in row.new_pages]
        return cls(
            request_ids=tuple(row.request_id for row in rows),
            orders=np.array([row.order for row in rows], np.int64),
            slots=np.array([row.slot for row in rows], np.int32),
            starts=np.array([row.start for row in rows], np.int32),
            page_rows=np.array([index for index, _ in new], np.int32),
            pages=np.array([page for _, page in new], np.int32),
            page_size=page_size,
        )


NO_DECODES = DecodeRows.of((), 1)


class Wants(enum.IntFlag):
    """What a sample needs or yields beside its token id."""

    NONE = 0
    MASK = 1
    """Only tokens of a mask may be drawn, which is given to `Runner.dispatch_sample`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """The tokens that a step draws, as columns of S entries, in the order of `StepResult`: those of the rows that
    decode, `counts` of each, then those of the chunks.

    hidden_rows: int32 [S], the token of the step whose hidden state each is drawn from.
    slots: int32 [S], whose sampling parameters count. positions: int32 [S], of the token drawn.
    suppress_stop: bool [S], stop token ids cannot be drawn yet (min_tokens).
    wants: uint8 [S], the `Wants` of each; None where nobody wants more than the id.
    """

    hidden_rows: np.ndarray
    slots: np.ndarray
    positions: np.ndarray
    suppress_stop: np.ndarray
    wants: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def masked(self) -> np.ndarray:
        """Indices of the samples that want a mask, in order: int64 [M]."""
        return _NO_PLACES if self.wants is None else (self.wants & Wants.MASK).nonzero()[0]

    def followed_by(self, more: Sequence[tuple[int, int, int, bool, int]]) -> Samples:
        """Returns these and then others, each given as (hidden row, slot, position, suppress_stop, wants)."""
        count = len(self.slots)
        columns = np.empty((5, count + len(more)), np.int32)
        columns[0, :count] = self.hidden_rows
        columns[1, :count] = self.slots
        columns[2, :count] = self.positions
        columns[3, :count] = self.suppress_stop
        columns[4, :count] = 0 if self.wants is None else self.wants
        for place, sample in enumerate(more, start=count):
            columns[:, place] = sample
        unwanting = self.wants is None and not any(sample[4] for sample in more)
        wants = None if unwanting else columns[4].astype(np.uint8)
        return Samples(columns[0], columns[1], columns[2], columns[3].astype(bool), wants)

    def within(self, begin: int, end: int) -> Samples:
        """Returns those of the tokens `begin` to `end` - 1, as they are in a step of these tokens alone."""
        inside = (self.hidden_rows >= begin) & (self.hidden_rows < end)
        return Samples(
            hidden_rows=self.hidden_rows[inside] - begin,
            slots=self.slots[inside],
            positions=self.positions[inside],
            suppress_stop=self.suppress_stop[inside],
            wants=None if self.wants is None else self.wants[inside],
        )

    @classmethod
    def of(cls, samples: Iterable[tuple[int, int, int, bool, int]]) -> Samples:
        """Makes the columns of samples given as `followed_by` takes them."""
        return NO_SAMPLES.followed_by(list(samples))


_NO_PLACES = np.zeros(0, np.int64)
NO_SAMPLES = Samples(*(np.zeros(0, np.int32) for _ in range(3)), suppress_stop=np.zeros(0, bool))


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step: first the rows that decode, then chunks of prompts, in the order in which they are packed, what is
    sampled of them, and the shapes they are padded to.

    token_bucket: tokens of the forward program. row_bucket: rows of the sample program; 0 when nothing is sampled.
    copies: carried out one after another before anything else of the step: a page freed by one may be filled by a later
    one or by the step itself. table_writes: made after them and before the forward program.
    """

    step: int
    decodes: DecodeRows
    chunks: tuple[RowPlan, ...]
    samples: Samples
    token_bucket: int
    row_bucket: int
    num_tokens: int
    copies: tuple[PageCopy, ...] = ()
    table_writes: tuple[PageTableWrite, ...] = ()

    @property
    def num_sampled(self) -> int:
        return len(self.samples.slots)

    @property
    def constrained(self) -> bool:
        """Whether a sample wants a mask, so that sampling waits for it."""
        return self.samples.wants is not None and len(self.samples.masked) > 0

    @property
    def rows(self) -> tuple[RowPlan, ...]:
        """All rows one by one, in order: for reading, not for the hot path."""
        return (*self.decodes.rows(), *self.chunks)

    @property
    def sampled(self) -> tuple[RowPlan, ...]:
        """The row of each sample, in the order of `StepResult`: for reading, not for the hot path."""
        by_slot = {row.slot: row for row in self.rows}
        return tuple(by_slot[slot] for slot in self.samples.slots.tolist())

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of the rows, in order."""
        return (*self.decodes.request_ids, *(row.request_id for row in self.chunks))

    @property
    def num_rows(self) -> int:
        return len(self.decodes) + len(self.chunks)

    @property
    def num_prefill_tokens(self) -> int:
        return self.num_tokens - self.decodes.num_tokens

    @property
    def decode_only(self) -> bool:
        """Whether no row computes more than one token."""
        return self.num_tokens == self.num_rows

    @property
    def padding(self) -> int:
        return self.token_bucket - self.num_tokens

    def parts(self, most_rows: int, buckets: Buckets) -> list[StepPlan]:
        """Splits the work into steps of at most `most_rows` rows, to be carried out one after another; the first makes
        the copies of pages and the writes to page tables. Rows and samples keep their order, so the ids of the parts,
        put together, are those of the step."""
        decoding, end_token, parts = len(self.decodes), 0, []
        for begin in range(0, max(1, self.num_rows), most_rows):
            end = begin + most_rows
            decodes = self.decodes.part(begin, end)
            chunks = self.chunks[max(0, begin - decoding) : max(0, end - decoding)]
            num_tokens = decodes.num_tokens + sum(row.num_tokens for row in chunks)
            samples = self.samples.within(end_token, end_token + num_tokens)
            end_token += num_tokens
            parts.append(
                dataclasses.replace(
                    self,
                    decodes=decodes,
                    chunks=chunks,
                    samples=samples,
                    token_bucket=buckets.token_bucket(num_tokens),
                    row_bucket=buckets.row_bucket(len(samples)),
                    num_tokens=num_tokens,
                    copies=() if parts else self.copies,
                    table_writes=() if parts else self.table_writes,
                )
            )
        return parts


@dataclasses.dataclass(frozen=True, eq=False)
class FastForward:
    """Steps of the same R rows, which all decode, taken at once: `starts` int32 [R] are as of the first of them."""

    request_ids: tuple[str, ...]
    starts: np.ndarray
    steps: int


@dataclasses.dataclass(frozen=True, eq=False)
class StepResult:
    """What a step yields, as columns; those that not every step has are None in the others.

    token_ids: int32 [num_sampled] or a sequence, the id of each of `StepPlan.samples`. NOT_FINITE stands for one whose
    logits were not finite, NOTHING_ALLOWED for one whose mask left no token: that request fails, its neighbours do not.
    counts: int32 [R], of the samples of each row that decodes how many hold, from the first on and at least one; the
    others are of no use. None where every row has one sample.
    """

    token_ids: Sequence[int] | np.ndarray
    counts: Sequence[int] | np.ndarray | None = None


NOT_FINITE = -1
NOTHING_ALLOWED = -2
