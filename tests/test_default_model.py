"""The shipped model as an oracle: its tasks have one right answer each, so a wrong page, slot or position shows as one.

The answers come from the task generators, not from the engine; the examples are held out from training.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import re

import pytest

from jaxserve import LLM, SamplingParams, StructuredOutputsParams
from jaxserve.config.chat_config import ChatConfig
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.models.tiny.tasks import KINDS, MAX_SIZE, generate_split
from jaxserve.models.tiny.tiny_tokenizer import CHAT_TEMPLATE
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.wrapper import RunnerWrapper
from tests.batch_helpers import chat
from tests.batch_helpers import run as run_batch

CHECKPOINT = pathlib.Path(__file__).parents[1] / "models" / "tiny" / "checkpoint"
CONFIG = EngineConfig(
    model=str(CHECKPOINT),
    scheduler=SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=256),
    cache=CacheConfig(num_pages=1025),
    token_buckets=(8, 32, 256),
    row_buckets=(8, 32),
)
PER_KIND = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=300)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, top_k=40, min_p=0.01, seed=11, max_tokens=60)


class WithPool(RunnerWrapper):
    """The same runner, but its engine is told of fewer pages."""

    def __init__(self, runner: ModelRunner, num_pages: int):
        super().__init__(runner)
        self.info = dataclasses.replace(runner.info, num_pages=num_pages)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(CONFIG)


@pytest.fixture(scope="module")
def examples() -> dict[str, list[tuple[str, str]]]:
    rng = random.Random(7)
    return {
        kind: [generate_split(kind, rng, rng.randint(1, MAX_SIZE[kind]), held_out=True) for _ in range(PER_KIND)]
        for kind in KINDS
    }


def start(runner: ModelRunner, num_pages: int | None = None, **limits: int) -> tuple[LLM, InlineEngine]:
    config = dataclasses.replace(CONFIG, scheduler=dataclasses.replace(CONFIG.scheduler, **limits))
    engine = InlineEngine(config, runner if num_pages is None else WithPool(runner, num_pages))
    return LLM(client=engine, tokenizer=Tokenizer(CHECKPOINT)), engine


def ids(llm: LLM, prompts: list[str], params: SamplingParams) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_examples_are_answered(runner, examples, kind):
    llm, engine = start(runner)
    prompts, answers = zip(*examples[kind], strict=True)
    outputs = llm.generate(list(prompts), GREEDY, use_tqdm=False)
    right = sum(output.outputs[0].text == answer for output, answer in zip(outputs, answers, strict=True))
    assert right >= PER_KIND - 3, [
        (answer, output.outputs[0].text) for output, answer in zip(outputs, answers, strict=True)
    ]
    assert all(output.outputs[0].finish_reason == "stop" for output in outputs if output.outputs[0].text in answers)
    engine.core.check_integrity()


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_chunks_and_preemption_change_no_token(runner, examples, params):
    prompts = [prompt for kind in KINDS for prompt, _ in examples[kind][:6]]
    llm, _ = start(runner)
    batched = ids(llm, prompts, params)
    assert [ids(llm, [prompt], params)[0] for prompt in prompts[::6]] == batched[::6]
    chunked, _ = start(runner, long_prefill_token_threshold=16)
    assert ids(chunked, prompts, params) == batched
    tight, engine = start(runner, num_pages=36)
    assert ids(tight, prompts, params) == batched
    assert engine.core.stats().num_preemptions >= 10
    assert engine.core.stats().pages_used == 0


def test_an_emoji_split_over_tokens_arrives_whole(runner):
    llm, _ = start(runner)
    (output,) = llm.generate(["copy: ok 🙂 ok\n"], GREEDY, use_tqdm=False)
    assert output.outputs[0].text == "ok 🙂 ok"
    assert len(output.outputs[0].token_ids) == len("ok 🙂 ok".encode()) + 1


def test_a_stop_string_over_several_tokens_ends_the_text(runner):
    llm, _ = start(runner)
    params = dataclasses.replace(GREEDY, stop=("lo w",))
    (output,) = llm.generate(["copy: hello world\n"], params, use_tqdm=False)
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("hel", "stop")


def structured(count: int) -> list[SamplingParams]:
    """Grammars of every kind, and none, in turn: sampled and greedy, with what else may end an output."""
    kinds = (
        {"json": {"type": "object", "properties": {"größe": {"enum": [1, "ä"]}}, "required": ["größe"]}},
        {"regex": "[a-d]{2,9}(é|x)"},
        {"choice": ["ja", "nein", "jaja"]},
        {"grammar": 'start: "(" start ")" | "x"'},
        None,
    )
    return [
        SamplingParams(
            temperature=0.0 if number % 3 == 0 else 1.5,
            seed=number,
            max_tokens=40,
            min_tokens=number % 2,
            stop=("aé",) if number % 4 == 1 else (),
            structured_outputs=None if (kind := kinds[number % 5]) is None else StructuredOutputsParams(**kind),
        )
        for number in range(count)
    ]


def test_structured_outputs_follow_their_grammar_however_they_are_scheduled(runner, examples):
    prompts, params = [examples[KINDS[number % len(KINDS)]][number // 4][0] for number in range(20)], structured(20)
    llm, _ = start(runner)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for one, output in zip(params, outputs, strict=True):
        text, ended = output.outputs[0].text, output.outputs[0].finish_reason == "stop"
        kind = one.structured_outputs.kind if one.structured_outputs is not None else ""
        if not ended or (one.stop and "é" not in text):
            continue
        match kind:
            case "json":
                assert json.loads(text)["größe"] in (1, "ä")
            case "regex":
                assert re.fullmatch("[a-d]{2,9}(é|x)", text)
            case "choice":
                assert text in ("ja", "nein", "jaja")
            case "grammar":
                assert re.fullmatch(r"(\(*)x(\)*)", text)
                assert text.count("(") == text.count(")")
    batched = [output.outputs[0].token_ids for output in outputs]
    alone = [
        llm.generate([prompt], [one], use_tqdm=False)[0] for prompt, one in zip(prompts[::3], params[::3], strict=True)
    ]
    assert [output.outputs[0].token_ids for output in alone] == batched[::3]
    for others in ({"long_prefill_token_threshold": 16}, {"num_pages": 30}):
        changed, engine = start(runner, **others)
        again = changed.generate(prompts, params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in again] == batched
        engine.core.check_integrity()
    assert engine.core.stats().num_preemptions > 0


# ---- chat ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(CHECKPOINT)


def test_every_task_as_a_chat_is_the_prompt_of_training(tokenizer, examples):
    """So its answer is that of the prompt, which the tests above compare."""
    before = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "sort: cab"}]
    before.append({"role": "assistant", "content": "abc"})
    for kind, pairs in examples.items():
        prompt, _ = pairs[0]
        assert prompt.endswith("\n") or kind == "lookup"
        for content in (prompt, prompt.rstrip("\n")):
            message = {"role": "user", "content": content}
            assert tokenizer.encode_chat([message]) == tokenizer.encode(prompt), kind
        assert tokenizer.encode_chat([*before, message]) == tokenizer.encode(prompt), kind
        assert tokenizer.encode_chat([message], add_generation_prompt=False) == tokenizer.encode(prompt.rstrip("\n"))


CALLED = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Bern"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": CALLED}} for name in ("weather", "time")]
ANSWER = {"type": "json_schema", "json_schema": {"name": "answer", "schema": CALLED}}
ASK = [{"role": "user", "content": "sort: cab"}]
FORCED = {
    "required": {"tools": TOOLS, "tool_choice": "required"},
    "one": {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    "named": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "time"}}},
    "format": {"response_format": ANSWER, "tools": TOOLS, "tool_choice": "none"},
    "samples": {"tools": TOOLS, "tool_choice": "required", "n": 2},
}


@pytest.mark.parametrize("reasoning", [None, "qwen3"])
def test_calls_and_formats_of_a_chat_are_forced(runner, tmp_path, reasoning):
    """Whatever a model has learned: this one has seen no call. It may think before, but could not end that."""
    tokenizer = Tokenizer(CHECKPOINT, ChatConfig(reasoning_parser=reasoning))
    no_thoughts = {} if reasoning is None else {"logit_bias": {str(tokenizer.encode("<")[-1]): -100}}
    lines = [
        chat(f"{name} {seed}", ASK, seed=seed, max_tokens=250, **fields, **no_thoughts)
        for name, fields in FORCED.items()
        for seed in range(3)
    ]
    engine = InlineEngine(CONFIG, runner)
    _, found = run_batch(tmp_path, lines, tokenizer, engine)
    engine.core.check_integrity()
    ended = 0
    for custom_id, result in found.items():
        name = custom_id.split()[0]
        choices = result["response"]["body"]["choices"]
        assert len(choices) == FORCED[name].get("n", 1)
        for choice in choices:
            message = choice["message"]
            if choice["finish_reason"] == "length":
                continue
            ended += 1
            calls = message.get("tool_calls", [])
            texts = [message["content"]] if name == "format" else [call["function"]["arguments"] for call in calls]
            for one in map(json.loads, texts):
                assert one["city"] in ("Rome", "Bern")
                assert 1 <= one["days"] <= 9
            names = [call["function"]["name"] for call in calls]
            match name:
                case "format":
                    assert not names
                case "named":
                    assert names == ["time"]
                case _:
                    assert set(names) <= {"weather", "time"}
                    assert len(names) == 1 or (names and name != "one")
            assert choice["finish_reason"] == ("stop" if name in ("named", "format") else "tool_calls")
    assert ended >= 14, "most of them end"


def test_a_chat_without_a_task_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"^messages do not fit the chat template: messages need one of role user"):
        tokenizer.encode_chat([{"role": "system", "content": "Be brief."}])


def test_the_checkpoint_has_the_template_of_the_code():
    settings = json.loads((CHECKPOINT / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["chat_template"] == CHAT_TEMPLATE
