"""Beam search in Python: the outputs of transformers with the shipped model, and what the calls return."""

from __future__ import annotations

import asyncio
import collections
import json
import math
import pathlib
import time

import pytest

import jaxserve
from jaxserve import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.telemetry.recorder import StepRecorded
from tests.batch_helpers import line
from tests.batch_helpers import run as run_batch
from tests.server.fakes import WAIT_SECONDS, EchoEngine, save_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
REFERENCES = ROOT / "tests" / "models" / "beam_references.json"
CONFIG = EngineConfig(  # its programs are those of test_default_model
    model=str(ROOT / "models" / "tiny" / "checkpoint"),
    scheduler=SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=256),
    cache=CacheConfig(num_pages=1025),
    token_buckets=(8, 32, 256),
    row_buckets=(8, 32),
)
OF_VLLM = ROOT / "tests" / "models" / "vllm_beam_references.json"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def llm():
    with LLM(config=CONFIG) as llm:
        yield llm


@pytest.fixture(scope="module")
def recorded():
    return json.loads(REFERENCES.read_text("utf-8"))


def test_outputs_are_those_of_transformers(llm, recorded):
    """All outputs of 20 prompts under each setting, in their order, with their scores; all searches at once."""
    asked = [(prompt, *pair) for prompt in recorded["prompts"] for pair in enumerate(recorded["settings"])]
    assert len(recorded["prompts"]) == 20
    params = [
        SamplingParams(
            use_beam_search=True,
            n=setting["num_beams"],
            early_stopping=setting["early_stopping"],
            length_penalty=setting["length_penalty"],
            stop_token_ids=setting["stop"],
            max_tokens=10,
            logprobs=0,
        )
        for _, _, setting in asked
    ]
    prompts = [{"prompt_token_ids": prompt["prompt"]} for prompt, _, _ in asked]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    reasons: collections.Counter[str] = collections.Counter()
    for (prompt, place, setting), output in zip(asked, outputs, strict=True):
        expected = prompt["searches"][place]
        found = [list(one.token_ids) for one in output.outputs]
        assert found == expected["sequences"], (prompt["text"], setting)
        for one, score in zip(output.outputs, expected["scores"], strict=True):
            length = len(one.token_ids) ** setting["length_penalty"]
            assert one.cumulative_logprob / length == pytest.approx(score, rel=TOLERANCE, abs=TOLERANCE)
            stopped = one.token_ids[-1] in (2, *setting["stop"])
            assert one.finish_reason == ("stop" if stopped else "length")
            reasons[one.finish_reason] += 1
    assert min(reasons.values()) > 100, "both ways to end are compared"
    llm._client.core.check_integrity()


def test_outputs_are_those_of_vllm(llm, recorded):
    """All outputs of the same prompts by vLLM's rule, in their order, as vLLM's own beam search has found them."""
    prompts = [{"prompt_token_ids": prompt["prompt"]} for prompt in recorded["prompts"]]
    for row in json.loads(OF_VLLM.read_text("utf-8")):
        outputs = llm.beam_search(prompts, BeamSearchParams(**row["setting"]))
        for prompt, output, expected in zip(recorded["prompts"], outputs, row["outputs"], strict=True):
            found = [one.tokens[len(prompt["prompt"]) :] for one in output.sequences]
            assert found == expected["sequences"], (prompt["text"], row["setting"])
            sums = [one.cum_logprob for one in output.sequences]
            assert sums == pytest.approx(expected["sums"], rel=TOLERANCE, abs=TOLERANCE)


def test_the_texts_of_the_recorded_prompts_are_encoded_so(llm, recorded):
    for prompt in recorded["prompts"]:
        assert llm.get_tokenizer().encode(prompt["text"]) == prompt["prompt"]


def test_outputs_have_vllms_shape(llm):
    assert jaxserve.BeamSearchOutput is not None
    prompts = ["reverse: stressed\n", {"prompt_token_ids": [1, 261, 35, 102, 100, 101, 13]}]
    first, second = llm.beam_search(prompts, BeamSearchParams(beam_width=3, max_tokens=12))
    assert [sequence.text for sequence in first.sequences[:1]] == ["reverse: stressed\ndesserts"]
    assert second.sequences[0].text == "sort: cab\nabc"
    for output in (first, second):
        assert (len(output.sequences), output.error) == (3, "")
        for one in output.sequences:
            new = one.tokens[-len(one.logprobs) :]
            assert one.cum_logprob == pytest.approx(
                math.fsum(position[token_id].logprob for position, token_id in zip(one.logprobs, new, strict=True))
            )
            assert all(6 <= len(position) <= 7 for position in one.logprobs), "the likeliest six, and its own"
            assert (one.finish_reason, one.stop_reason) == ("stop", 2)
            assert one.tokens[-1] == 2
    scores = [one.cum_logprob / (len(one.tokens) - 1) for one in first.sequences]
    assert scores == sorted(scores, reverse=True)


def test_options_of_a_search(llm):
    space = SamplingParams(
        n=2, use_beam_search=True, max_tokens=9, stop_token_ids=(35,), include_stop_str_in_output=True
    )
    (ended,) = llm.generate("copy: ab cd\n", space, use_tqdm=False)
    assert (ended.outputs[0].text, ended.outputs[0].finish_reason) == ("ab ", "stop")
    (ignored,) = llm.beam_search("sort: cab\n", BeamSearchParams(2, 12, ignore_eos=True))
    assert {(one.finish_reason, one.stop_reason, len(one.tokens)) for one in ignored.sequences} == {
        ("length", None, 7 + 12)
    }
    greedy = llm.generate("the quick", SamplingParams(temperature=0, max_tokens=9), use_tqdm=False)[0].outputs[0]
    (narrow,) = llm.beam_search("the quick", BeamSearchParams(1, 9, ignore_eos=True, temperature=0.7))
    assert narrow.sequences[0].tokens[-9:] == list(greedy.token_ids), "a beam of one is greedy"


def test_a_search_of_any_width_leaves_others_alone(llm):
    """Searches and requests of every kind together give what they give alone, and all pages come back."""
    wide = SamplingParams(n=10, use_beam_search=True, max_tokens=6, logprobs=0)
    drawn = SamplingParams(temperature=1.0, seed=3, max_tokens=6, n=2)
    prompts, params = ["Once upon", "E = m", "add: 20+22\n"], [wide, drawn, wide]
    alone = [llm.generate(prompt, one, use_tqdm=False)[0].outputs for prompt, one in zip(prompts, params, strict=True)]
    together = [one.outputs for one in llm.generate(prompts, params, use_tqdm=False)]
    assert [[one.token_ids for one in outputs] for outputs in together] == [
        [one.token_ids for one in outputs] for outputs in alone
    ]
    core = llm._client.core
    core.check_integrity()
    assert core.scheduler.pool.num_used == 0
    assert core.scheduler.predictor.num_observed, "drawn ones are observed"


def test_a_step_computes_only_the_last_tokens_of_a_beam(llm):
    """The prompt once, and then of each beam what its page that is not full holds."""
    core = llm._client.core
    computed: list[int] = []
    unsubscribe = core.recorder.subscribe(
        lambda event: computed.append(event.prefill_tokens) if isinstance(event, StepRecorded) else None
    )
    prompt = {"prompt_token_ids": list(range(3, 203))}
    llm.beam_search(prompt, BeamSearchParams(4, 20, ignore_eos=True))
    unsubscribe()
    page = CONFIG.cache.page_size
    assert 200 + 19 * 4 <= sum(computed) <= 200 + 19 * 4 * page


def test_a_deadline_ends_a_search_with_what_there_is(llm):
    begun = time.time()
    params = BeamSearchParams(beam_width=10, max_tokens=1900, ignore_eos=True)
    (output,) = llm.beam_search("Once upon a time", params, deadline=begun + 1.0)
    assert {one.finish_reason for one in output.sequences} == {"deadline"}
    assert len(output.sequences) == 10
    assert output.error.startswith("deadline ")
    llm._client.core.check_integrity()


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"beam_width": 0}, "beam_width is 0; it must be from 1 to 16384"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be from 1"),
        ({"length_penalty": 20}, "length_penalty is 20; it must be at least -10 and at most 10"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon'; it must be one of true, false, never"),
        ({"beam_with": 3}, r"BeamSearchParams has no field 'beam_with'; did you mean beam_width\?"),
    ],
)
def test_bad_parameters_are_named(fields, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4} | fields)


def test_a_beam_that_is_too_wide_is_named_with_the_limit(llm):
    with pytest.raises(ValueError, match=r"^beam_width is 11; a beam search of this width needs the 22 likeliest ids"):
        llm.beam_search("a", BeamSearchParams(11, 4))
    with pytest.raises(ValueError, match=r"^prompts\[1\]: prompt has 3 tokens and max_tokens is 2046; together 2049"):
        llm.beam_search(["a", "ab"], BeamSearchParams(2, 2046))


def test_in_an_event_loop(tmp_path):
    tokenizer, engine = Tokenizer(save_tokenizer(tmp_path)), EchoEngine()

    async def body() -> None:
        async with AsyncLLM(client=engine, tokenizer=tokenizer) as llm:
            one = await llm.beam_search("abcd", BeamSearchParams(2, 2))
            assert [sequence.tokens[5:] for sequence in one.sequences] == [[2], [0, 0]]
            assert [sequence.finish_reason for sequence in one.sequences] == ["stop", "length"]
            assert one.sequences[0].text == "abcd"
            engine.pause()
            engine.allow(1)
            aborted = asyncio.ensure_future(llm.beam_search("abcd", BeamSearchParams(2, 2), "r"))
            await asyncio.to_thread(engine.wait_for_requests, len(engine.requests) + 3)
            await llm.abort("r")
            assert {one.finish_reason for one in (await aborted).sequences} == {"abort"}
            canceled = asyncio.ensure_future(llm.beam_search("abcd", BeamSearchParams(2, 2), "s"))
            await asyncio.to_thread(engine.wait_for_requests, len(engine.requests) + 1)
            canceled.cancel()
            await asyncio.to_thread(engine.wait_for_abort, "s/0.0")
            assert llm.num_unfinished_requests == 0
            with pytest.raises(ValueError, match=r"^beam_width is 11; "):
                await llm.beam_search("a", BeamSearchParams(11, 4))
            engine.resume()

    asyncio.run(asyncio.wait_for(body(), WAIT_SECONDS))


def test_lines_of_a_batch_may_ask_for_a_search(tmp_path):
    """The echo engine's likeliest tokens are ids 0, 1 and 2, of which the last one ends an output."""
    asked = {"prompt": "abcd", "use_beam_search": True, "n": 2, "max_tokens": 2}
    lines = [line("a", **asked), line("b", **asked, length_penalty=5.0), line("c", **asked, top_p=0.5)]
    _, found = run_batch(tmp_path, lines, Tokenizer(save_tokenizer(tmp_path)), EchoEngine())
    reasons = {
        name: [choice["finish_reason"] for choice in found[name]["response"]["body"]["choices"]] for name in ("a", "b")
    }
    assert reasons == {"a": ["stop", "length"], "b": ["length", "length"]}
    assert found["c"]["error"]["message"].startswith("line 3: top_p is 0.5 and use_beam_search is true; ")
