"""A runner without a model, whose every token can be worked out by hand.

It keeps pages, of both sides, and slots as the devices do and reads a row's whole context back through its page table,
so a wrong page, a stale slot or a missing write changes the tokens (or fails), as it would with a model.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.kv_cache.page_pool import PageState
from jaxserve.request import EngineRequest
from jaxserve.runner.protocol import RunnerInfo
from jaxserve.scheduler.plan import RowPlan, StepPlan, StepResult, Swap
from jaxserve.scheduler.preemption_costs import PreemptionCosts


def next_token(context: Sequence[int], request: EngineRequest, suppress_stop: bool, vocab_size: int) -> int:
    """The token after `context`: a weighted sum of all of it, moved by the seed where sampling is random."""
    total = sum(place * token for place, token in enumerate(context, start=1)) + 7 * len(context)
    if request.temperature > 0:
        total += 13 * request.seed
    token = total % vocab_size
    while suppress_stop and token in request.stop_token_ids:
        token = (token + 1) % vocab_size
    return token


class FakeRunner:
    """Runner protocol over plain lists. Steps are computed at dispatch; `collect` hands the ids over."""

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
        )
        self.step_costs = None
        self.num_compilations = 0
        self.compile_misses = 0
        self.num_executables = 0
        self._pages: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self._host_pages: list[list[int | None]] = [[None] * page_size for _ in range(num_host_pages)]
        self._tables: dict[int, dict[int, int]] = {}
        self._requests: dict[int, EngineRequest] = {}
        self._last: dict[int, int] = {}

    def fitted(self, plan: StepPlan) -> StepPlan:
        return plan

    def dispatch(self, plan: StepPlan) -> StepResult:
        for swap in plan.swaps:
            self._swap(swap)
        rows = plan.rows
        for row in rows:
            self._write(row)
        return StepResult([self._sample(row) for row in rows if row.sample])

    def done(self, pending: StepResult) -> bool:
        return True

    def collect(self, pending: StepResult) -> StepResult:
        return pending

    def reset(self) -> None:
        self._pages = [[None] * self.info.page_size for _ in self._pages]
        self._tables, self._requests, self._last = {}, {}, {}

    def _swap(self, swap: Swap) -> None:
        """A page that was swapped in is lost on the host: read again, it fails."""
        tier = PageState.HOST if swap.slot is None else PageState.ACTIVE
        for copy in swap.copies:
            assert copy.destination_tier is tier is not copy.source_tier, f"{swap.request_id} goes another way"
            if swap.slot is None:
                self._host_pages[copy.destination] = list(self._pages[copy.source])
            else:
                self._pages[copy.destination] = self._host_pages[copy.source]
                self._host_pages[copy.source] = [None] * self.info.page_size
        if swap.slot is not None:
            self._tables[swap.slot] = {index: copy.destination for index, copy in enumerate(swap.copies)}

    def _write(self, row: RowPlan) -> None:
        if row.admit is not None:
            self._requests[row.slot] = row.admit
        table = self._tables.setdefault(row.slot, {})
        table.update(enumerate(row.new_pages, start=row.first_new_page))
        tokens = (self._last[row.slot],) if row.decodes else row.token_ids
        for position, token in enumerate(tokens, start=row.start):
            index, offset = divmod(position, self.info.page_size)
            assert table[index] != 0, "a real token is written to the null page"
            self._pages[table[index]][offset] = token

    def _sample(self, row: RowPlan) -> int:
        table = self._tables[row.slot]
        context = []
        for position in range(row.start + row.num_tokens):
            index, offset = divmod(position, self.info.page_size)
            token = self._pages[table[index]][offset]
            assert token is not None, f"position {position} of {row.request_id} is read before it is written"
            context.append(token)
        token = next_token(context, self._requests[row.slot], row.suppress_stop, self.info.vocab_size)
        self._last[row.slot] = token
        return token
