"""Lets the samples of a prompt (n > 1) share its pages, so that it is computed and stored once.

    leader     the first sample runs alone until a step computes the last token of the prompt; the others are withheld
    fork       in that step those that get a slot join it: they draw their first token from the same hidden state, share
               the full pages and get a copy of a partial last one before the step after
    later      who gets a slot later shares the pages in front of the prompt's last token, gets a copy of that token's
               page from a sample that runs, and computes the token again
    between    when the last sample that has the pages ends while others wait, the prompt keeps them for the next one;
               memory that somebody who runs needs is taken from there first
    lost       where nobody has the pages any more (preemption, a fault, a window that has left them), the prompt is
               computed again, by one of them

What is shared are pages in front of the position that a sample writes next, so no page with two owners is ever written.
Source of copying a page only when samples diverge in it: vLLM (SOSP 2023), section 4.4.
"""

from __future__ import annotations

from collections.abc import Sequence as List

from jaxserve.kv_cache.page_pool import PageCopy, PagePool
from jaxserve.scheduler.running import Running
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.sequence_pages import Pages
from jaxserve.scheduler.shared_prompt import SharedPrompt
from jaxserve.scheduler.waiting import Waiting


class PromptSharing:
    """Keeps the shared prompts of one scheduler. A request of one sample has none and costs nothing here."""

    def __init__(self, pool: PagePool, pages: Pages, waiting: Waiting, running: Running):
        self._pool = pool
        self._pages = pages
        self._waiting = waiting
        self._running = running
        self._prompts: dict[SharedPrompt, None] = {}
        self._keeping: dict[SharedPrompt, None] = {}  # those with kept pages, oldest first
        self._due: list[tuple[SharedPrompt, Sequence, PageCopy]] = []

    @property
    def tables(self) -> list[list[int]]:
        """Returns the pages that prompts keep, a list for each."""
        return [prompt.kept_pages for prompt in self._keeping]

    @property
    def num_withheld(self) -> int:
        """Returns the number of samples that wait in no queue; O(shared prompts)."""
        return sum(len(prompt.withheld) for prompt in self._prompts)

    def add(self, sequences: List[Sequence]) -> None:
        """Queues the samples of one prompt, in order of their indices: the first computes it, the others are
        withheld."""
        first, *others = sequences
        needed = self._pages.groups.left(first.num_prompt_tokens - 1)
        prompt = SharedPrompt(first.num_prompt_tokens, self._pool.page_size, needed)
        self._prompts[prompt] = None
        for sequence in sequences:
            sequence.prompt = prompt
        self._waiting.push(first)
        prompt.queued[first.request_id] = first
        for sequence in others:
            self._waiting.push_withheld(sequence)
            prompt.withheld[sequence.request_id] = sequence

    def joined(self, sequence: Sequence, prompt: SharedPrompt) -> None:
        """Records that a sample was admitted; it has its pages, which may be those that the prompt kept."""
        prompt.queued.pop(sequence.request_id, None)
        prompt.withheld.pop(sequence.request_id, None)  # where it took the place of the one that held the prompt
        prompt.begun[sequence.request_id] = sequence
        if not prompt.kept:
            self._keeping.pop(prompt, None)

    def fork(self, donor: Sequence, prompt: SharedPrompt, most: float) -> list[Sequence]:
        """Starts up to `most` withheld samples on the pages of a prompt whose last token the step computes for `donor`.

        Returns:
            The samples that found slots and pages. They run from now on, with the whole prompt computed.
        """
        forked: list[Sequence] = []
        for sequence in list(prompt.withheld.values()):
            if len(forked) >= most or self._running.full or self._running.lacks_row(sequence):
                break
            sequence.num_computed = prompt.num_tokens
            copies = self._pages.fork(sequence, donor)
            if copies is None:
                sequence.num_computed = 0
                break
            sequence.page_keys = donor.page_keys[: prompt.num_tokens // self._pool.page_size]
            self._due += [(prompt, sequence, copy) for copy in copies]
            del prompt.withheld[sequence.request_id]
            self._waiting.remove(sequence)
            self._running.start(sequence)
            prompt.begun[sequence.request_id] = prompt.holders[sequence.request_id] = sequence
            forked.append(sequence)
        return forked

    def take_due(self) -> list[PageCopy]:
        """Returns the copies that the last step's forks, or a prompt that keeps the pages of one, still need: when they
        joined, the source was not yet written."""
        due, self._due = self._due, []
        return [copy for prompt, sequence, copy in due if sequence.decoding or copy.destination in prompt.kept_pages]

    def computed(self, sequence: Sequence, prompt: SharedPrompt) -> None:
        """Records that a running sample has all of the prompt in its pages, by what is dispatched until now."""
        prompt.holders[sequence.request_id] = sequence
        self._drop(prompt)
        self._settle(prompt)

    def trimmed(self, sequence: Sequence) -> None:
        """Records that windows have left pages of a running sequence."""
        prompt = sequence.prompt
        if prompt is None or sequence.request_id not in prompt.holders or prompt.is_in(sequence):
            return
        del prompt.holders[sequence.request_id]
        if not prompt.holders:
            self._settle(prompt)

    def moved(self, sequence: Sequence) -> None:
        """Records that a sample which windows have let leave its prompt will, or will not, compute it again."""
        if sequence.prompt is not None:
            self._settle(sequence.prompt)

    def leaves(self, sequence: Sequence, *, keep: bool) -> None:
        """Records that a sample is about to release its pages. keep: others that wait for a slot may still use those of
        the prompt, which are then taken out of its table."""
        prompt = sequence.prompt
        if prompt is None or prompt.holders.pop(sequence.request_id, None) is None or prompt.holders:
            return
        if keep and prompt.queued:
            count = prompt.num_shared + 1
            prompt.kept, prompt.kept_left = [table[:count] for table in sequence.tables], sequence.left
            for table in sequence.tables:
                del table[:count]
            sequence.left = [0] * len(prompt.kept_left)
            self._keeping[prompt] = None
        else:
            self._settle(prompt)

    def ended(self, sequence: Sequence) -> None:
        """Forgets a sample that has ended and left its queue."""
        prompt = sequence.prompt
        if prompt is None:
            return
        was_withheld = sequence.request_id in prompt.withheld
        prompt.forget(sequence)
        if prompt.kept and not prompt.queued:
            self._drop(prompt)
        if prompt.empty:
            del self._prompts[prompt]
        elif not was_withheld:
            self._settle(prompt)

    def held_back(self, sequence: Sequence) -> None:
        """Records that a sample has ended, whose final output waits for those of its batch."""
        if sequence.prompt is not None:
            self._settle(sequence.prompt)

    def reclaim(self, spared: SharedPrompt | None = None) -> bool:
        """Frees the pages that one prompt keeps, the one that has kept them for longest; returns False where none does.

        Its samples will compute it again. spared: a prompt whose pages must stay.
        """
        for prompt in self._keeping:
            if prompt is not spared:
                self._drop(prompt)
                self._settle(prompt)
                return True
        return False

    def lost(self) -> None:
        """Records that the content of all device pages is lost. When the samples have left theirs, `settle` must
        follow."""
        self._due.clear()
        for prompt in self._prompts:
            self._drop(prompt)
            prompt.holders.clear()

    def settle(self) -> None:
        """Restores, for every prompt, that one sample computes it where nobody holds it."""
        for prompt in self._prompts:
            self._settle(prompt)

    def check_integrity(self) -> None:
        """Asserts what holds of every shared prompt between two steps."""
        for prompt in self._prompts:
            prompt.check_integrity()
            assert bool(prompt.kept) == (prompt in self._keeping), "kept pages are in no list, or the reverse"
            assert not prompt.empty, "a prompt without samples is remembered"

    def _drop(self, prompt: SharedPrompt) -> None:
        """Releases the pages that a prompt keeps."""
        if prompt.kept:
            self._pool.release(prompt.kept_pages)
            prompt.kept = []
            del self._keeping[prompt]

    def _settle(self, prompt: SharedPrompt) -> None:
        """Withholds the samples that must wait for the prompt, and queues those that need not."""
        if prompt.held:
            for sequence in list(prompt.withheld.values()):
                self._offer(sequence, prompt)
            return
        led = prompt.led
        if not led and not prompt.queued and prompt.withheld:
            self._offer(next(iter(prompt.withheld.values())), prompt)
        for sequence in list(prompt.queued.values())[0 if led else 1 :]:
            del prompt.queued[sequence.request_id]
            self._waiting.withhold(sequence)
            prompt.withheld[sequence.request_id] = sequence

    def _offer(self, sequence: Sequence, prompt: SharedPrompt) -> None:
        del prompt.withheld[sequence.request_id]
        self._waiting.offer(sequence)
        prompt.queued[sequence.request_id] = sequence
