"""Defines the scheduler's record of one unfinished request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxserve.kv_cache.deferred_keys import DeferredRun, known_tokens
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import EngineRequest, Pooling, RequestStatus
from jaxserve.scheduler.pooled_sum import PooledSum

if TYPE_CHECKING:
    from jaxserve.scheduler.shared_prompt import SharedPrompt


class Sequence:
    """Represents a request, its tokens so far, and the slot and pages it holds.

    order: index in order of arrival. decoding: it is in the `DecodingSet`, whose columns then hold its progress; the
    next two fields are valid only while it is not. num_computed: tokens whose keys and values are in pages (or will be,
    by the steps dispatched). num_pending: tokens sampled by dispatched steps whose ids the host has not read yet, at
    most.
    expected_output: output tokens that the predictor expected on arrival. boost: added to the priority by preemptions.
    tenant_number: the policy's number for its tenant. wants: `Wants` of each of its samples. start_by, lateness: see
    the policy that uses them.
    next_scored: index of the first prompt token that no dispatched step scores, where the request wants
    log-probabilities of its prompt. scores: those that the host has read and not handed on. pooled: of a prompt that
    is embedded.
    page_keys: content keys of its first full pages, as far as they were needed. num_committed: pages of its table, from
    the first on, that the pool can find; deferred: those of them whose keys nobody has needed. num_cached_tokens:
    tokens of pages that it found when it began; num_found: when it arrived, or would find now, where its policy orders
    by that.
    pages: of the device, in the order of the table; more_pages: tables of the groups of layers after the first, as long
    as it; left: of each table the number of entries, from the first on, that are the null page, because the group's
    window has left them. reserved: pages held for it beyond those of the tables, for any group; host_pages: those of a
    swapped sequence, group by group. penalized: it needs a penalty row; penalty_row: the one that it holds while it
    runs. parked: its queue does not offer it, since no row is free. prompt: what it shares with other samples of its
    request; None where it is the only one. withheld: it waits in no queue, until one of them has computed the prompt.
    asked_disk: it has been decided whether pages of its prompt are read from disk.
    """

    def __init__(self, request: EngineRequest, order: int, expected_output: float = 1.0):
        self.request = request
        self.request_id = request.request_id
        self.order = order
        self.status = RequestStatus.WAITING
        self.decoding = False
        self.output_token_ids: list[int] = []
        self.num_computed = 0
        self.num_pending = 0
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.page_keys: list[bytes] = []
        self.num_committed = 0
        self.deferred: DeferredRun | None = None
        self.num_found = 0
        self.expected_output = expected_output
        self.boost = 0
        self.tenant_number = 0
        self.wants = 0
        self.start_by: float | None = None
        self.lateness = 0.0
        self.pages: list[int] = []
        self.more_pages: list[list[int]] = []
        self.left: list[int] = [0]
        self.reserved: list[int] = []
        self.host_pages: list[int] = []
        self.slot: int | None = None
        self.penalized = request.penalized
        self.penalty_row: int | None = None
        self.parked = False
        self.prompt: SharedPrompt | None = None
        self.withheld = False
        self.asked_disk = False
        self.next_scored = request.prompt_logprobs_start
        self.scores: list[LogprobColumns] = []
        self.pooled: PooledSum | None = None if request.pooling is None else PooledSum(request.pooling)

    @property
    def priority(self) -> int:
        """Returns the priority, which preemptions have raised; higher is more urgent."""
        return self.request.options.priority + self.boost

    @property
    def expected_length(self) -> float:
        """Returns the number of prompt tokens and expected output tokens."""
        return len(self.request.prompt_token_ids) + self.expected_output

    @property
    def waits_new(self) -> bool:
        """Tells whether it waits and has never run."""
        return self.status is RequestStatus.WAITING

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_known(self) -> int:
        """Counts the tokens whose ids the host knows."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def last_position(self) -> int:
        """Returns the position of the last token allowed."""
        return len(self.request.prompt_token_ids) + self.request.max_tokens - 1

    @property
    def stop_position(self) -> int:
        """Returns the position of the first token that may be a stop id (min_tokens)."""
        return len(self.request.prompt_token_ids) + self.request.min_tokens

    @property
    def num_to_compute(self) -> int:
        """Returns the number of known tokens that a waiting sequence would not find in the prefix cache."""
        return self.num_known - self.num_found

    @property
    def tables(self) -> tuple[list[int], ...]:
        """Returns the page table of each group of layers."""
        return (self.pages, *self.more_pages)

    @property
    def live_pages(self) -> list[int]:
        """Returns the pages of all tables, group by group."""
        return [page for table, left in zip(self.tables, self.left, strict=True) for page in table[left:]]

    @property
    def num_pages(self) -> int:
        """Returns the number of pages in its tables."""
        return len(self.left) * len(self.pages) - sum(self.left)

    @property
    def num_entries(self) -> int:
        """Returns the number of entries of each of its page tables, whose pages are on the device or in host memory."""
        if not self.host_pages:
            return len(self.pages)
        return (len(self.host_pages) + sum(self.left)) // len(self.left)

    @property
    def num_skippable(self) -> int:
        """Returns the number of its first tokens whose hidden states nobody needs: the prefix cache may have them."""
        if self.pooled is not None and self.request.pooling is not Pooling.LAST:
            return 0
        last = self.num_known - 1
        return max(0, min(last, self.next_scored - 1)) if self.must_score else last

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def take_scores(self) -> LogprobColumns | None:
        """Returns the log-probabilities of the prompt, once."""
        if not self.scores:
            return None
        taken, self.scores = LogprobColumns.joined(self.scores), []
        return taken

    @property
    def must_score(self) -> bool:
        """Tells whether tokens of the prompt are still to be scored, for which it must compute them itself."""
        return self.request.prompt_logprobs is not None and self.next_scored < self.num_prompt_tokens

    def score_again(self) -> None:
        """Forgets that tokens of the prompt are being scored whose scores the host has not read: they are lost."""
        if self.request.prompt_logprobs is not None and not self.output_token_ids:
            self.next_scored = self.request.prompt_logprobs_start + sum(len(part) for part in self.scores)

    def known_token_ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Returns the ids of the known tokens at positions start to stop - 1."""
        return known_tokens(self.request.prompt_token_ids, self.output_token_ids, start, stop)
