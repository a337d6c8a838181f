"""Requests that may draw only certain tokens, over the fake runner: masks are made while a forward program computes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config.scheduling import MODES, PreemptionConfig
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.constraints import pack_mask
from jaxserve.engine.core import FAULT_SECONDS, EngineCore
from jaxserve.engine.messages import AddRequest, outputs
from jaxserve.models.config import ModelConfig
from jaxserve.request import NO_TOKEN_LEFT, EngineRequest, FinishReason
from jaxserve.runner.fake import FakeRunner, next_token
from jaxserve.runner.protocol import StepNotStartedError
from tests.engine.test_faults import COPIED, LATE, LOST, NOT_STARTED, Clock, FaultyRunner
from tests.scheduler.drive import alone

VOCAB = 101
MODEL = ModelConfig("LlamaForCausalLM", VOCAB, 8, 8, 1, 1, 1, 8, 256)


class Classes:
    """Constrained are the requests whose id begins with "c": they draw what is congruent, modulo 7, to the number of
    their tokens so far."""

    def __init__(self, calls: list[tuple[str, str]] | None = None):
        self.calls = [] if calls is None else calls

    def constrains(self, request: EngineRequest) -> bool:
        return request.request_id.startswith("c")

    def allowed(self, output_token_ids: Sequence[int]) -> np.ndarray:
        return np.arange(VOCAB) % 7 == len(output_token_ids) % 7

    def mask(self, request: EngineRequest, output_token_ids: Sequence[int]) -> np.ndarray:
        self.calls.append(("mask", request.request_id))
        return pack_mask(self.allowed(output_token_ids))


def expected(request: EngineRequest) -> list[int]:
    """The answer worked out token by token, with neither scheduler nor pages."""
    if not request.request_id.startswith("c"):
        return alone(request)[0]
    tokens: list[int] = []
    while len(tokens) < request.max_tokens:
        mask = pack_mask(Classes().allowed(tokens))
        tokens.append(next_token((*request.prompt_token_ids, *tokens), request, False, VOCAB, mask))
        assert tokens[-1] % 7 == (len(tokens) - 1) % 7
    return tokens


def make_core(runner: FakeRunner, constraints=None, **limits) -> EngineCore:
    config = EngineConfig(
        architecture=MODEL,
        load_format="dummy",
        scheduler=SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 32, **limits}),
        cache=CacheConfig(num_pages=runner.info.num_pages, swap_space=1.0 if runner.info.num_host_pages else 0.0),
    )
    constraints = Classes() if constraints is None else constraints
    return EngineCore(config, runner, now=Clock(0.01), clock=Clock(FAULT_SECONDS), constraints=constraints)


def requests(count: int) -> list[EngineRequest]:
    names = itertools.cycle(("a", "c", "b"))
    return [
        EngineRequest(f"{next(names)}{index}", tuple(range(1, 4 + 3 * index)), max_tokens=7 + index % 3, seed=index)
        for index in range(count)
    ]


def serve(core: EngineCore, wanted: Sequence[EngineRequest]) -> dict[str, tuple[list[int], FinishReason | None, str]]:
    tokens: dict[str, list[int]] = {one.request_id: [] for one in wanted}
    ends: dict[str, tuple[list[int], FinishReason | None, str]] = {}
    for one in wanted:
        assert core.handle(AddRequest(one)) == []
    while core.busy:
        for message in core.step():
            for output in outputs(message):
                tokens[output.request_id] += output.token_ids
                if output.finish_reason is not None:
                    ends[output.request_id] = tokens[output.request_id], output.finish_reason, output.error
        core.check_integrity()
    return ends


def undisturbed(wanted: Sequence[EngineRequest]) -> dict[str, tuple[list[int], FinishReason | None, str]]:
    return {one.request_id: (expected(one), FinishReason.LENGTH, "") for one in wanted}


class Watched(FakeRunner):
    def __init__(self, calls: list[tuple[str, str]]):
        super().__init__()
        self.calls = calls
        self.under_way: list[str] = []

    def dispatch_forward(self, plan):
        self.calls.append(("forward", str(plan.step)))
        self.under_way.append(str(plan.step))
        return super().dispatch_forward(plan)

    def dispatch_sample(self, plan, masks=None):
        self.calls.append(("sample", str(plan.step)))
        super().dispatch_sample(plan, masks)

    def collect(self, pending):
        self.calls.append(("collect", self.under_way.pop(0)))
        return super().collect(pending)


def test_masks_are_made_between_the_halves_of_a_step():
    """Of constrained rows alone, from the ids of the step before, while the device computes."""
    calls: list[tuple[str, str]] = []
    core = make_core(Watched(calls), Classes(calls))
    wanted = [EngineRequest("a", (1, 2), max_tokens=3), EngineRequest("c", (3, 4), max_tokens=2)]
    assert serve(core, wanted) == undisturbed(wanted)
    assert calls == [
        ("forward", "0"),
        ("mask", "c"),
        ("sample", "0"),
        ("forward", "1"),
        ("collect", "0"),
        ("mask", "c"),
        ("sample", "1"),
        ("forward", "2"),  # nobody in it is constrained
        ("sample", "2"),
        ("collect", "1"),
        ("collect", "2"),
    ]


@pytest.mark.parametrize("mode", MODES)
def test_constrained_requests_among_others(mode):
    """With chunked prompts, and pages so few that sequences are preempted, computed again or swapped."""
    wanted = requests(9)
    for host_pages, preemption in ((0, PreemptionConfig()), (24, PreemptionConfig(preemption_mode="swap"))):
        runner = FakeRunner(num_pages=15, num_host_pages=host_pages)
        core = make_core(runner, mode=mode, preemption=preemption, max_num_batched_tokens=16)
        assert serve(core, wanted) == undisturbed(wanted)
        assert core.stats().num_preemptions or mode in ("none", "static", "dynamic")


class FaultyHalves(FaultyRunner):
    """Fails in the second half of steps, too. samples: what the calls of `dispatch_sample` do, in order."""

    def __init__(self, samples, *arguments, **sizes):
        super().__init__(*arguments, **sizes)
        self.samples = iter(samples)

    def dispatch_sample(self, plan, masks=None):
        fault = next(self.samples, None)
        if fault == LOST:
            self._lose()
            raise RuntimeError("a program failed")
        if fault == NOT_STARTED:
            self._unsampled = None
            raise StepNotStartedError("memory is short", copied=True)
        super().dispatch_sample(plan, masks)


FAULTS = st.lists(st.sampled_from([None, None, None, NOT_STARTED, COPIED, LOST, LATE]), max_size=25)
HALVES = st.lists(st.sampled_from([None, None, None, NOT_STARTED, LOST]), max_size=25)


@settings(max_examples=40)
@given(FAULTS, HALVES, st.sampled_from(MODES), st.integers(15, 30))
def test_faults_in_either_half_change_nobodys_tokens(faults, halves, mode, num_pages):
    wanted = requests(8)
    calls = [call for fault in faults for call in (fault, None)]  # what is not started is, the next time
    samples = [call for fault in halves for call in (fault, None, None)]
    runner = FaultyHalves(samples, calls, num_pages=num_pages, num_host_pages=24)
    core = make_core(runner, mode=mode, preemption=PreemptionConfig(preemption_mode="swap"))
    answers = serve(core, wanted)
    for name, answer in undisturbed(wanted).items():
        if answers[name][1] is FinishReason.ERROR:  # it failed alone and once more
            assert "memory is short" in answers[name][2]
            assert answers[name][0] == answer[0][: len(answers[name][0])]
        else:
            assert answers[name] == answer


def test_a_mask_that_cannot_be_made_ends_its_request_alone():
    class Broken(Classes):
        def mask(self, request: EngineRequest, output_token_ids: Sequence[int]) -> np.ndarray:
            if request.request_id == "c1" and len(output_token_ids) == 3:
                raise RuntimeError("no such state")
            if request.request_id == "c4" and len(output_token_ids) == 2:
                return super().allowed(output_token_ids)
            return super().mask(request, output_token_ids)

    wanted = requests(8)
    answers, all_well = serve(make_core(FakeRunner(), Broken()), wanted), undisturbed(wanted)
    tokens, reason, error = answers.pop("c1")
    assert (tokens, reason) == (all_well.pop("c1")[0][:3], FinishReason.ERROR)
    assert error == "its mask cannot be made: RuntimeError: no such state"
    tokens, reason, error = answers.pop("c4")
    assert (tokens, reason) == (all_well.pop("c4")[0][:2], FinishReason.ERROR)
    assert error == "its mask cannot be made: ValueError: mask is bool[101]; it must be uint32[4], packed"
    assert answers == all_well


def test_a_mask_that_allows_nothing_ends_its_request_alone():
    class Strict(Classes):
        def allowed(self, output_token_ids: Sequence[int]) -> np.ndarray:
            return super().allowed(output_token_ids) & (len(output_token_ids) != 4)

    wanted = requests(5)
    answers, all_well = serve(make_core(FakeRunner(), Strict()), wanted), undisturbed(wanted)
    for name in ("c1", "c4"):
        assert answers.pop(name) == (all_well.pop(name)[0][:4], FinishReason.ERROR, NO_TOKEN_LEFT)
    assert answers == all_well


def test_masks_are_packed_from_the_lowest_bit_on():
    allowed = np.zeros(70, bool)
    allowed[[0, 31, 33, 69]] = True
    assert pack_mask(allowed).tolist() == [2**31 + 1, 2, 2**5]
    assert pack_mask(allowed).dtype == np.uint32
