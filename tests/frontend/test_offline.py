"""`LLM` over an engine whose answers are the prompts themselves."""

import re
import time

import pytest

from jaxserve.frontend.delta import EngineDeadError
from jaxserve.llm import LLM
from jaxserve.request import RequestOptions
from jaxserve.request_checks import InfeasibleError
from jaxserve.sampling_params import SamplingParams
from tests.engine_ready import changed
from tests.frontend.fakes import RuleEngine
from tests.frontend.tokenizers_for_tests import BOS, load


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


def test_outputs_come_in_the_order_of_the_prompts(tokenizer):
    with LLM(client=RuleEngine(), tokenizer=tokenizer) as llm:
        prompts = ["long " * 20, "s", {"prompt": "🍏"}, {"prompt_token_ids": [5, 6]}]
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=200), use_tqdm=False)
    assert [output.prompt for output in outputs] == ["long " * 20, "s", "🍏", None]
    assert [output.outputs[0].text for output in outputs[:3]] == ["long " * 20, "s", "🍏"]
    assert outputs[1].prompt_token_ids[0] == BOS
    assert outputs[3].prompt_token_ids == (5, 6)
    assert outputs[3].outputs[0].token_ids == (5, 6, 2)
    assert len({output.request_id for output in outputs}) == 4
    for output in outputs:
        assert output.finished
        assert (output.outputs[0].index, output.outputs[0].finish_reason, output.error) == (0, "stop", "")
        assert output.num_cached_tokens == 0


def test_one_prompt_may_be_given_alone(tokenizer):
    llm = LLM(client=RuleEngine(), tokenizer=tokenizer)
    for prompt in ("hi", {"prompt": "hi"}):
        (output,) = llm.generate(prompt, use_tqdm=False)
        assert output.outputs[0].text == "hi"
    assert llm.generate([], use_tqdm=False) == []


def test_parameters_one_for_each(tokenizer):
    llm = LLM(client=RuleEngine(), tokenizer=tokenizer)
    params = [SamplingParams(max_tokens=2), SamplingParams(stop="c")]
    first, second = llm.generate(["abcd", "abcd"], params, use_tqdm=False)
    assert (first.outputs[0].text, first.outputs[0].finish_reason) == ("ab", "length")
    assert (second.outputs[0].text, second.outputs[0].finish_reason) == ("ab", "stop")
    assert len(second.outputs[0].token_ids) == 3
    with pytest.raises(ValueError, match=r"^sampling_params has 2 items for 1 prompts; give one each$"):
        llm.generate(["a"], params)


def test_priority_tenant_and_deadline_one_for_all_or_for_each(tokenizer):
    engine, deadline = RuleEngine(), time.time() + 1000
    llm = LLM(client=engine, tokenizer=tokenizer)
    llm.generate(["a", "b"], use_tqdm=False, priority=[3, -1], tenant="x", deadline=[None, deadline])
    assert [request.options for request in engine.requests] == [
        RequestOptions("x", 3),
        RequestOptions("x", -1, deadline),
    ]
    for options, message in (
        ({"priority": "high"}, "prompts[0]: priority is 'high'; it must be a whole number"),
        ({"priority": [1, 2.5]}, "prompts[1]: priority is 2.5; it must be a whole number"),
        ({"tenant": [1, 2]}, "prompts[0]: tenant is 1; it must be text"),
        ({"deadline": "soon"}, "prompts[0]: deadline is 'soon'; it must be a finite number of seconds"),
        ({"priority": [1]}, "priority has 1 items for 2 prompts; give one each"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            llm.generate(["a", "b"], use_tqdm=False, **options)


def test_a_prompt_whose_deadline_passes_ends_and_the_others_go_on(tokenizer):
    deadline = time.time() + 0.2
    engine = RuleEngine(on_step=lambda step: time.sleep(0.3 if step == 2 else 0))
    llm = LLM(client=engine, tokenizer=tokenizer)
    late, passed, good = llm.generate(["abcdef"] * 3, use_tqdm=False, deadline=[time.time() - 5, deadline, None])
    assert (late.outputs[0].finish_reason, late.outputs[0].token_ids) == ("deadline", ())
    assert "before the request arrived" in late.error
    assert passed.outputs[0].finish_reason == "deadline"
    assert passed.error.startswith("deadline passed after")
    assert good.outputs[0].text == "abcdef"
    assert llm.generate("abc", use_tqdm=False)[0].outputs[0].text == "abc"


def test_more_prompts_than_the_queue_takes(tokenizer):
    engine = RuleEngine()
    llm = LLM(client=engine, tokenizer=tokenizer)
    prompts = [f"number {index}" for index in range(100)]
    outputs = llm.generate(prompts, SamplingParams(stop=" "), use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == ["number"] * 100
    assert engine.max_unfinished <= engine.ready.max_num_seqs + engine.ready.max_num_waiting


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        ("", ValueError, "prompts[1]: prompt is empty; at least one token is needed"),
        (
            7,
            ValueError,
            "prompts[1]: prompt is of type int; it must be text, {'prompt': text} or {'prompt_token_ids': ids}",
        ),
        ({"text": "a"}, ValueError, "prompts[1]: prompt has the keys ['text']; it takes either 'prompt' or"),
        ({"prompt_token_ids": "a"}, ValueError, "prompts[1]: prompt has the keys ['prompt_token_ids']; it takes"),
        ({"prompt_token_ids": [300]}, ValueError, "prompts[1]: prompt_token_ids[0] is 300; token ids must be"),
        (
            {"prompt_token_ids": [5] * 510},
            ValueError,
            "prompts[1]: prompt has 510 tokens and max_tokens is 8; together",
        ),
    ],
)
def test_an_invalid_prompt_stops_the_call_before_anything_is_computed(tokenizer, prompt, kind, message):
    engine = RuleEngine()
    llm = LLM(client=engine, tokenizer=tokenizer)
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        llm.generate(["fine", prompt], SamplingParams(max_tokens=8))
    assert not engine.requests


def test_an_infeasible_prompt_keeps_its_kind(tokenizer):
    engine = RuleEngine()
    engine.ready = changed(engine.ready, usable_pages=1)
    with pytest.raises(InfeasibleError, match=r"^prompts\[0\]: prompt has 21 tokens"):
        LLM(client=engine, tokenizer=tokenizer).generate(["a" * 20], SamplingParams(max_tokens=8))


def test_a_request_that_fails_says_so_and_the_others_go_on(tokenizer):
    llm = LLM(client=RuleEngine(), tokenizer=tokenizer)
    bad, good = llm.generate([{"prompt_token_ids": [5, 0]}, "ok"], use_tqdm=False)
    assert (bad.outputs[0].finish_reason, bad.error) == ("error", "logits are not finite")
    assert good.outputs[0].text == "ok"


def test_an_engine_that_fails(tokenizer):
    engine = RuleEngine()
    engine.dead = "out of memory"
    with pytest.raises(EngineDeadError, match=r"^the engine has ended: out of memory$"):
        LLM(client=engine, tokenizer=tokenizer).generate(["a"], use_tqdm=False)


def test_an_interrupted_call_leaves_nothing_behind(tokenizer):
    def interrupt(step):
        if step == 3:
            raise KeyboardInterrupt

    engine = RuleEngine(on_step=interrupt)
    llm = LLM(client=engine, tokenizer=tokenizer)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a" * 50] * 10, use_tqdm=False)
    assert llm.front_end.num_open == 0
    (output,) = llm.generate(["again"], use_tqdm=False)
    assert output.outputs[0].text == "again"


def test_the_progress_bar_shows_tokens_per_second(tokenizer, capsys):
    LLM(client=RuleEngine(), tokenizer=tokenizer).generate(["abc"])
    shown = capsys.readouterr().err
    assert re.search(r"Generating: 100%.*1/1 .*in \d+ tok/s, out \d+ tok/s", shown)


def test_drawn_seeds_are_the_same_in_every_run(tokenizer):
    seeds = []
    for _ in range(2):
        engine = RuleEngine()
        LLM(client=engine, tokenizer=tokenizer).generate(["a", "b"], use_tqdm=False)
        seeds.append([request.seed for request in engine.requests])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 2


def test_close_ends_the_engine(tokenizer):
    engine = RuleEngine()
    llm = LLM(client=engine, tokenizer=tokenizer)
    llm.close()
    assert engine.closed


# ---- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "m", "max_seqs": 3}, "engine option 'max_seqs' is unknown; did you mean max_num_seqs?"),
        ({}, "model is not set; give a checkpoint directory, or load_format 'dummy' and an architecture"),
        ({"model": "no/such"}, "model directory 'no/such' does not exist; set EngineConfig.model"),
        ({"model": "no/such", "tokenizer": "no/tokenizer"}, "tokenizer directory 'no/tokenizer' does not exist"),
        ({"client": object(), "max_num_seqs": 3}, "client is an engine that is already running; it takes no model or"),
    ],
)
def test_faulty_options(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        LLM(**arguments)
