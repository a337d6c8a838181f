"""Implements a runner without a model, whose every token can be computed by hand.

It keeps pages, of both sides, and slots as the devices do and reads a row's whole context back through its page table,
so a wrong page, a stale slot or a missing write changes the tokens (or fails), as it would with a model.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxserve.config.logprobs_config import MAX_LOGPROBS
from jaxserve.kv_cache.page_pool import PageCopy, PageState
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import EngineRequest
from jaxserve.runner.protocol import DiskCounts, DiskEvent, PageCopies, RunnerInfo
from jaxserve.scheduler.plan import NOTHING_ALLOWED, RowPlan, StepPlan, StepResult
from jaxserve.scheduler.preemption_costs import PreemptionCosts

Page = list[tuple[int, int] | None]
"""Content of a page: for each position the group of layers that wrote there and the token, or None."""


def next_token(
    context: Sequence[int],
    request: EngineRequest,
    suppress_stop: bool,
    vocab_size: int,
    mask: np.ndarray | None = None,
) -> int:
    """Returns the token after `context`: a weighted sum of all of it, moved by the seed where sampling is random, or
    the next one that may be drawn. mask: uint32 [words]; None allows all."""
    total = sum(place * token for place, token in enumerate(context, start=1)) + 7 * len(context)
    if request.temperature > 0:
        total += 13 * request.seed
    for token in ((total + more) % vocab_size for more in range(vocab_size)):
        forbidden = suppress_stop and token in request.stop_token_ids
        forbidden |= request.allowed_token_ids is not None and token not in request.allowed_token_ids
        if not forbidden and (mask is None or mask[token // 32] >> np.uint32(token % 32) & 1):
            return token
    return NOTHING_ALLOWED


def _slots_of_tokens(plan: StepPlan) -> list[int]:
    """Returns the slot that each token of a step was computed for."""
    return [row.slot for row in plan.rows for _ in range(row.num_tokens)]


FAKE_HIDDEN_SIZE = 3


def hidden_state(context: Sequence[int]) -> tuple[int, int, int]:
    """Returns the hidden state of the last token of `context`: the token, its position, and the sum of all tokens."""
    return context[-1], len(context) - 1, sum(context)


def guess_holds(context: Sequence[int]) -> bool:
    """Tells whether the draft token after `context` is accepted."""
    return sum(context) % 3 != 0


def fake_logprobs(tokens: Sequence[tuple[int, int]], width: int) -> LogprobColumns:
    """Returns the log-probabilities of tokens given as (position, id): that of id i is -position - i / 256, so that
    lower ids are likelier."""
    return LogprobColumns.of(
        [
            (-position - token / 256, token + 1, [(other, -position - other / 256) for other in range(width)])
            for position, token in tokens
        ]
    )


@dataclasses.dataclass(eq=False)
class FakeStep:
    """Represents a step in flight; its result is available once it is sampled. tokens: those computed for each decoding
    row, by slot. scores: of the plan's."""

    plan: StepPlan
    tokens: dict[int, tuple[int, ...]]
    scores: LogprobColumns | None = None
    result: StepResult | None = None
    pooled: np.ndarray | None = None


class FakeDisk:
    """Keeps pages in a dict, as `DiskTier` describes. A read ends when `events` is called. host_pages: where accepted
    pages are put."""

    def __init__(self, host_pages: list[Page], stored: dict[bytes, Page] | None = None):
        self._host_pages = host_pages
        self.stored = {} if stored is None else stored
        self.keys = tuple(self.stored)
        self.page_seconds = 0.0
        self._reads: list[tuple[int, bytes]] = []
        self._found: dict[int, Page] = {}

    def counts(self) -> DiskCounts:
        return DiskCounts(len(self.stored))

    def write(self, key: bytes, page: Page) -> None:
        self.stored[key] = page

    def read(self, number: int, key: bytes) -> None:
        self._reads.append((number, key))

    def events(self) -> list[DiskEvent]:
        events, self._reads = [DiskEvent(key, number, key in self.stored) for number, key in self._reads], []
        self._found |= {event.number: self.stored[event.key] for event in events if event.found and event.number}
        return events

    def accept(self, number: int, host_page: int | None) -> None:
        page = self._found.pop(number)
        if host_page is not None:
            self._host_pages[host_page] = list(page)

    def forget(self) -> None:
        self.stored.clear()


class FakeRunner:
    """Implements the Runner protocol over plain lists. Steps are computed at dispatch; `collect` returns the ids.

    group_windows: of each group of layers, the positions that a token attends to, itself included; None for all.
    Positions that no group attends to count as token 0, and each group is read where it attends to alone.
    tokens_per_step: maximum tokens of a decoding row; those beyond the one sampled last are draft
    tokens, of which some are rejected (`guess_holds`), and only the runner knows the positions of such rows.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 101,
        max_model_len: int = 256,
        page_size: int = 4,
        num_pages: int = 64,
        eos_token_ids: tuple[int, ...] = (),
        num_host_pages: int = 0,
        preemption_costs: PreemptionCosts | None = None,
        group_windows: tuple[int | None, ...] = (None,),
        tokens_per_step: int = 1,
    ):
        self.info = RunnerInfo(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
            page_size=page_size,
            num_pages=num_pages,
            num_parameters=0,
            architecture="fake",
            dtype="none",
            platform="none",
            attention="none",
            num_executables=0,
            compile_seconds=0.0,
            kv_cache="none",
            num_host_pages=num_host_pages,
            preemption_costs=preemption_costs,
            tokens_per_step=tokens_per_step,
            max_logprobs=min(MAX_LOGPROBS, vocab_size),
            hidden_size=FAKE_HIDDEN_SIZE,
            group_windows=group_windows,
        )
        self.step_costs = None
        self.disk: FakeDisk | None = None
        self.num_compilations = 0
        self.compile_misses = 0
        self.pack_seconds = 0.0
        self.num_executables = 0
        self._num_groups = len(group_windows)
        self._widest = max((window for window in group_windows if window is not None), default=0)
        self._num_copied = {"out": 0, "in": 0}
        self._host_pages: list[Page] = [[None] * page_size for _ in range(num_host_pages)]
        self._forget()

    def close(self, copies: Sequence[PageCopy] = ()) -> None:
        for copy in copies:
            self._copy(copy)

    def page_copies(self) -> dict[str, PageCopies]:
        return {way: PageCopies(count) for way, count in self._num_copied.items()}

    def shared_reads(self) -> dict[str, int]:
        return {}

    def fitted(self, plan: StepPlan) -> StepPlan:
        return plan

    def dispatch_forward(self, plan: StepPlan) -> FakeStep:
        for copy in plan.copies:
            self._copy(copy)
        for write in plan.table_writes:
            assert write.group < self._num_groups, f"group {write.group} does not exist"
            self._table(write.group, write.slot).update(enumerate(write.pages, start=write.first))
        for write in plan.penalty_writes:
            self._penalties[write.row] = set(write.prompt_token_ids), Counter(write.output_token_ids)
        self._unsampled = FakeStep(plan, {row.slot: self._decode(row) for row in plan.decodes.rows()})
        for row in plan.chunks:
            self._prefill(row)
        if len(plan.scores):
            self._unsampled.scores = self._score(plan)
        for fork in plan.forks:
            self._requests[fork.slot] = fork.admit
            self._penalty_rows[fork.slot] = fork.penalty_row
            self._lengths[fork.slot] = len(fork.admit.prompt_token_ids)
        if plan.num_pooled:
            self._unsampled.pooled = np.array([self._pool(row) for row in plan.pooled_rows], np.float64)
        return self._unsampled

    def dispatch_sample(self, plan: StepPlan, masks: np.ndarray | None = None) -> None:
        step, self._unsampled = self._unsampled, None
        assert step is not None, "a step is sampled twice, or before its forward program"
        assert step.plan is plan, "another step is sampled than was dispatched last"
        masked = plan.samples.masked.tolist()
        assert len(masked) == (0 if masks is None else len(masks)), "a sample that wants a mask has none"
        mask_of = dict(zip(masked, () if masks is None else masks, strict=True))
        slots, positions = plan.samples.slots.tolist(), plan.samples.positions.tolist()
        drawn: list[int] = []
        counts: list[int] | None = None
        if plan.decodes.counts is not None:
            counts = []
            for row in plan.decodes.rows():
                first = self._lengths[row.slot] + 1  # the plan assumes that all guesses before have held
                sampled, held = self._sample_guesses(row, step.tokens[row.slot], mask_of.get(len(drawn)))
                positions[len(drawn) : len(drawn) + len(sampled)] = range(first, first + len(sampled))
                drawn += sampled
                counts.append(held)
        suppress_stop, computed = plan.samples.suppress_stop.tolist(), _slots_of_tokens(plan)
        for place in range(len(drawn), len(slots)):
            context = self._read(computed[plan.samples.hidden_rows[place]], positions[place])
            drawn.append(self._sample(slots[place], context, suppress_stop[place], mask_of.get(place)))
        logprobs = None
        if plan.wants_logprobs:
            logprobs = fake_logprobs(list(zip(positions, drawn, strict=True)), self.info.max_logprobs)
        step.result = StepResult(drawn, counts, logprobs, step.scores, step.pooled)

    def done(self, pending: FakeStep) -> bool:
        return True

    def collect(self, pending: FakeStep) -> StepResult:
        assert pending.result is not None, "a step is collected that was not sampled"
        return pending.result

    def reset(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._pages: list[Page] = [[None] * self.info.page_size for _ in range(self.info.num_pages)]
        self._tables: dict[tuple[int, int], dict[int, int]] = {}  # of a group and slot: page by index
        self._requests: dict[int, EngineRequest] = {}
        self._last: dict[int, int] = {}
        self._penalties: dict[int, tuple[set[int], Counter[int]]] = {}  # of a row: prompt's ids, output's counts
        self._penalty_rows: dict[int, int | None] = {}  # of a slot
        self._lengths: dict[int, int] = {}  # tokens of each slot that are computed, and were not wrong guesses
        self._unsampled: FakeStep | None = None

    def _table(self, group: int, slot: int) -> dict[int, int]:
        return self._tables.setdefault((group, slot), {})

    def _copy(self, copy: PageCopy) -> None:
        """Copies a page. One that comes from the host is lost there: read again, it fails."""
        if PageState.DISK in (copy.source_tier, copy.destination_tier):
            assert self.disk is not None, "a page is copied to or from a disk that is not there"
            if copy.source_tier is PageState.DISK:
                self.disk.read(copy.source, copy.key)
            else:
                self.disk.write(copy.key, list(self._host_pages[copy.source]))
            return
        source = self._tier(copy.source_tier)
        first = source[copy.source][0]  # those behind the last token may be left by another owner
        assert first is None or first[0] == copy.group, f"a page of group {first[0]} is copied as one of {copy.group}"
        self._tier(copy.destination_tier)[copy.destination] = list(source[copy.source])
        if copy.destination_tier is PageState.HOST:
            self._num_copied["out"] += 1
        if copy.source_tier is PageState.HOST:
            self._num_copied["in"] += 1
            source[copy.source] = [None] * self.info.page_size

    def _tier(self, tier: PageState) -> list[Page]:
        return {PageState.ACTIVE: self._pages, PageState.HOST: self._host_pages}[tier]

    def _score(self, plan: StepPlan) -> LogprobColumns:
        """Scores the targets of a plan at the positions behind its rows."""
        positions = [row.start + offset for row in plan.rows for offset in range(row.num_tokens)]
        following = [positions[row] + 1 for row in plan.scores.hidden_rows.tolist()]
        return fake_logprobs(list(zip(following, plan.scores.targets.tolist(), strict=True)), self.info.max_logprobs)

    def _prefill(self, row: RowPlan) -> None:
        if row.admit is not None:
            self._requests[row.slot] = row.admit
            self._penalty_rows[row.slot] = row.penalty_row
        self._write(row, row.start, row.token_ids)
        self._lengths[row.slot] = row.start + row.num_tokens

    def _pool(self, row: RowPlan) -> np.ndarray:
        """Returns the sum of the hidden states of a chunk's pooled tokens, which its pages give."""
        assert row.pooled is not None
        first = row.start + row.pooled.first
        assert row.pooled.first + row.pooled.count <= row.num_tokens, "tokens are pooled that the chunk does not have"
        states = [hidden_state(self._read(row.slot, end)) for end in range(first + 1, first + row.pooled.count + 1)]
        return np.array(states, np.float64).reshape(-1, FAKE_HIDDEN_SIZE).sum(axis=0)

    def _decode(self, row: RowPlan) -> tuple[int, ...]:
        """Computes the token sampled last in the row's slot and, where the row has more, guesses behind it."""
        start = self._lengths[row.slot] if self.info.tokens_per_step > 1 else row.start
        assert start <= row.start, f"{row.request_id} is further than the scheduler takes it to be"
        tokens = (self._last[row.slot],)
        self._write(row, start, tokens)
        while len(tokens) < row.num_tokens:
            context = self._read(row.slot, start + len(tokens))
            token = self._next(row.slot, context)
            tokens += (token if guess_holds(context) else (token + 1) % self.info.vocab_size,)
            self._write(row, start + len(tokens) - 1, tokens[-1:])
        if self.info.tokens_per_step == 1:
            self._lengths[row.slot] = start + 1
        return tokens

    def _write(self, row: RowPlan, start: int, tokens: Sequence[int]) -> None:
        """Puts tokens, from position `start` on, into the pages of every group, which the first of them must find with
        all before it that the group attends to."""
        for group, pages in enumerate((row.new_pages, *row.more_pages)):
            self._table(group, row.slot).update(enumerate(pages, start=row.first_new_page))
        if self._widest:
            self._read(row.slot, start + 1, first=max(0, start + 1 - self._widest), written=start)
        for group in range(self._num_groups):
            table = self._table(group, row.slot)
            for position, token in enumerate(tokens, start=start):
                index, offset = divmod(position, self.info.page_size)
                assert table[index] != 0, "a real token is written to the null page"
                self._pages[table[index]][offset] = group, token

    def _read(self, slot: int, count: int, first: int = 0, written: int | None = None) -> list[int]:
        """Returns the first `count` tokens of a slot as the last of them sees them: the pages of every group must hold
        those that it attends to. first, written: of them only those in front of `written`, from `first` on, which are
        in pages; None for all."""
        context: list[int] = []
        name = self._requests[slot].request_id
        for position in range(first, count if written is None else written):
            index, offset = divmod(position, self.info.page_size)
            seeing = [
                group
                for group, window in enumerate(self.info.group_windows)
                if window is None or position >= count - window
            ]
            places = [self._pages[self._table(group, slot)[index]][offset] for group in seeing]
            assert None not in places, f"position {position} of {name} is read before it is written"
            tokens = [place[1] for place in places if place is not None]
            assert places == list(zip(seeing, tokens, strict=True)), f"a page of another group is read for {name}"
            assert len(set(tokens)) <= 1, f"the groups of {name} hold different tokens at position {position}"
            context.append(tokens[0] if tokens else 0)
        return context

    def _next(self, slot: int, context: Sequence[int], mask: np.ndarray | None = None) -> int:
        """Returns the token after `context` of a row whose position only the device knows."""
        request = self._requests[slot]
        suppress_stop = len(context) < len(request.prompt_token_ids) + request.min_tokens
        return next_token(context, request, suppress_stop, self.info.vocab_size, mask)

    def _sample(self, slot: int, context: Sequence[int], suppress_stop: bool, mask: np.ndarray | None = None) -> int:
        token = next_token(context, self._requests[slot], suppress_stop, self.info.vocab_size, mask)
        self._penalize(slot, context, [token])
        self._last[slot] = token
        return token

    def _penalize(self, slot: int, context: Sequence[int], drawn: Sequence[int]) -> None:
        """Counts drawn tokens in the row of a request with penalties, which must hold those before them."""
        request, row = self._requests[slot], self._penalty_rows[slot]
        assert request.penalized == (row is not None), f"{request.request_id} has the penalty row {row}"
        if row is None or None not in self.info.group_windows:
            return  # no group sees all tokens, with which the rows could be compared
        split = len(request.prompt_token_ids)
        prompt, counts = self._penalties[row]
        assert prompt == set(context[:split]), f"row {row} of {request.request_id} has the ids of another prompt"
        assert counts == Counter(context[split:]), f"row {row} of {request.request_id} has counts of another output"
        counts.update(token for token in drawn if token >= 0)

    def _sample_guesses(self, row: RowPlan, tokens: tuple[int, ...], mask: np.ndarray | None) -> tuple[list[int], int]:
        """Samples after every token of a decoding row, and counts the accepted samples: the first, and each after a
        correct draft."""
        start = self._lengths[row.slot]
        contexts = [self._read(row.slot, start + count) for count in range(1, len(tokens) + 1)]
        sampled = [self._next(row.slot, context, mask) for context in contexts]
        held = 1
        while held < len(tokens) and tokens[held] == sampled[held - 1]:
            held += 1
        self._penalize(row.slot, contexts[0], sampled[:held])
        self._lengths[row.slot] = start + held
        self._last[row.slot] = sampled[held - 1]
        return sampled, held
