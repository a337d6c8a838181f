"""`LLM` over the engine's loop and a runner without a model: the samples of a request are those of separate ones."""

from __future__ import annotations

import pytest

from jaxserve.config.parallel_samples import ParallelSamplesConfig
from jaxserve.config.settings import EngineConfig, SchedulerConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.inline import InlineEngine
from jaxserve.engine.messages import AbortRequest, AddRequest, decode, encode, outputs
from jaxserve.llm import LLM
from jaxserve.models.config import ModelConfig
from jaxserve.request import EngineRequest, FinishReason
from jaxserve.runner.fake import FakeRunner
from jaxserve.runner.protocol import StepNotStartedError
from jaxserve.sampling_params import SamplingParams

SHAPE = ModelConfig("LlamaForCausalLM", 101, 8, 8, 1, 1, 1, 8, 512)
PROMPTS = [{"prompt_token_ids": [*range(3, 3 + length)]} for length in (1, 16, 37, 64)]


def config(seqs: int = 4, **more) -> EngineConfig:
    scheduler = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=32, max_num_waiting=100)
    return EngineConfig(architecture=SHAPE, load_format="dummy", scheduler=scheduler, **more)


def llm(pages: int = 60, seqs: int = 4, **more) -> LLM:
    runner = FakeRunner(num_pages=pages, page_size=4)
    settings = config(seqs, **more)
    return LLM(client=InlineEngine(settings, runner), config=settings)


@pytest.mark.parametrize(("pages", "seqs"), [(60, 4), (28, 4), (200, 32)])
def test_outputs_have_the_tokens_of_separate_requests(pages: int, seqs: int):
    with llm(pages, seqs) as model:
        params = SamplingParams(n=9, seed=2**63 - 4, max_tokens=11)
        found = model.generate(PROMPTS, params, use_tqdm=False)
        for prompt, result in zip(PROMPTS, found, strict=True):
            assert [output.index for output in result.outputs] == [*range(9)]
            assert (result.finished, result.error) == (True, "")
            assert list(result.prompt_token_ids) == prompt["prompt_token_ids"]
            assert len({output.token_ids for output in result.outputs}) > 4
        seeds = [2**63 - 4 + index for index in range(4)]  # the next ones begin again at -2^63
        for index, seed in enumerate(seeds):
            alone = model.generate(PROMPTS, SamplingParams(seed=seed, max_tokens=11), use_tqdm=False)
            assert [one.outputs[0].token_ids for one in alone] == [one.outputs[index].token_ids for one in found]
        core = model._client.core  # pyright: ignore[reportAttributeAccessIssue]
        core.check_integrity()
        stats = core.stats()
        lengths = sum(len(prompt["prompt_token_ids"]) for prompt in PROMPTS)
        assert stats.prompt_tokens == 5 * lengths, "a prompt counts once"
        assert stats.generation_tokens == (9 + 4) * 4 * 11
        assert stats.pages_used == 0


def test_limits_are_known_to_the_front_end():
    with llm(samples=ParallelSamplesConfig(max_n=8)) as model:
        with pytest.raises(ValueError, match=r"prompts\[1\]: n is 9; at most 8 samples"):
            model.generate(PROMPTS[:2], [SamplingParams(), SamplingParams(n=9)], use_tqdm=False)
    core = EngineCore(config(samples=ParallelSamplesConfig(max_n=16_384)), FakeRunner())
    assert core.ready(0.0).limits.max_n == 104, "as many as may be unfinished"
    with pytest.raises(ValueError, match="max_n is 0; it must be at least 1"):
        ParallelSamplesConfig(max_n=0)
    with pytest.raises(ValueError, match="max_n is 16385; it must be at most 16384"):
        ParallelSamplesConfig(max_n=16_385)


def test_more_samples_than_places_wait_for_those_before_them():
    with llm(seqs=1, samples=ParallelSamplesConfig(max_n=101)) as model:
        found = model.generate(PROMPTS[:2], SamplingParams(n=101, seed=1, max_tokens=1), use_tqdm=False)
    assert [len(one.outputs) for one in found] == [101, 101]


def collect(core: EngineCore, messages) -> dict[str, tuple[list[int], FinishReason | None, str]]:
    """Runs the engine until it is idle; tokens, reason and error of each sample."""
    found: dict[str, tuple[list[int], FinishReason | None, str]] = {}

    def take(answers) -> None:
        for output in (one for answer in answers for one in outputs(answer)):
            tokens, _, _ = found.setdefault(output.request_id, ([], None, ""))
            tokens.extend(output.token_ids)
            found[output.request_id] = tokens, output.finish_reason, output.error

    for message in messages:
        sent = decode(encode(message))
        assert isinstance(sent, AddRequest | AbortRequest)
        take(core.handle(sent))
    while core.busy:
        take(core.step())
        core.check_integrity()
    return found


REQUEST = EngineRequest("r", tuple(range(3, 40)), 6, temperature=1.0, seed=9)
NAMES = ("r/1", "r/2", "r/3")


def test_a_message_that_cannot_be_queued_is_answered_for_every_sample():
    core = EngineCore(config(), FakeRunner())
    assert core.handle(AddRequest(REQUEST, NAMES)) == []
    answers = [output for message in core.handle(AddRequest(REQUEST, NAMES)) for output in outputs(message)]
    line = "request_id 'r' is in use; ids of unfinished requests must differ"
    assert [(one.request_id, one.finish_reason, one.error) for one in answers] == [
        (name, FinishReason.ERROR, line) for name in ("r", *NAMES)
    ]


class Refusing(FakeRunner):
    """Cannot start a step that holds one of the given requests."""

    def __init__(self, *names: str):
        super().__init__(num_pages=100, page_size=4)
        self.names = set(names)

    def dispatch_forward(self, plan):
        if self.names.intersection(plan.request_ids):
            raise StepNotStartedError("refused")
        return super().dispatch_forward(plan)


def test_a_sample_that_cannot_be_computed_fails_alone():
    wanted = collect(EngineCore(config(8), FakeRunner(num_pages=100, page_size=4)), [AddRequest(REQUEST, NAMES)])
    for name in ("r", "r/2"):
        found = collect(EngineCore(config(2), Refusing(name)), [AddRequest(REQUEST, NAMES)])
        assert found.pop(name)[1:] == (FinishReason.ERROR, "the request cannot be computed: refused")
        # The fork that joins the step of the one that fails has no hidden state to draw from.
        went_on = {key: value for key, value in found.items() if value[1] is FinishReason.LENGTH}
        assert went_on == {key: wanted[key] for key in went_on}
        assert len(went_on) >= 2


def test_aborting_every_sample_leaves_nothing():
    core = EngineCore(config(2), FakeRunner(num_pages=100, page_size=4))
    found = collect(core, [AddRequest(REQUEST, NAMES), *[AbortRequest(name) for name in ("r", *NAMES)]])
    assert {reason for _, reason, _ in found.values()} == {FinishReason.ABORT}
    assert core.stats().pages_used == 0
