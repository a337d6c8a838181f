"""Finds computed pages for the beginning of a sequence, and makes the pages that a step fills findable.

    admission   the longest run of full pages whose content keys the pool knows is shared, and the rest is computed: at
                least the last token, and every token whose hidden state is wanted
    commit      pages are committed once the step that fills them is dispatched, before the next one is planned: what
                reads them is then dispatched behind it. The ids of their tokens are known by then
    end         the pool keeps the committed pages of a sequence that ends or is preempted until it needs them for
                something else

Pages filled while decoding are committed like those of a prompt, so the next turn of a chat finds its own answer.
Source: automatic prefix caching by hashes of pages, vLLM; keys and values of a prefix are the same whatever follows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as List

from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.request import RequestStatus
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.sequence import Sequence


@dataclasses.dataclass
class PrefixCounts:
    """Counts look-ups since the start. Those of sequences that come back after a preemption are counted apart.

    queries, hits: requests admitted for the first time, and those of them that found a page. query_tokens, hit_tokens:
    their tokens, and those found. returned_tokens: tokens that preempted sequences found when they came back.
    """

    queries: int = 0
    hits: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0
    returned_tokens: int = 0


class PrefixCache:
    """Looks up and commits the pages of sequences in one pool.

    keys: None where pages are not shared between requests; nothing is then found or committed. watched: somebody takes
    `committed_keys`, those of the pages committed since they were taken last.
    """

    def __init__(self, pool: PagePool, keys: ContentKeys | None):
        self._pool = pool
        self._keys = keys
        self._dispatched: StepPlan | None = None
        self.counts = PrefixCounts()
        self.page_size = pool.page_size
        self.watched = False
        self.committed_keys: list[bytes] = []

    def find(self, sequence: Sequence) -> list[int]:
        """Returns the computed pages with which a sequence that holds none can begin, in order; O(their number).

        They get no reference: `Pages.admit` shares them.
        """
        limit = sequence.num_skippable // self._pool.page_size
        return self._pool.find(self._chain(sequence, limit)) if limit and self._serves(sequence) else []

    def num_tokens(self, found: List[int]) -> int:
        """Returns the number of tokens in pages that `find` returned."""
        return len(found) * self._pool.page_size

    def admitted(self, sequence: Sequence, num_pages: int) -> None:
        """Records that a sequence was admitted with so many pages that `find` returned."""
        sequence.num_committed = num_pages
        if not self._serves(sequence):
            return
        counts, found = self.counts, num_pages * self._pool.page_size
        if not sequence.waits_new:
            counts.returned_tokens += found
            return
        sequence.num_cached_tokens = found
        counts.queries += 1
        counts.hits += found > 0
        counts.query_tokens += sequence.num_known
        counts.hit_tokens += found

    def planned(self, plan: StepPlan | None) -> None:
        """Records the step that was planned last; its pages are committed by the next `commit`."""
        self._dispatched = plan if self._keys is not None else None

    @property
    def planned_step(self) -> int | None:
        """Returns the number of the step whose pages the next `commit` commits."""
        return None if self._dispatched is None else self._dispatched.step

    def commit(self, owner: Callable[[str, int], Sequence | None]) -> list[Sequence]:
        """Commits the pages that the step planned last fills; it has been dispatched by now.

        Args:
            owner: returns the sequence of a request id and order, if it still needs tokens. A request whose row could
                not be dispatched has been ended, and has none.

        Returns:
            The sequences whose prompts were committed further.
        """
        plan, self._dispatched = self._dispatched, None
        if plan is None:
            return []
        prompts = []
        for row in plan.chunks:
            sequence = owner(row.request_id, row.order)
            if sequence is not None and self._commit(sequence, row.start + row.num_tokens):
                prompts.append(sequence)
        decodes = plan.decodes
        if not len(decodes):
            return prompts
        if decodes.counts is not None:  # how many of its tokens a row keeps is known only of the steps before
            for request_id, order in zip(decodes.request_ids, decodes.orders.tolist(), strict=True):
                if (sequence := owner(request_id, order)) is not None:
                    self._commit(sequence, sequence.num_known - 1)
            return prompts
        starts = decodes.starts
        for row in ((starts + 1) % self._pool.page_size == 0).nonzero()[0].tolist():
            if (sequence := owner(decodes.request_ids[row], int(decodes.orders[row]))) is not None:
                self._commit(sequence, int(starts[row]) + 1)
        return prompts

    def advanced(self, sequences: Iterable[Sequence]) -> None:
        """Commits the pages that fast-forwarded steps have filled; the sequences decode, and all their tokens are
        known."""
        if self._keys is None:
            return
        for sequence in sequences:
            self._commit(sequence, sequence.num_known - 1)

    def forget(self) -> int:
        """Forgets all computed pages of the device; returns how many became free."""
        self._dispatched = None
        return self._pool.forget()

    def _serves(self, sequence: Sequence) -> bool:
        return self._keys is not None and sequence.request.options.prefix_caching

    def next_key(self, sequence: Sequence, index: int, num_tokens: int) -> bytes | None:
        """Returns the content key of the page at `index` of a sequence, if it is a full one among its first
        `num_tokens` tokens, which are known."""
        if (index + 1) * self._pool.page_size > num_tokens or not self._serves(sequence):
            return None
        for _ in self._chain(sequence, index + 1):
            pass
        return sequence.page_keys[index]

    def common_pages(self, sequence: Sequence, leader: Sequence) -> int:
        """Returns the number of pages that a waiting sequence could find if another had committed its known tokens."""
        count = min(sequence.num_skippable, leader.num_known) // self._pool.page_size
        pairs = zip(self._chain(sequence, count), self._chain(leader, count), strict=True)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _commit(self, sequence: Sequence, num_tokens: int) -> bool:
        """Commits the full pages among the first `num_tokens` tokens, all of which are computed; returns whether there
        were any to commit."""
        begin, end = sequence.num_committed, num_tokens // self._pool.page_size
        if end <= begin or sequence.status is not RequestStatus.RUNNING or not self._serves(sequence):
            return False
        for _ in self._chain(sequence, end):
            pass
        self._pool.commit(sequence.pages[begin:end], sequence.page_keys[begin:end], begin)
        sequence.num_committed = end
        self.committed_keys += sequence.page_keys[begin:end] if self.watched else ()
        return True

    def _chain(self, sequence: Sequence, count: int) -> Iterator[bytes]:
        """Yields the content keys of the first `count` pages of known tokens; those derived before are kept."""
        keys, size, chain = sequence.page_keys, self._pool.page_size, self._keys
        assert chain is not None
        yield from keys[:count]
        if len(keys) >= count:
            return
        options = sequence.request.options
        previous = keys[-1] if keys else chain.root(options.tenant, options.cache_salt)
        for index in range(len(keys), count):
            previous = chain.link(previous, sequence.known_token_ids(index * size, (index + 1) * size))
            keys.append(previous)
            yield previous
