"""Plans which tokens of prompts a step scores, and reads the log-probabilities of its result."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import numpy as np

from jaxserve.logprob_columns import LogprobColumns
from jaxserve.scheduler.plan import Scores, StepPlan, StepResult
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.step_in_progress import StepInProgress
from jaxserve.scheduler.update import ScoredTokens, SequenceUpdate


def planned_scores(step: StepInProgress, end: int) -> Scores:
    """Returns the prompt tokens that the chunks score, which follow `end` tokens, and counts them as scored.

    Each is scored once, from the hidden state of the token before it, when that is first computed: a sequence that is
    computed again after a preemption goes on where it was.
    """
    scored: list[tuple[str, int, int, tuple[int, ...]]] = []
    for chunk in step.chunks.values():
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        first, last = max(start + 1, sequence.next_scored), min(start + chunk.count, sequence.num_prompt_tokens - 1)
        if sequence.request.prompt_logprobs is not None and first <= last:
            targets = sequence.request.prompt_token_ids[first : last + 1]
            scored.append((sequence.request_id, sequence.order, end + first - 1 - start, targets))
            sequence.next_scored = last + 1
        end += chunk.count
    return Scores.of(scored)


def take_scores(plan: StepPlan, result: StepResult, owner: Callable[[str, int], Sequence | None]) -> list[Sequence]:
    """Hands the log-probabilities of prompt tokens to their sequences; returns those whose are not finite.

    owner: returns the sequence of a request id and order, if it still needs them.
    """
    found = 0 if result.scores is None else len(result.scores)
    if found != len(plan.scores):
        raise ValueError(f"step {plan.step} has {found} scores; it scored {len(plan.scores)} tokens")
    assert result.scores is not None
    failed, begin = [], 0
    for request_id, order, count in plan.scores.owners:
        scores, begin = result.scores.part(begin, begin + count), begin + count
        if (sequence := owner(request_id, order)) is None:
            continue
        if np.isnan(scores.values).any():
            failed.append(sequence)
        else:
            sequence.scores.append(scores.narrowed(sequence.request.prompt_logprobs or 0))
    return failed


def scored_tokens(
    plan: StepPlan,
    sampled: np.ndarray,
    wanting: np.ndarray,
    logprobs: LogprobColumns,
    sequences: Mapping[str, Sequence],
) -> ScoredTokens | None:
    """Returns the tokens of the decodes that want log-probabilities and go on; None where there are none.

    Args:
        plan: the step, of R decodes.
        sampled: int32 [R].
        wanting: bool [R], those decodes.
        logprobs: of all of the step's samples.
        sequences: by request id.
    """
    if not wanting.any():
        return None
    request_ids = tuple(itertools.compress(plan.decodes.request_ids, wanting.tolist()))
    width = max(sequences[request_id].request.logprobs or 0 for request_id in request_ids)
    columns = logprobs.part(0, len(wanting)).rows(wanting).narrowed(width)
    return ScoredTokens(request_ids, sampled[wanting].tolist(), columns)


def with_logprobs(update: SequenceUpdate, result: StepResult, place: int) -> SequenceUpdate:
    """Adds to the update of one sequence what it wants of log-probabilities. place: of its first token in `result`."""
    sequence, count = update.sequence, len(update.token_ids)
    wanted = sequence.request.logprobs
    if wanted is not None and result.logprobs is not None:
        columns = result.logprobs.part(place, place + count).narrowed(wanted)
        update = dataclasses.replace(update, logprobs=columns)
    if sequence.scores and count:
        update = dataclasses.replace(update, prompt_logprobs=sequence.take_scores())
    return update
