"""The page pool against a naive model, over random histories of growing, forked, swapped and ended sequences.

The model keeps a dict of owners, a plain list in order of use and whole prefixes instead of hashes. Beside it stands a
memory whose pages hold what sequences wrote there: a match, a copy or a move that returned the wrong page shows as
wrong content, whatever the accounts say.
"""

import dataclasses

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.kv_cache.page_pool import PagePool, PageState
from tests.budgets import budget
from tests.scheduler.pool_helpers import commit, match

PAGE_SIZE, NUM_PAGES, NUM_HOST_PAGES = 2, 9, 4
PAGES = range(1, NUM_PAGES)

# Few tokens and two salts, so that sequences often begin alike.
tokens_strategy = st.lists(st.integers(0, 1), min_size=1, max_size=6)
salts = st.sampled_from(["", "a"])


@dataclasses.dataclass
class Sequence:
    salt: str
    tokens: list[int]
    table: list[int]
    committed: int = 0
    on_host: bool = False

    def prefix(self, length):
        return self.salt, tuple(self.tokens[:length])


class Model:
    """What the pool must do, without any care for cost."""

    def __init__(self):
        self.owners = dict.fromkeys(PAGES, 0)
        self.contents = {}  # page -> (salt, prefix) of a committed page
        self.host_contents = {}  # the same for host pages
        self.found = {}  # (salt, prefix) -> page that match finds
        self.cached = []  # least recently used first

    def free(self):
        return [page for page in PAGES if not self.owners[page] and page not in self.cached]

    def allocated(self, count, pages):
        """Checks what allocate answered, and takes the pages."""
        free = self.free()
        if count > len(free) + len(self.cached):
            assert pages is None
            return
        assert pages is not None
        assert len(set(pages)) == count
        reclaimed = self.cached[: max(0, count - len(free))]
        assert set(reclaimed) <= set(pages) <= set(free) | set(reclaimed)
        for page in reclaimed:
            self.cached.remove(page)
            del self.found[self.contents.pop(page)]
        for page in pages:
            self.owners[page] = 1

    def take(self, pages):
        for page in pages:
            self.owners[page] += 1
            if page in self.cached:
                self.cached.remove(page)

    def drop(self, pages):
        for page in reversed(pages):
            self.owners[page] -= 1
            if self.owners[page]:
                continue
            if page in self.contents and self.found.setdefault(self.contents[page], page) == page:
                self.cached.append(page)
            else:
                self.contents.pop(page, None)

    def commit(self, page, content):
        self.contents[page] = content
        self.found.setdefault(content, page)

    def moved_out(self, copies):
        for copy in copies:
            if copy.source in self.contents:
                self.host_contents[copy.destination] = self.contents[copy.source]
        self.drop([copy.source for copy in copies])

    def moved_in(self, copies):
        """Takes over the contents of pages that `allocated` has taken already."""
        for copy in copies:
            if copy.source in self.host_contents:
                self.commit(copy.destination, self.host_contents.pop(copy.source))

    def match(self, tokens, salt):
        pages = []
        for end in range(PAGE_SIZE, len(tokens) + 1, PAGE_SIZE):
            page = self.found.get((salt, tuple(tokens[:end])))
            if page is None:
                break
            pages.append(page)
        return pages


class PagePoolMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES, PAGE_SIZE, NUM_HOST_PAGES)
        self.model = Model()
        self.sequences = []
        self.memory = {PageState.ACTIVE: {}, PageState.HOST: {}}

    # ------------------------------------------------------------------------------------------------------- helpers

    def pick(self, data, on_host=False):
        return data.draw(st.sampled_from([s for s in self.sequences if s.on_host == on_host]), label="sequence")

    def allocate(self, count):
        pages = self.pool.allocate(count)
        self.model.allocated(count, pages)
        for page in pages or ():
            self.memory[PageState.ACTIVE][page] = "undefined"
        return pages

    def perform(self, copies):
        for copy in copies:
            self.memory[copy.destination_tier][copy.destination] = self.memory[copy.source_tier][copy.source]

    def own(self, sequence, index):
        """Exchanges a page of a sequence for a copy that it may write; False when memory is short."""
        copy = self.pool.copy(sequence.table[index])
        self.model.allocated(1, None if copy is None else [copy.destination])
        if copy is None:
            return False
        assert copy.source == sequence.table[index]
        assert copy.source_tier == copy.destination_tier == PageState.ACTIVE
        self.model.drop([copy.source])
        self.perform([copy])
        sequence.table[index] = copy.destination
        return True

    def write(self, sequence, token):
        """One token more, into a page that must be the sequence's alone; False when memory is short."""
        index, offset = divmod(len(sequence.tokens), PAGE_SIZE)
        if not offset:
            pages = self.allocate(1)
            if pages is None:
                return False
            sequence.table += pages
        elif not self.pool.writable(sequence.table[index]) and not self.own(sequence, index):
            return False
        sequence.tokens.append(token)
        assert self.pool.writable(sequence.table[index])
        assert self.model.owners[sequence.table[index]] == 1
        self.memory[PageState.ACTIVE][sequence.table[index]] = sequence.prefix(len(sequence.tokens))
        return True

    def extend(self, sequence, tokens, then_commit):
        for token in tokens:
            if not self.write(sequence, token):
                break
        if then_commit:
            self.commit_pages(sequence, sequence.committed)

    def commit_pages(self, sequence, start):
        sequence.committed = commit(self.pool, sequence.table, sequence.tokens, sequence.salt, start)
        assert sequence.committed == len(sequence.tokens) // PAGE_SIZE
        for index in range(start, sequence.committed):
            self.model.commit(sequence.table[index], sequence.prefix((index + 1) * PAGE_SIZE))

    # --------------------------------------------------------------------------------------------------------- rules

    # Some sequences do without the cache, so that several pages have the same content.
    @rule(salt=salts, tokens=tokens_strategy, use_cache=st.booleans(), then_commit=st.booleans())
    def start(self, salt, tokens, use_cache, then_commit):
        found = []
        if use_cache:
            found = match(self.pool, tokens, salt)
            assert found == self.model.match(tokens, salt)
            self.model.take(found)
        sequence = Sequence(salt, tokens[: len(found) * PAGE_SIZE], found, len(found))
        self.sequences.append(sequence)
        self.extend(sequence, tokens[len(sequence.tokens) :], then_commit)

    @rule(data=st.data(), tokens=tokens_strategy, then_commit=st.booleans())
    @precondition(lambda self: any(not s.on_host for s in self.sequences))
    def grow(self, data, tokens, then_commit):
        self.extend(self.pick(data), tokens, then_commit)

    @rule(data=st.data(), from_start=st.booleans())
    @precondition(lambda self: any(not s.on_host for s in self.sequences))
    def commit(self, data, from_start):
        sequence = self.pick(data)
        self.commit_pages(sequence, 0 if from_start else sequence.committed)

    @rule(data=st.data())
    @precondition(lambda self: any(not s.on_host and s.table for s in self.sequences))
    def take_private(self, data):
        sequence = data.draw(st.sampled_from([s for s in self.sequences if not s.on_host and s.table]))
        index = data.draw(st.integers(0, len(sequence.table) - 1), label="index")
        if not self.pool.writable(sequence.table[index]) and self.own(sequence, index):
            sequence.committed = min(sequence.committed, index)

    @rule(data=st.data())
    @precondition(lambda self: any(not s.on_host for s in self.sequences))
    def fork(self, data):
        parent = self.pick(data)
        self.pool.share(parent.table)
        self.model.take(parent.table)
        self.sequences.append(dataclasses.replace(parent, tokens=list(parent.tokens), table=list(parent.table)))

    @rule(data=st.data())
    @precondition(lambda self: any(not s.on_host for s in self.sequences))
    def finish(self, data):
        sequence = self.pick(data)
        self.pool.release(sequence.table)
        self.model.drop(sequence.table)
        self.sequences = [other for other in self.sequences if other is not sequence]

    @rule(data=st.data())
    @precondition(lambda self: any(not s.on_host for s in self.sequences))
    def swap_out(self, data):
        sequence = self.pick(data)
        room = NUM_HOST_PAGES - sum(len(s.table) for s in self.sequences if s.on_host)
        copies = self.pool.move(sequence.table, PageState.HOST)
        assert (copies is not None) == (len(sequence.table) <= room)
        if copies is not None:
            assert [copy.source for copy in copies] == sequence.table
            self.perform(copies)
            self.model.moved_out(copies)
            sequence.table = [copy.destination for copy in copies]
            sequence.on_host = True

    @rule(data=st.data())
    @precondition(lambda self: any(s.on_host for s in self.sequences))
    def swap_in(self, data):
        sequence = self.pick(data, on_host=True)
        copies = self.pool.move(sequence.table, PageState.ACTIVE)
        self.model.allocated(len(sequence.table), None if copies is None else [copy.destination for copy in copies])
        if copies is not None:
            assert [copy.source for copy in copies] == sequence.table
            self.perform(copies)
            sequence.table = [copy.destination for copy in copies]
            sequence.on_host = False
            # By page, not by what this sequence committed: a fork may have committed a page for both, and pages behind
            # a private copy keep their content.
            self.model.moved_in(copies)

    @rule(data=st.data())
    @precondition(lambda self: any(s.on_host for s in self.sequences))
    def abort_swapped(self, data):
        sequence = self.pick(data, on_host=True)
        self.pool.release_host(sequence.table)
        for page in sequence.table:
            self.model.host_contents.pop(page, None)
        self.sequences = [other for other in self.sequences if other is not sequence]

    @rule(count=st.integers(0, NUM_PAGES))
    def allocate_and_release(self, count):
        pages = self.allocate(count)
        if pages is not None:
            self.pool.release(pages)
            self.model.drop(pages)

    # ---------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def accounts_agree(self):
        host = [s.table for s in self.sequences if s.on_host]
        self.pool.check_integrity([s.table for s in self.sequences if not s.on_host], host)
        pool, model = self.pool, self.model
        assert pool.num_free == len(model.free())
        assert pool.num_cached == len(model.cached)
        assert pool.num_used == sum(owners > 0 for owners in model.owners.values())
        assert pool.num_free + pool.num_used + pool.num_cached == pool.num_usable == len(PAGES)
        assert pool.num_available == pool.num_free + pool.num_cached
        assert pool.num_host_used == sum(map(len, host)) == NUM_HOST_PAGES - pool.num_host_free
        for page in PAGES:
            assert pool.references(page) == model.owners[page]
            if model.owners[page]:
                assert pool.writable(page) == (model.owners[page] == 1 and page not in model.contents)
            state = PageState.CACHED if page in model.cached else PageState.FREE
            assert pool.state(page) is (PageState.ACTIVE if model.owners[page] else state)

    @invariant()
    def contents_agree(self):
        for sequence in self.sequences:
            memory = self.memory[PageState.HOST if sequence.on_host else PageState.ACTIVE]
            for index, page in enumerate(sequence.table):
                assert memory[page] == sequence.prefix(min((index + 1) * PAGE_SIZE, len(sequence.tokens)))

    def teardown(self):
        for sequence in self.sequences:
            (self.pool.release_host if sequence.on_host else self.pool.release)(sequence.table)
        self.pool.check_integrity([])
        assert self.pool.num_used == self.pool.num_host_used == 0


TestPagePoolMachine = PagePoolMachine.TestCase
TestPagePoolMachine.settings = budget(80, stateful_step_count=50)
