"""Makes the rows, samples and forks of the prompt chunks that a step computes."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxserve.scheduler.budgets import Budgets
from jaxserve.scheduler.modes import Mode
from jaxserve.scheduler.plan import NO_SCORES, Fork, PageTableWrite, PenaltyWrite, RowPlan, Scores
from jaxserve.scheduler.policies.policy import Policy
from jaxserve.scheduler.scoring import planned_scores
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.sequence_queues import SequenceQueues
from jaxserve.scheduler.shared_prompt import SharedPrompt
from jaxserve.scheduler.step_in_progress import StepInProgress, penalty_writes, slot_writes


@dataclasses.dataclass(frozen=True)
class PlannedChunks:
    """Holds what the chunks of a step add to its plan.

    samples: as `Samples.followed_by` takes them. forked: the sequences of `forks`.
    """

    rows: tuple[RowPlan, ...] = ()
    samples: tuple[tuple[int, int, int, bool, int], ...] = ()
    table_writes: tuple[PageTableWrite, ...] = ()
    penalty_writes: tuple[PenaltyWrite, ...] = ()
    scores: Scores = NO_SCORES
    forks: tuple[Fork, ...] = ()
    forked: tuple[Sequence, ...] = ()

    @property
    def num_places(self) -> int:
        """Returns the number of rows that a forward program must have room for."""
        return len(self.rows) + len(self.forks)


NO_CHUNKS = PlannedChunks()


class ChunkPlanner:
    """Counts the chunks of a step as computed and plans them. mode: None where samples of a prompt must not join the
    step that completes it: where a mode, or a bound of the step's time, decides what joins a step."""

    def __init__(self, queues: SequenceQueues, policy: Policy, budgets: Budgets, mode: Mode | None):
        self._queues = queues
        self._policy = policy
        self._budgets = budgets
        self._mode = mode

    def plan(self, step: StepInProgress, end: int, now: float) -> PlannedChunks:
        """Plans the chunks, whose tokens follow `end` others. One is sampled when it completes the sequence's known
        tokens, unless these are only embedded."""
        rows: list[RowPlan] = []
        samples: list[tuple[int, int, int, bool, int]] = []
        writes: list[PageTableWrite] = []
        forked: list[Sequence] = []
        scores = planned_scores(step, end)
        for chunk in step.chunks.values():
            row, sequence = chunk.row(), chunk.sequence
            rows.append(row)
            if chunk.admitted and chunk.held:
                writes += chunk.table_writes()
            position = sequence.num_computed = row.start + chunk.count
            end += chunk.count
            if position == sequence.num_known and sequence.pooled is not None:
                self._queues.running.computed(sequence)
            elif position == sequence.num_known:
                samples.append(self._sampled(sequence, end - 1))
            prompt = sequence.prompt
            if prompt is not None and position >= prompt.num_tokens > row.start:
                hidden_row = end - 1 - (position - prompt.num_tokens)  # of the prompt's last token
                joined = self._queues.sharing.fork(sequence, prompt, self._most_forks(prompt, now))
                samples += [self._sampled(fork, hidden_row) for fork in joined]
                forked += joined
                self._queues.sharing.computed(sequence, prompt)
        forks: list[Fork] = []
        for sequence in forked:
            assert sequence.slot is not None
            writes += slot_writes(sequence, len(sequence.pages))
            forks.append(
                Fork(sequence.request_id, sequence.order, sequence.slot, sequence.request, sequence.penalty_row)
            )
            self._policy.admitted(sequence)
        admitted = [chunk.sequence for chunk in step.chunks.values() if chunk.admitted]
        return PlannedChunks(
            rows=tuple(rows),
            samples=tuple(samples),
            table_writes=tuple(writes),
            penalty_writes=penalty_writes((*admitted, *forked)),
            scores=scores,
            forks=tuple(forks),
            forked=tuple(forked),
        )

    def _sampled(self, sequence: Sequence, hidden_row: int) -> tuple[int, int, int, bool, int]:
        """Returns the sample of a sequence whose known tokens are all computed; from now on it decodes."""
        position = sequence.num_computed
        self._queues.running.decode(sequence)
        if self._policy.counts_tokens:
            self._policy.decoded(np.array([sequence.tenant_number]))
        assert sequence.slot is not None
        return hidden_row, sequence.slot, position, position < sequence.stop_position, sequence.wants

    def _most_forks(self, prompt: SharedPrompt, now: float) -> float:
        """Returns how many samples may join the step that completes their prompt: none ahead of others in turn."""
        queues = self._queues
        if not prompt.withheld or self._mode is None or queues.preempted or queues.counts.preempted:
            return 0
        first, key = next(queues.waiting.candidates(now), None), self._policy.priority_key
        if first is not None and key(first) < key(next(iter(prompt.withheld.values()))):
            return 0
        return min(self._budgets.max_num_seqs, self._mode.max_running) - len(queues.running)
