"""Applies the result of a step to its sequences: tokens are appended, and those that end leave."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from jaxserve.request import COMPLETED, EngineRequest, FinishReason, RequestStatus
from jaxserve.scheduler.batch_barrier import BatchBarrier
from jaxserve.scheduler.decode_gap import DecodeGap
from jaxserve.scheduler.plan import NOT_FINITE, StepPlan, StepResult, Wants
from jaxserve.scheduler.policies.policy import Policy
from jaxserve.scheduler.pooled_prompts import NOT_POOLED, take_pooled
from jaxserve.scheduler.sampled_tokens import finish_reason, no_token, one_by_one, several
from jaxserve.scheduler.scoring import scored_tokens, take_scores, with_logprobs
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.sequence_queues import SequenceQueues
from jaxserve.scheduler.update import SequenceUpdate, StepUpdate


class StepResults:
    """Appends sampled ids to sequences, and ends sequences.

    Args:
        sequences: the unfinished ones by request id, from which those that end are removed.
        queues: in which sequences wait and run.
        barrier: holds the final outputs of static batches.
        holds: whether outputs are held until their batch has ended.
        policy: is told of sequences that end.
        learn: receives a request, its output tokens, and how many were expected, when it has come to its end.
        decode_gap: is told of sequences that end; None where no gap is bounded.
    """

    def __init__(
        self,
        sequences: dict[str, Sequence],
        queues: SequenceQueues,
        barrier: BatchBarrier,
        *,
        holds: bool,
        policy: Policy,
        learn: Callable[[EngineRequest, int, float], None],
        decode_gap: DecodeGap | None,
    ):
        self._sequences = sequences
        self._queues = queues
        self._barrier = barrier
        self._holds = holds
        self._policy = policy
        self._learn = learn
        self._decode_gap = decode_gap

    def apply(self, plan: StepPlan, result: StepResult) -> StepUpdate:
        """Appends the sampled ids of a step to their sequences and returns what changed."""
        token_ids = np.asarray(result.token_ids, np.int32)
        if len(token_ids) != plan.num_sampled:
            raise ValueError(f"step {plan.step} has {len(token_ids)} token ids; it sampled {plan.num_sampled} rows")
        others = self._take_unsampled(plan, result)
        if plan.decodes.counts is not None:
            return self._update_several(plan, token_ids, result, others)
        request_ids, sampled = plan.decodes.request_ids, token_ids[: len(plan.decodes)]
        stay = self._queues.running.decoding.take(plan.decodes, plan.samples, sampled)
        for request_id, order, place, token_id in one_by_one(plan, token_ids, ~stay):
            sequence = self.owner(request_id, order)
            if sequence is not None:
                others.append(with_logprobs(self._take(sequence, (token_id,)), result, place))
        if self._barrier:
            others += self.let_go()
        scored = None
        if result.logprobs is not None:
            wanting = stay & plan.samples.wanting(Wants.LOGPROBS)[: len(stay)]
            scored = scored_tokens(plan, sampled, wanting, result.logprobs, self._sequences)
            stay = stay & ~wanting
        if not stay.all():
            request_ids, sampled = tuple(itertools.compress(request_ids, stay.tolist())), sampled[stay]
        return StepUpdate(request_ids, sampled.tolist(), others, scored=scored)

    def _take_unsampled(self, plan: StepPlan, result: StepResult) -> list[SequenceUpdate]:
        """Hands log-probabilities of prompt tokens and pooled hidden states to their sequences; returns those that end
        with it: prompts that were to be embedded, and requests whose numbers are not finite."""
        ended = []
        if len(plan.scores):
            failed = take_scores(plan, result, self.owner)
            ended += [self.finish(sequence, FinishReason.ERROR, no_token(NOT_FINITE)) for sequence in failed]
        if plan.num_pooled:
            for sequence, pooled in take_pooled(plan, result, self.owner):
                finish = FinishReason.ERROR, NOT_POOLED
                ended.append(self.end(sequence, FinishReason.STOP, ()) if pooled else self.finish(sequence, *finish))
        return ended

    def _update_several(
        self, plan: StepPlan, token_ids: np.ndarray, result: StepResult, others: list[SequenceUpdate]
    ) -> StepUpdate:
        """Does what `update` does, for a plan whose rows have several samples; `result.counts` says how many are
        accepted. others: updates that the step has made already."""
        counts = np.zeros(0, np.int32) if result.counts is None else np.asarray(result.counts, np.int32)
        if len(counts) != len(plan.decodes):
            raise ValueError(f"step {plan.step} has {len(counts)} counts; it decoded {len(plan.decodes)} rows")
        for request_id, order, place, planned, found in several(plan, token_ids, counts):
            sequence = self.owner(request_id, order)
            if sequence is None:
                continue
            refused = planned - len(found)
            if sequence.decoding:
                self._queues.running.decoding.give_back(sequence, refused)
            else:  # preempted meanwhile; computed again from the start, or swapped as if all had held
                sequence.num_pending -= refused
                sequence.num_computed -= refused if sequence.num_computed else 0
            others.append(with_logprobs(self._take(sequence, found), result, place))
        if self._barrier:
            others += self.let_go()
        return StepUpdate((), [], others)

    def owner(self, request_id: str, order: int) -> Sequence | None:
        """Returns the sequence that a row was planned for, if it still needs tokens."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None or sequence.order != order or request_id in self._barrier else sequence

    def _take(self, sequence: Sequence, token_ids: tuple[int, ...]) -> SequenceUpdate:
        """Appends the next tokens to one sequence, up to the one that ends it."""
        if not sequence.decoding:
            sequence.num_pending -= len(token_ids)
        for count, token_id in enumerate(token_ids):
            if token_id < 0:
                return dataclasses.replace(
                    self.finish(sequence, FinishReason.ERROR, no_token(token_id)), token_ids=token_ids[:count]
                )
            sequence.output_token_ids.append(token_id)
            reason = finish_reason(sequence, token_id)
            if reason is not None:
                return self.end(sequence, reason, token_ids[: count + 1])
        return SequenceUpdate(sequence, token_ids)

    def end(self, sequence: Sequence, reason: FinishReason, token_ids: tuple[int, ...]) -> SequenceUpdate:
        """Ends a sequence with its last tokens; under static batching it stays registered until its whole batch has
        ended."""
        if self._holds:
            self._queues.leave(sequence)
            sequence.status = RequestStatus.ENDING
            self._queues.sharing.held_back(sequence)
            self._barrier.hold(sequence, reason)
            return SequenceUpdate(sequence, token_ids)
        return dataclasses.replace(self.finish(sequence, reason), token_ids=token_ids)

    def let_go(self) -> list[SequenceUpdate]:
        """Returns the final outputs of static batches whose sequences have all ended."""
        return [self.finish(sequence, reason) for sequence, reason in self._barrier.released()]

    def finish(self, sequence: Sequence, reason: FinishReason, error: str = "") -> SequenceUpdate:
        """Ends a sequence for good and frees what it holds."""
        self._queues.leave(sequence, failed=reason is FinishReason.ERROR)
        self._queues.sharing.ended(sequence)
        self._barrier.forget(sequence)
        del self._sequences[sequence.request_id]
        sequence.status = RequestStatus.FINISHED
        self._policy.ended(sequence)
        if reason.value in COMPLETED and sequence.pooled is None:
            if sequence.request.max_tokens > 1:  # a beam can only have 1, which says nothing of others
                self._learn(sequence.request, len(sequence.output_token_ids), sequence.expected_output)
        elif self._decode_gap is not None:
            self._decode_gap.monitor.ended(sequence.order)  # that of a completed one is forgotten once it is measured
        return SequenceUpdate(sequence, (), reason, error)
