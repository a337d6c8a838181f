"""Finds computed pages for the beginning of a sequence, and makes the pages that a step fills findable.

    admission   the longest run of full pages whose content keys the pool knows is shared, and the rest is computed: at
                least the last token, and every token whose hidden state is wanted
    commit      pages of a prompt are committed once the step that fills them is dispatched, before the next one is
                planned: what reads them is then dispatched behind it. Those filled while decoding are committed
                together when the sequence ends or is preempted: a step that only decodes costs no more than without.
                Where it is enough, keys are derived when a look-up comes that far (`kv_cache/deferred_keys.py`)
    end         the pool keeps the committed pages of a sequence that ends or is preempted until it needs them for
                something else, and then in host memory, as far as there is room

Pages filled while decoding are kept like those of a prompt, so the next turn of a chat finds its own answer.
Source: automatic prefix caching by hashes of pages, vLLM; keys and values of a prefix are the same whatever follows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as List

from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.kv_cache.deferred_keys import DeferredRun
from jaxserve.kv_cache.event_log import CacheEvent, CacheEventKind, CacheEventLog, page_hash
from jaxserve.kv_cache.host_pool import HeldPage
from jaxserve.kv_cache.page_groups import PageGroups, group_key
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.kv_cache.pool_checks import NULL_PAGE
from jaxserve.request import RequestStatus
from jaxserve.scheduler.found_pages import ON_DISK, FoundPages, on_host
from jaxserve.scheduler.host_fetches import HostFetches
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.sequence import Sequence


@dataclasses.dataclass
class PrefixCounts:
    """Counts look-ups since the start. Those of sequences that come back after a preemption are counted apart.

    queries, hits: requests admitted for the first time, and those of them that found a page. query_tokens, hit_tokens:
    their tokens, and those found. returned_tokens: tokens that preempted sequences found when they came back.
    host_hits, host_hit_tokens: requests that had pages brought back from host memory, whether new or returning, and the
    tokens that these pages saved.
    """

    queries: int = 0
    hits: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0
    returned_tokens: int = 0
    host_hits: int = 0
    host_hit_tokens: int = 0


class PrefixCache:
    """Looks up and commits the pages of sequences in one pool.

    groups: of layers. A page of each group has a content key of its own, which follows from that of its tokens.
    keys: None where pages are not shared between requests; nothing is then found or committed. fetches: decides which
    pages come back from host memory; None where they always do. watched: somebody takes `committed_keys`, those of the
    pages committed since they were taken last.
    """

    def __init__(
        self, pool: PagePool, keys: ContentKeys | None, groups: PageGroups, fetches: HostFetches | None = None
    ):
        self._groups = groups
        self.alike = groups.alike
        self._pool = pool
        self._keys = keys
        self._plain = groups.alike and not pool.num_host_pages
        self._defers = groups.alike and pool.may_defer
        self._nothing = FoundPages([[] for _ in groups.windows], [0] * groups.count)
        self._dispatched: StepPlan | None = None
        self._event_log: CacheEventLog | None = None
        self.fetches = HostFetches(None) if fetches is None else fetches
        self.counts = PrefixCounts()
        self.page_size = pool.page_size
        self.watched = False
        self.committed_keys: list[bytes] = []

    def find(self, sequence: Sequence) -> FoundPages:
        """Returns the computed pages with which a sequence that holds none can begin, in order; O(their number), or
        where no group needs all pages, O(pages of its known tokens).

        Of groups with a window only the pages that the next token attends to need be there. They get no reference:
        `Pages.admit` shares them. Behind those of the device come pages of host memory, where bringing them back is
        predicted to be cheaper than computing their tokens again.
        """
        if self._plain and sequence.page_keys and self._pool.page_of(sequence.page_keys[0]) is None:
            return self._nothing
        limit = sequence.num_skippable // self._pool.page_size if self._serves(sequence) else 0
        if not limit:
            return self._nothing
        found = self._find(self._chain(sequence, limit), self._pool.page_of)
        if not self._pool.host.num_cached:
            return found
        more = self._find(self._chain(sequence, limit), self._place)
        if len(more) <= len(found):
            return found
        start = self.num_tokens(found)
        choice = self.fetches.choose(start, self.num_tokens(more) - start, len(more.host), sequence.num_known)
        return dataclasses.replace(more if choice.fetches else found, choice=choice)

    def _place(self, key: bytes) -> int | None:
        """Returns the device page of a content key, or else its host page, as `on_host` gives it."""
        page = self._pool.page_of(key)
        if page is None and (host := self._pool.host.page_of(key)) is not None:
            return on_host(host)
        return page

    def find_on_disk(self, sequence: Sequence, found: FoundPages) -> tuple[int, list[HeldPage]]:
        """Returns how many entries a sequence could begin with if pages were read from disk, and these pages, in order;
        none where what `find` returned is as much."""
        on_disk = self._pool.host.on_disk
        limit = sequence.num_skippable // self._pool.page_size if self._serves(sequence) else 0
        if not on_disk or len(found) >= limit:
            return len(found), []

        def place(key: bytes) -> int | None:
            there = self._place(key)
            return ON_DISK if there is None and key in on_disk else there

        more = self._find(self._chain(sequence, limit), place)
        if len(more) <= len(found):
            return len(found), []
        pages = [
            HeldPage(group_key(sequence.page_keys[index], group), group, index)
            for index in range(len(more))
            for group, table in enumerate(more.tables)
            if table[index] == ON_DISK
        ]
        return len(more), pages

    def _find(self, keys: Iterable[bytes], place: Callable[[bytes], int | None]) -> FoundPages:
        """Returns the longest run of pages for the first of `keys`. place: of the page of a content key, or None."""
        if self._groups.alike:
            pages = []
            for key in keys:
                page = place(key)
                if page is None:
                    break
                pages.append(page)
            return FoundPages([pages], [0])
        tables: list[list[int]] = [[] for _ in self._groups.windows]
        entries, missing = 0, [-1] * len(tables)  # of each group the last entry whose page is not there
        for index, key in enumerate(keys):
            for group, table in enumerate(tables):
                page = place(group_key(key, group))
                table.append(NULL_PAGE if page is None else page)
                if page is None:
                    missing[group] = index
            left = self._groups.left((index + 1) * self._pool.page_size)
            whole = [gap < gone for gap, gone in zip(missing, left, strict=True)]
            if all(whole):
                entries = index + 1
            elif not all(one for one, window in zip(whole, self._groups.windows, strict=True) if window is None):
                break
        left = self._groups.left(entries * self._pool.page_size)
        found = [[NULL_PAGE] * gone + table[gone:entries] for table, gone in zip(tables, left, strict=True)]
        return FoundPages(found, left)

    def num_tokens(self, found: FoundPages) -> int:
        """Returns the number of tokens in pages that `find` returned."""
        return len(found) * self._pool.page_size

    def admitted(self, sequence: Sequence, found: FoundPages | None) -> None:
        """Records that a sequence was admitted with what `find` returned; None where it was not asked."""
        sequence.num_committed = num_pages = 0 if found is None else len(found)
        if not self._serves(sequence):
            return
        if self._event_log is not None:
            self._announce(sequence, 0, num_pages)
        counts, tokens = self.counts, num_pages * self._pool.page_size
        if found is not None and found.choice is not None:
            self.fetches.chosen(found.choice)
            if found.choice.fetches:
                counts.host_hits += 1
                counts.host_hit_tokens += found.choice.num_tokens
        if not sequence.waits_new:
            counts.returned_tokens += tokens
            return
        sequence.num_cached_tokens = tokens
        counts.queries += 1
        counts.hits += tokens > 0
        counts.query_tokens += sequence.num_known
        counts.hit_tokens += tokens

    def planned(self, plan: StepPlan | None) -> None:
        """Records the step that was planned last; its pages are committed by the next `commit`."""
        self._dispatched = plan if self._keys is not None else None

    @property
    def planned_step(self) -> int | None:
        """Returns the number of the step whose pages the next `commit` commits."""
        return None if self._dispatched is None else self._dispatched.step

    def commit(self, owner: Callable[[str, int], Sequence | None]) -> list[Sequence]:
        """Commits the pages of prompts that the step planned last fills; it has been dispatched by now.

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
        return prompts

    def leaves(self, sequence: Sequence, num_tokens: int) -> None:
        """Commits the pages that a sequence has filled while it was running, before it releases them.

        Args:
            sequence: a running sequence that is not among the decoding ones any more.
            num_tokens: its first known tokens, whose keys and values a step computes that could be dispatched, as far
                as they are computed at all.
        """
        self._commit(sequence, min(num_tokens, sequence.num_computed))

    def filled(self, sequence: Sequence, position: int) -> None:
        """Commits the pages that a running sequence has filled, some of which it is about to release. position: of the
        token that it computes next."""
        self._commit(sequence, min(sequence.num_known, position))

    def forget(self, cause: str = "lost") -> int:
        """Forgets all computed pages of the device; returns how many became free. cause: as for `PagePool.forget`."""
        self._dispatched = None
        return self._pool.forget(cause)

    def record(self, event_log: CacheEventLog | None) -> None:
        """Records in a log what becomes findable from now on, and what no longer is; None ends it.

        Pages from before are recorded when a sequence finds them, or continues behind them.
        """
        self._event_log = self._pool.contents.event_log = event_log

    def _serves(self, sequence: Sequence) -> bool:
        return self._keys is not None and sequence.request.options.prefix_caching

    def next_key(self, sequence: Sequence, index: int, num_tokens: int) -> bytes | None:
        """Returns the content key of the page at `index` of a sequence, if it is a full one among its first
        `num_tokens` tokens, which are known."""
        if (index + 1) * self._pool.page_size > num_tokens or not self._serves(sequence):
            return None
        if index >= len(sequence.page_keys):
            self._derive(sequence, index + 1)
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
        if self._may_defer(sequence, begin, end):
            self._defer(sequence, begin, end)
            sequence.num_committed = end
            return True
        if sequence.deferred is not None:
            self._pool.commit_run(sequence.deferred)
        self._derive(sequence, end)
        if self._groups.alike:
            self._pool.commit(sequence.pages[begin:end], sequence.page_keys[begin:end], begin)
        else:
            self._commit_groups(sequence, begin, end)
        sequence.num_committed = end
        if self._event_log is not None:
            self._announce(sequence, begin, end)
        self.committed_keys += sequence.page_keys[begin:end] if self.watched else ()
        return True

    def _may_defer(self, sequence: Sequence, begin: int, end: int) -> bool:
        """Tells whether the keys of pages can wait until a look-up needs them. After a flush, sequences commit pages
        anew that they share."""
        alone = self._event_log is None and not self.watched and sequence.prompt is None
        return self._defers and alone and self._pool.are_deferrable(sequence.pages[begin:end])

    def _defer(self, sequence: Sequence, begin: int, end: int) -> None:
        """Makes pages `begin` to `end` - 1 findable, and derives the key of one of them at most."""
        run, chain = sequence.deferred, self._keys
        if run is None or not self._pool.defers(run):
            assert chain is not None
            keys, prompt = sequence.page_keys, sequence.request.prompt_token_ids
            if len(keys) <= begin:
                self._derive(sequence, begin + 1)
            run = sequence.deferred = DeferredRun(chain, keys, prompt, sequence.output_token_ids, begin)
        self._pool.defer(run, sequence.pages[begin:end])

    def _announce(self, sequence: Sequence, begin: int, end: int) -> None:
        """Records pages `begin` to `end` - 1 of a sequence and those in front of them, as far as they can be found and
        are not recorded yet."""
        for group, window in enumerate(self._groups.windows):
            first = begin
            while first and self._is_new(group_key(sequence.page_keys[first - 1], group)):
                first -= 1
            for new, findable in itertools.groupby(
                range(first, end), lambda index, group=group: self._is_new(group_key(sequence.page_keys[index], group))
            ):
                if new:
                    self._announce_run(sequence, list(findable), group, window)

    def _is_new(self, key: bytes) -> bool:
        """Tells whether the page of a content key can be found, and is not recorded."""
        assert self._event_log is not None
        return key not in self._event_log and self._pool.page_of(key) is not None

    def _announce_run(self, sequence: Sequence, run: List[int], group: int, window: int | None) -> None:
        """Records consecutive pages of one group of layers. run: their indices in the table of a sequence."""
        log, size, options = self._event_log, self._pool.page_size, sequence.request.options
        assert log is not None
        assert self._keys is not None
        first = run[0]
        keys = [group_key(sequence.page_keys[index], group) for index in run]
        event = CacheEvent(
            CacheEventKind.STORED,
            options.tenant,
            namespace=page_hash(self._keys.root(options.tenant, options.cache_salt)),
            salted=bool(options.cache_salt),
            parent=page_hash(group_key(sequence.page_keys[first - 1], group)) if first else None,
            hashes=tuple(map(page_hash, keys)),
            token_ids=sequence.known_token_ids(first * size, (first + len(run)) * size),
            group=None if self._groups.count == 1 else group,
            window=window,
        )
        log.stored(event, keys)

    def _commit_groups(self, sequence: Sequence, begin: int, end: int) -> None:
        """Commits the pages of every group at these indices, without those that windows have left."""
        for group, (table, left) in enumerate(zip(sequence.tables, sequence.left, strict=True)):
            first = max(begin, left)
            keys = [group_key(key, group) for key in sequence.page_keys[first:end]]
            self._pool.commit(table[first:end], keys, first, group)

    def _chain(self, sequence: Sequence, count: int) -> Iterator[bytes]:
        """Yields the content keys of the first `count` pages of known tokens, and derives about twice as many of them
        as are taken, at most."""
        keys = sequence.page_keys
        for index in range(count):
            if index == len(keys):
                self._derive(sequence, min(count, 2 * index + 1))
            yield keys[index]

    def _derive(self, sequence: Sequence, count: int) -> None:
        """Derives the content keys of the first `count` pages of known tokens, those that are not kept from before."""
        keys, size, chain = sequence.page_keys, self._pool.page_size, self._keys
        assert chain is not None
        if len(keys) < count:
            options = sequence.request.options
            previous = keys[-1] if keys else chain.root(options.tenant, options.cache_salt)
            keys += chain.links(previous, sequence.known_token_ids(len(keys) * size, count * size), size)
