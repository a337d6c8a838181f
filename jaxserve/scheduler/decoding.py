"""Keeps the decoding sequences as numpy columns that each step updates in place."""

from __future__ import annotations

from collections.abc import Sequence as List

import numpy as np

from jaxserve.scheduler.plan import NOTHING_ALLOWED, DecodeRows, FastForward, Samples, Wants
from jaxserve.scheduler.sequence import Sequence

_NO_SEQUENCE = -1
_NO_ID = NOTHING_ALLOWED - 1
"""A value that no sample can have: neither a token id nor one of the error codes."""


class DecodingSet:
    """Holds the sequences in which only the token sampled last remains to be computed; each has one row in every step.

    tokens_per_step: maximum tokens of a row. Those beyond the token sampled last are draft tokens of the device, and
    the step's result says how many were accepted (`take_several`); until then the position assumes that all are. With
    one token a row it is exact.

    A sequence `join`s when its first token (or, computed again after a preemption, its next one) is sampled, and
    `leave`s with its slot. In between, a step costs a few numpy calls for all sequences together; Python handles a
    single sequence only when it allocates a page, samples a stop id or ends.

    Columns, one entry a slot: order int64, that of the sequence, or _NO_SEQUENCE where no sequence decodes;
    position int32, of the token sampled last, which equals the number of tokens computed; capacity int32, tokens that
    its pages hold; last_position, stop_position, tenant (its number) int32 and wants uint8, as in `Sequence`; stop_ids
    int32 [S, W], padded with _NO_ID, where W is the largest number of stop ids that any sequence has had.
    """

    def __init__(self, num_slots: int, page_size: int, tokens_per_step: int = 1):
        if not 1 <= tokens_per_step <= page_size:
            raise ValueError(f"tokens_per_step is {tokens_per_step}; it must be from 1 to page_size {page_size}")
        self._page_size = page_size
        self._tokens_per_step = tokens_per_step
        self._by_slot: dict[int, Sequence] = {}  # in the order of joining, which is that of the rows
        self._order = np.full(num_slots, _NO_SEQUENCE, np.int64)
        self._position = np.zeros(num_slots, np.int32)
        self._capacity = np.zeros(num_slots, np.int32)
        self._last_position = np.zeros(num_slots, np.int32)
        self._stop_position = np.zeros(num_slots, np.int32)
        self._tenant = np.zeros(num_slots, np.int32)
        self._wants = np.zeros(num_slots, np.uint8)
        self._num_wanting = 0  # members whose wants are not NONE
        self._numbers = np.arange(num_slots * tokens_per_step, dtype=np.int32)
        self._stop_ids = np.full((num_slots, 1), _NO_ID, np.int32)
        self._row = np.zeros(num_slots, np.int32)  # of each slot, as of `_rows`
        self._taken: dict[int, int] = {}  # slot -> page taken for the step being planned
        self._taken_more: dict[int, List[int]] = {}  # the same of the groups after the first, where there are any
        self._rows: tuple[tuple[str, ...], np.ndarray, np.ndarray] | None = None  # until someone joins or leaves

    def __len__(self) -> int:
        return len(self._by_slot)

    @property
    def sequences(self) -> list[Sequence]:
        """Returns the sequences in the order of rows."""
        return list(self._by_slot.values())

    def join(self, sequence: Sequence) -> None:
        """Adds a running sequence whose next token has just been sampled, at position `num_computed`."""
        slot, stop_ids = sequence.slot, sequence.request.stop_token_ids
        assert slot is not None
        assert self._order[slot] == _NO_SEQUENCE, f"slot {slot} is taken"
        self._order[slot] = sequence.order
        self._position[slot] = sequence.num_computed
        self._capacity[slot] = len(sequence.pages) * self._page_size
        self._last_position[slot] = sequence.last_position
        self._stop_position[slot] = sequence.stop_position
        self._tenant[slot] = sequence.tenant_number
        self._stop_ids = _widened(self._stop_ids, len(stop_ids))
        self._stop_ids[slot] = _NO_ID
        self._stop_ids[slot, : len(stop_ids)] = stop_ids
        if sequence.wants:
            self._wants[slot] = sequence.wants
            self._num_wanting += 1
        self._by_slot[slot] = sequence
        self._rows = None
        sequence.decoding = True

    def leave(self, sequence: Sequence) -> None:
        """Removes a sequence that still has its slot, and sets its number of pending tokens."""
        slot = sequence.slot
        assert slot is not None
        assert self._order[slot] == sequence.order, f"slot {slot} is another sequence's"
        sequence.num_computed = int(self._position[slot])
        sequence.num_pending = sequence.num_computed + 1 - sequence.num_known
        sequence.decoding = False
        if sequence.wants:
            self._wants[slot] = Wants.NONE
            self._num_wanting -= 1
        self._order[slot] = _NO_SEQUENCE
        del self._by_slot[slot]
        self._taken.pop(slot, None)
        self._taken_more.pop(slot, None)
        self._rows = None

    def position(self, sequence: Sequence) -> int:
        """Returns the position of the token that a member computes next."""
        assert sequence.slot is not None
        return int(self._position[sequence.slot])

    def complete(self) -> list[Sequence]:
        """Returns the sequences whose last allowed token is sampled, so that nothing remains to compute.

        Returns none when draft tokens in flight may be rejected: those sequences end once the result is known.
        """
        if self._tokens_per_step > 1:
            return []
        _, _, slots = self._current_rows()
        done = slots[self._position[slots] == self._last_position[slots]]
        return [self._by_slot[slot] for slot in done.tolist()]

    def needing_page(self) -> list[Sequence]:
        """Returns the sequences that need another page for their next row, in the order of rows."""
        _, _, slots = self._current_rows()
        if self._tokens_per_step > 1:
            slots, counts = self._open_slots(slots)
            needing_page = slots[self._position[slots] + counts > self._capacity[slots]]
        else:
            needing_page = slots[self._position[slots] == self._capacity[slots]]
        return [self._by_slot[slot] for slot in needing_page.tolist()]

    def give_pages(self, sequence: Sequence, pages: List[int]) -> None:
        """Assigns a page of each group of layers to a `needing_page` sequence for its next row."""
        assert sequence.slot is not None
        page = pages[0]
        sequence.pages.append(page)
        if len(pages) > 1:
            more = self._taken_more[sequence.slot] = pages[1:]
            for table, one in zip(sequence.more_pages, more, strict=True):
                table.append(one)
        self._capacity[sequence.slot] += self._page_size
        self._taken[sequence.slot] = page

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens of all rows of the next step."""
        if self._tokens_per_step == 1:
            return len(self._by_slot)
        return int(self._open_slots(self._current_rows()[2])[1].sum())

    def next_tokens(self, sequence: Sequence) -> int:
        """Returns the number of tokens of one sequence's row in the next step."""
        if self._tokens_per_step == 1:
            return 1
        return int(self._open_slots(np.array([sequence.slot], np.int32))[1].sum())

    def advance(self) -> tuple[DecodeRows, Samples]:
        """Returns the next row of every sequence and its samples. From now on those tokens count as computed, and one
        more per row as sampled."""
        if self._tokens_per_step > 1:
            return self._advance_several()
        request_ids, orders, slots = self._current_rows()
        starts = self._position[slots]
        positions = starts + 1
        self._position[slots] = positions
        page_rows, pages, more = self._take_pages()
        rows = DecodeRows(
            request_ids=request_ids,
            orders=orders,
            slots=slots,
            starts=starts,
            page_rows=page_rows,
            pages=pages,
            page_size=self._page_size,
            more_pages=more,
        )
        return rows, Samples(
            hidden_rows=self._numbers[: len(request_ids)],
            slots=slots,
            positions=positions,
            suppress_stop=positions < self._stop_position[slots],
            wants=self._wants[slots] if self._num_wanting else None,
        )

    def _advance_several(self) -> tuple[DecodeRows, Samples]:
        """Does what `advance` does, with as many tokens a row as are still allowed.

        A row that is allowed none pauses until the results of the steps in flight say how many of their tokens were
        accepted.
        """
        slots, counts = self._open_slots(self._current_rows()[2])
        starts = self._position[slots]
        self._position[slots] = starts + counts
        self._row[slots] = np.arange(len(slots))
        page_rows, pages, more = self._take_pages()
        rows = DecodeRows(
            request_ids=tuple([self._by_slot[slot].request_id for slot in slots.tolist()]),
            orders=self._order[slots],
            slots=slots,
            starts=starts,
            page_rows=page_rows,
            pages=pages,
            page_size=self._page_size,
            counts=counts,
            more_pages=more,
        )
        sampled = np.repeat(slots, counts)
        first = np.repeat(np.cumsum(counts, dtype=np.int32) - counts, counts)
        hidden_rows = self._numbers[: len(sampled)]
        positions = np.repeat(starts, counts) + 1 + hidden_rows - first
        return rows, Samples(
            hidden_rows=hidden_rows,
            slots=sampled,
            positions=positions,
            suppress_stop=positions < self._stop_position[sampled],
            wants=self._wants[sampled] if self._num_wanting else None,
        )

    def _open_slots(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns those of `slots` that may have tokens in the next step and how many each, both int32.

        A row that needs a mask gets one token, since its mask depends on the tokens before it.
        """
        left = np.minimum(self._last_position[slots] - self._position[slots], self._tokens_per_step)
        left = np.where(self._wants[slots] & Wants.MASK, np.minimum(left, 1), left)
        return slots[left > 0], left[left > 0]

    def context(self) -> tuple[int, int]:
        """Returns the number of positions that one token of every sequence attends to, in all and at most; there must
        be a sequence."""
        positions = self._position[self._current_rows()[2]]
        return int(positions.sum()) + len(positions), int(positions.max()) + 1

    def tenants(self, rows: DecodeRows | None = None) -> np.ndarray:
        """Returns the tenant numbers of the tokens of `rows`, or of one token of every sequence: int32 [tokens]."""
        if rows is None:
            return self._tenant[self._current_rows()[2]]
        tenants = self._tenant[rows.slots]
        return tenants if rows.counts is None else np.repeat(tenants, rows.counts)

    def fast_forward_steps(self, num_pages: int) -> int:
        """Returns the number of steps in which no sequence reaches its length limit and `num_pages` pages suffice; 0
        when rows have several tokens."""
        if self._tokens_per_step > 1:
            return 0
        _, _, slots = self._current_rows()
        position, capacity = self._position[slots], self._capacity[slots]
        steps = int((self._last_position[slots] - position).min()) - 1
        if steps > 0 and int(self._pages_needed(slots, steps).sum()) > num_pages:
            steps = min(steps, int((capacity - position).min()))  # until the first page is needed
        return max(0, steps)

    def pages_needed(self, steps: int) -> int:
        """Returns the number of pages that all rows allocate in `steps` steps."""
        return int(self._pages_needed(self._current_rows()[2], steps).sum())

    def repeat(self, steps: int, token_ids: list[int], pages: list[int]) -> FastForward:
        """Does what `steps` times `advance` and `take` do when every row samples the same id each time and no sequence
        ends.

        Args:
            steps: number of steps.
            token_ids: the id sampled in each row.
            pages: as many pages as `pages_needed`.
        """
        request_ids, _, slots = self._current_rows()
        starts = self._position[slots]
        needed = self._pages_needed(slots, steps)
        self._position[slots] = starts + steps
        self._capacity[slots] += needed * self._page_size
        place = 0
        rows = zip(self._by_slot.values(), token_ids, needed.tolist(), strict=True)
        for sequence, token_id, count in rows:
            sequence.output_token_ids.extend([token_id] * steps)
            if count:
                sequence.pages.extend(pages[place : place + count])
                place += count
        return FastForward(request_ids, starts, steps)

    def _pages_needed(self, slots: np.ndarray, steps: int) -> np.ndarray:
        missing = self._position[slots] + steps - self._capacity[slots]
        return np.maximum(-(-missing // self._page_size), 0)

    def take(self, rows: DecodeRows, samples: Samples, token_ids: np.ndarray) -> np.ndarray:
        """Appends the sampled `token_ids` to the sequences of `rows` that go on decoding.

        Args:
            rows: the decoding rows of the step, R of them.
            samples: the step's samples, which begin with those of the rows.
            token_ids: int32 [R].

        Returns:
            bool [R], True for each row whose sequence goes on. The sequences of the other rows have left, or end with
            this token.
        """
        slots, count = rows.slots, len(token_ids)
        ends = (self._stop_ids[slots] == token_ids[:, None]).any(axis=1) & ~samples.suppress_stop[:count]
        ends |= (token_ids < 0) | (samples.positions[:count] == self._last_position[slots])
        stay = (self._order[slots] == rows.orders) & ~ends
        if not stay.all():
            slots, token_ids = slots[stay], token_ids[stay]
        by_slot = self._by_slot
        for slot, token_id in zip(slots.tolist(), token_ids.tolist(), strict=True):
            by_slot[slot].output_token_ids.append(token_id)
        return stay

    def give_back(self, sequence: Sequence, tokens: int) -> None:
        """Rolls back `tokens` rejected draft tokens of a sequence: they no longer count as computed."""
        assert sequence.slot is not None
        self._position[sequence.slot] -= tokens

    def check_integrity(self) -> None:
        """Asserts that the columns agree with the sequences."""
        free = np.ones(len(self._order), bool)
        for slot, sequence in self._by_slot.items():
            free[slot] = False
            assert sequence.decoding, f"{sequence.request_id} is in the set, but does not decode"
            assert sequence.slot == slot, f"{sequence.request_id} decodes in another slot"
            assert self._order[slot] == sequence.order, f"slot {slot} decodes for someone else"
            position, pending = self._position[slot], self._position[slot] + 1 - sequence.num_known
            assert self._capacity[slot] == len(sequence.pages) * self._page_size, (
                "the capacity is not that of the pages"
            )
            assert position <= self._capacity[slot], "computed tokens lack pages"
            assert 0 <= pending <= 2 * self._tokens_per_step, (
                f"{sequence.request_id} has {pending} pending tokens with two steps in flight"
            )
            assert position <= sequence.last_position, "a sequence goes on past its last token"
        assert (self._order[free] == _NO_SEQUENCE).all(), "a slot decodes for a sequence that is gone"
        assert not self._taken, "a page was taken for no step"
        assert not self._taken_more, "a page was taken for no step"

    def _current_rows(self) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        """Returns the request ids, orders and slots of the rows."""
        if self._rows is None:
            request_ids = tuple([sequence.request_id for sequence in self._by_slot.values()])
            slots = np.fromiter(self._by_slot, np.int32, len(request_ids))
            self._row[slots] = np.arange(len(slots))
            self._rows = request_ids, self._order[slots], slots
        return self._rows

    def _take_pages(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Returns the rows that allocated a page for this step, those pages, and those of the groups after the first,
        as `DecodeRows` holds them."""
        if not self._taken:
            return _NONE, _NONE, None
        count = len(self._taken)
        rows = self._row[np.fromiter(self._taken, np.int32, count)]
        pages = np.fromiter(self._taken.values(), np.int32, count)
        more = np.array(list(self._taken_more.values()), np.int32).T if self._taken_more else None
        self._taken.clear()
        self._taken_more.clear()
        return rows, pages, more


_NONE = np.zeros(0, np.int32)


def _widened(stop_ids: np.ndarray, width: int) -> np.ndarray:
    """Pads `stop_ids` to at least `width` columns."""
    missing = width - stop_ids.shape[1]
    return stop_ids if missing <= 0 else np.pad(stop_ids, ((0, 0), (0, missing)), constant_values=_NO_ID)
