"""Defines the plan of one step: the scheduler makes it and the runner executes it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxserve.kv_cache.page_pool import PageCopy
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import EngineRequest
from jaxserve.scheduler.buckets import Buckets

TABLE_RUN = 64
"""Maximum number of pages in one `PageTableWrite`."""


@dataclasses.dataclass(frozen=True)
class PageTableWrite:
    """Sets a run of entries of one slot's page table before the forward program: entries from `first` on become
    `pages`.

    group: the group of layers that the table belongs to; 0 where all layers are alike. pages: at most TABLE_RUN.

    Pages that rows allocate for their own tokens need no such write: `RowPlan.new_pages` and `DecodeRows.pages`, and
    `more_pages` of both, carry them.
    """

    group: int
    slot: int
    first: int
    pages: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.pages) <= TABLE_RUN:
            raise ValueError(f"pages has {len(self.pages)} pages; one write has 1 to {TABLE_RUN}: make several")


def table_writes(group: int, slot: int, pages: Sequence[int], begin: int = 0) -> list[PageTableWrite]:
    """Splits the entries of a page table from index `begin` on into runs of at most TABLE_RUN."""
    runs = range(begin, len(pages), TABLE_RUN)
    return [PageTableWrite(group, slot, first, tuple(pages[first : first + TABLE_RUN])) for first in runs]


@dataclasses.dataclass(frozen=True)
class PenaltyWrite:
    """Makes a penalty row that of one sequence, before the sample program: it then has the ids of the prompt and counts
    those of the output, and nothing else.

    row: its number. The steps add the ids that they draw themselves, so that only a sequence that gets its slot needs
    this: a new one, or one that comes back.
    """

    row: int
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PooledTokens:
    """Names the tokens of a chunk whose hidden states are pooled: `count` of them from the chunk's token `first` on;
    there may be none.

    last: the chunk is the prompt's last, and nothing is sampled after it.
    """

    first: int
    count: int
    last: bool


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Describes one request's share of a step.

    order: its index in order of arrival, which distinguishes two requests that used the same id one after the other.
    slot: its row in the device's slot arrays.
    start: tokens of the sequence computed before this step; the first token here has position `start`.
    token_ids: the ids to compute. Empty in a row that decodes: its first token is the one sampled last in the slot,
    whose id only the device may know yet.
    first_new_page, new_pages: the pages allocated for this step and the page-table index of the first of them.
    more_pages: where layers are of several groups, as many pages for each group after the first; new_pages are those
    of the first.
    admit: set in the step that gives the request its slot; its sampling parameters are written there.
    count: tokens of a decoding row, as in `DecodeRows`. penalty_row: with `admit`, the row of its penalties; None where
    it has none. pooled: set in a chunk of a prompt that is embedded, if some of its tokens are pooled or it is the
    last.
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
    penalty_row: int | None = None
    pooled: PooledTokens | None = None
    more_pages: tuple[tuple[int, ...], ...] = ()

    @property
    def decodes(self) -> bool:
        return not self.token_ids

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) or self.count


@dataclasses.dataclass(frozen=True)
class Fork:
    """Describes a request that joins a step without computing a token: its prompt is that of a chunk, from whose hidden
    state its first token is drawn too. `StepPlan.table_writes` has its page table.

    order, slot, admit, penalty_row: as in `RowPlan`.
    """

    request_id: str
    order: int
    slot: int
    admit: EngineRequest
    penalty_row: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class DecodeRows:
    """Holds the R decoding rows of a step as columns. Each computes the token sampled last and samples the next one.

    request_ids: R of them; orders: int64 [R]; slots, starts: int32 [R]; as in `RowPlan`.
    page_rows, pages: int32 [P], the pages allocated for this step and the row of each; a row gets at most one, for the
    tokens from `start` on. more_pages: int32 [G - 1, P], where layers are of G groups, the pages of the groups after
    the first; None for one group.
    page_size: tokens a page.
    counts: int32 [R], tokens of each row: the token sampled last and draft tokens of the device, whose samples
    determine how many are accepted. None means one each. With drafts, `start` is an upper bound: it assumes that steps
    in flight accept all drafts, and only the device knows the true position.
    """

    request_ids: tuple[str, ...]
    orders: np.ndarray
    slots: np.ndarray
    starts: np.ndarray
    page_rows: np.ndarray
    pages: np.ndarray
    page_size: int
    counts: np.ndarray | None = None
    more_pages: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.request_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.request_ids) if self.counts is None else int(self.counts.sum())

    def rows(self) -> Iterator[RowPlan]:
        """Yields the rows one by one as `RowPlan`s."""
        new = dict(zip(self.page_rows.tolist(), self.pages.tolist(), strict=True))
        more = {} if self.more_pages is None else dict(zip(new, self.more_pages.T.tolist(), strict=True))
        counts = [1] * len(self) if self.counts is None else self.counts.tolist()
        columns = zip(
            self.request_ids, self.orders.tolist(), self.slots.tolist(), self.starts.tolist(), counts, strict=True
        )
        for row, (request_id, order, slot, start, count) in enumerate(columns):
            pages = (new[row],) if row in new else ()
            held = -(-(start + count) // self.page_size)
            others = tuple([(page,) for page in more.get(row, ())])
            first = held - len(pages)
            yield RowPlan(request_id, order, slot, start, (), first, pages, None, count, more_pages=others)

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
            more_pages=None if self.more_pages is None else self.more_pages[:, within],
        )

    @classmethod
    def of(cls, rows: Sequence[RowPlan], page_size: int) -> DecodeRows:
        """Builds the columns from rows that each decode one token and allocate at most one page."""
        new = [(index, page) for index, row in enumerate(rows) for page in row.new_pages]
        more = [[page for (page,) in row.more_pages] for row in rows if row.more_pages]
        return cls(
            request_ids=tuple(row.request_id for row in rows),
            orders=np.array([row.order for row in rows], np.int64),
            slots=np.array([row.slot for row in rows], np.int32),
            starts=np.array([row.start for row in rows], np.int32),
            page_rows=np.array([index for index, _ in new], np.int32),
            pages=np.array([page for _, page in new], np.int32),
            page_size=page_size,
            more_pages=np.array(more, np.int32).T if more else None,
        )


NO_DECODES = DecodeRows.of((), 1)


class Wants(enum.IntFlag):
    """Flags what a sample needs or returns beside its token id."""

    NONE = 0
    MASK = 1
    """The token is drawn under a mask, which is passed to `Runner.dispatch_sample`."""
    LOGPROBS = 2
    """The token's log-probability, its rank and the likeliest ids are returned (`StepResult.logprobs`)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Holds the S tokens that a step samples, as columns in the order of `StepResult`: first those of the decoding
    rows, `counts` of each, then those of the chunks.

    hidden_rows: int32 [S], index of the token in the step whose hidden state each sample is drawn from.
    slots: int32 [S], whose sampling parameters apply. positions: int32 [S], position of the sampled token.
    suppress_stop: bool [S], stop token ids must not be sampled yet (min_tokens).
    wants: uint8 [S], the `Wants` of each; None when no sample wants more than the id.
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
        """Returns the indices of the samples that want a mask, in order: int64 [M]."""
        return _NO_PLACES if self.wants is None else self.wanting(Wants.MASK).nonzero()[0]

    def wanting(self, want: Wants) -> np.ndarray:
        """Returns bool [S], which samples want something."""
        return np.zeros(len(self), bool) if self.wants is None else (self.wants & want) > 0

    def followed_by(self, more: Sequence[tuple[int, int, int, bool, int]]) -> Samples:
        """Appends samples and returns the result.

        Args:
            more: the samples to append, each as (hidden row, slot, position, suppress_stop, wants).
        """
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
        """Returns the samples of tokens `begin` to `end` - 1, renumbered for a step of those tokens alone."""
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
        """Builds the columns from samples given in the form that `followed_by` takes."""
        return NO_SAMPLES.followed_by(list(samples))


_NO_PLACES = np.zeros(0, np.int64)
NO_SAMPLES = Samples(*(np.zeros(0, np.int32) for _ in range(3)), suppress_stop=np.zeros(0, bool))


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Holds the N prompt tokens whose log-probabilities a step returns, as columns in the order of `StepResult.scores`.

    hidden_rows: int32 [N], index in the step of the token before each, from whose hidden state it is scored.
    targets: int32 [N], ids of the tokens scored.
    owners: request id, order and number of tokens of each request among them, in order. Empty in a part of a step.
    """

    hidden_rows: np.ndarray
    targets: np.ndarray
    owners: tuple[tuple[str, int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def within(self, begin: int, end: int) -> Scores:
        """Returns those scored from tokens `begin` to `end` - 1, renumbered for a step of these tokens alone."""
        inside = (self.hidden_rows >= begin) & (self.hidden_rows < end)
        return Scores(self.hidden_rows[inside] - begin, self.targets[inside])

    @classmethod
    def of(cls, scored: Sequence[tuple[str, int, int, Sequence[int]]]) -> Scores:
        """Builds the columns from (request id, order, first hidden row, targets of consecutive rows)."""
        if not scored:
            return NO_SCORES
        rows = [np.arange(first, first + len(targets), dtype=np.int32) for _, _, first, targets in scored]
        targets = [np.array(targets, np.int32) for _, _, _, targets in scored]
        owners = tuple((request_id, order, len(targets)) for request_id, order, _, targets in scored)
        return cls(np.concatenate(rows), np.concatenate(targets), owners)


NO_SCORES = Scores(np.zeros(0, np.int32), np.zeros(0, np.int32))


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Describes one step: its decoding rows, then its prompt chunks, in packing order; what is sampled; and the bucket
    sizes that both are padded to.

    token_bucket: tokens of the forward program. row_bucket: rows of the sample program; 0 when nothing is sampled.
    copies: page copies, executed in order before the rest of the step: a page freed by one may be filled by a later one
    or by the step itself. table_writes, penalty_writes: applied after the copies and before the forward program.
    scores: prompt tokens whose log-probabilities are wanted. forks: further samples of prompts that the chunks
    complete; token_bucket has room for a row of each, beside the chunks.
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
    penalty_writes: tuple[PenaltyWrite, ...] = ()
    scores: Scores = NO_SCORES
    forks: tuple[Fork, ...] = ()

    @property
    def num_sampled(self) -> int:
        return len(self.samples.slots)

    @property
    def constrained(self) -> bool:
        """Tells whether any sample wants a mask, in which case sampling waits for it."""
        return self.samples.wants is not None and len(self.samples.masked) > 0

    @property
    def wants_logprobs(self) -> bool:
        """Tells whether any sample wants log-probabilities, which are fetched from the device only then."""
        return self.samples.wants is not None and bool(self.samples.wanting(Wants.LOGPROBS).any())

    @property
    def rows(self) -> tuple[RowPlan, ...]:
        """Returns all rows one by one, in order. For inspection, not for the hot path."""
        return (*self.decodes.rows(), *self.chunks)

    @property
    def sampled(self) -> tuple[RowPlan | Fork, ...]:
        """Returns the row or fork of each sample, in the order of `StepResult`. For inspection, not for the hot
        path."""
        by_slot = {row.slot: row for row in (*self.rows, *self.forks)}
        return tuple(by_slot[slot] for slot in self.samples.slots.tolist())

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Returns the request ids of the rows and forks, in order."""
        return (*self.decodes.request_ids, *(row.request_id for row in (*self.chunks, *self.forks)))

    @property
    def num_rows(self) -> int:
        return len(self.decodes) + len(self.chunks)

    @property
    def num_prefill_tokens(self) -> int:
        return self.num_tokens - self.decodes.num_tokens

    @property
    def pooled_rows(self) -> tuple[RowPlan, ...]:
        """Returns the chunks of which tokens are pooled, in order."""
        return tuple(row for row in self.chunks if row.pooled is not None)

    @property
    def num_pooled(self) -> int:
        """Returns the number of chunks of which tokens are pooled."""
        return len(self.pooled_rows)

    @property
    def decode_only(self) -> bool:
        """Tells whether no row computes more than one token."""
        return self.num_tokens == self.num_rows

    @property
    def padding(self) -> int:
        return self.token_bucket - self.num_tokens

    def parts(self, most_rows: int, buckets: Buckets) -> list[StepPlan]:
        """Splits the plan into steps of at most `most_rows` rows, to be run one after another.

        The first part makes the page copies and the writes to page tables and penalty rows. Rows and samples keep their
        order, so concatenating the ids of the parts gives those of the step. A fork is in the part of the chunk that it
        is drawn from.

        Args:
            most_rows: maximum number of rows of one part.
            buckets: the sizes that each part is padded to.
        """
        decoding, end_token, parts = len(self.decodes), 0, []
        for begin in range(0, max(1, self.num_rows), most_rows):
            end = begin + most_rows
            decodes = self.decodes.part(begin, end)
            chunks = self.chunks[max(0, begin - decoding) : max(0, end - decoding)]
            num_tokens = decodes.num_tokens + sum(row.num_tokens for row in chunks)
            samples = self.samples.within(end_token, end_token + num_tokens)
            scores = self.scores.within(end_token, end_token + num_tokens) if len(self.scores) else NO_SCORES
            end_token += num_tokens
            slots = set(samples.slots.tolist()) if self.forks else ()
            forks = tuple(fork for fork in self.forks if fork.slot in slots)
            parts.append(
                dataclasses.replace(
                    self,
                    decodes=decodes,
                    chunks=chunks,
                    samples=samples,
                    token_bucket=buckets.token_bucket(max(num_tokens, len(chunks) + len(forks))),
                    row_bucket=buckets.row_bucket(len(samples)),
                    num_tokens=num_tokens,
                    forks=forks,
                    copies=() if parts else self.copies,
                    table_writes=() if parts else self.table_writes,
                    penalty_writes=() if parts else self.penalty_writes,
                    scores=scores,
                )
            )
        return parts


@dataclasses.dataclass(frozen=True, eq=False)
class FastForward:
    """Represents several decode steps of the same R rows taken at once.

    starts: int32 [R], as of the first of the steps.
    """

    request_ids: tuple[str, ...]
    starts: np.ndarray
    steps: int


@dataclasses.dataclass(frozen=True, eq=False)
class StepResult:
    """Holds the results of a step as columns; columns that only some steps have are None in the others.

    token_ids: int32 [num_sampled] or a sequence, the id of each of `StepPlan.samples`. NOT_FINITE marks a sample whose
    logits were not finite, NOTHING_ALLOWED one whose mask left no token: that request fails, its neighbors do not.
    counts: int32 [R], number of accepted samples of each decoding row, from the first on and at least one; the others
    are discarded. None when every row has one sample.
    logprobs: of each of `StepPlan.samples`; None unless one wants them, and without meaning for those that do not.
    scores: of each of `StepPlan.scores`; None when there are none.
    pooled: float64 [num_pooled, hidden size], for each of `StepPlan.pooled_rows` the sum of the hidden states of its
    pooled tokens, exact; NaN where it is not known. None when nothing is pooled.
    """

    token_ids: Sequence[int] | np.ndarray
    counts: Sequence[int] | np.ndarray | None = None
    logprobs: LogprobColumns | None = None
    scores: LogprobColumns | None = None
    pooled: np.ndarray | None = None


NOT_FINITE = -1
NOTHING_ALLOWED = -2
