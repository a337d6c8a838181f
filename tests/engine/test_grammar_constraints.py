"""Requests whose output follows a grammar: what their masks allow, where they end, and that nothing else matters."""

from __future__ import annotations

import json
import pathlib
import re
import threading
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.config.scheduling import MODES, PreemptionConfig
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.config.structured_outputs_config import StructuredOutputsConfig
from jaxserve.engine.constraints.compiled_grammars import CompiledGrammars
from jaxserve.engine.constraints.grammar_constraints import GrammarConstraints, Row
from jaxserve.engine.constraints.vocabulary import Vocabulary, load_vocabulary
from jaxserve.engine.core import FAULT_SECONDS, EngineCore
from jaxserve.engine.messages import AbortRequest, AddRequest, outputs
from jaxserve.frontend.grammar_text import grammar_of
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.models.config import ModelConfig
from jaxserve.models.tiny.tiny_tokenizer import EOS_ID, VOCAB_SIZE
from jaxserve.request import EngineRequest, FinishReason
from jaxserve.runner.fake import FakeRunner
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.engine.test_faults import LATE, LOST, NOT_STARTED, Clock, FaultyRunner

CHECKPOINT = pathlib.Path(__file__).parents[2] / "models" / "tiny" / "checkpoint"
MODEL = ModelConfig("LlamaForCausalLM", VOCAB_SIZE, 8, 8, 1, 1, 1, 8, 512)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_vocabulary(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(CHECKPOINT)


def text_of(**structured: Any) -> str:
    return grammar_of(StructuredOutputsParams(**structured), {"<bos>": 1}, 100)


def constraints(vocabulary: Vocabulary, **config: Any) -> GrammarConstraints:
    found = GrammarConstraints(
        CompiledGrammars(lambda: vocabulary, StructuredOutputsConfig(**config)), (EOS_ID,), mask_threads=2
    )
    return found


def request(name: str, grammar: str, **fields: Any) -> EngineRequest:
    given = {"max_tokens": 200, "temperature": 1.0, "stop_token_ids": (EOS_ID,), "prompt_token_ids": (1, 40), **fields}
    return EngineRequest(name, grammar=grammar, **given)


def bits(mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB_SIZE])


def written(found: GrammarConstraints, one: EngineRequest, rng: np.random.Generator) -> tuple[list[int], str]:
    """Draws tokens from the masks of a request until it ends; returns them, and how."""
    tokens: list[int] = []
    found.compiled(one).result()
    while len(tokens) < one.max_tokens:
        masks = np.full((1, -(-VOCAB_SIZE // 32)), 0xFFFFFFFF, np.uint32)
        complete, failed = found.fill([Row(0, one, tokens)], masks)
        assert not failed, failed
        if complete:
            return tokens, "complete"
        token = int(rng.choice(bits(masks[0])))
        if token in one.stop_token_ids:
            return tokens, "stop"
        tokens.append(token)
    return tokens, "length"


LEAVES = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 300},
        {"type": "string", "maxLength": 5},
        {"type": "string", "pattern": "^[äb]{2,3}$"},
        {"enum": [1, None, "é", 'q"uote', True]},
        {"const": "日本"},
        {"type": "boolean"},
        {"anyOf": [{"type": "null"}, {"type": "string", "minLength": 1, "maxLength": 2}]},
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner),
        st.builds(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:1],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "größe", 'x"y', "名"]), inner, min_size=1, max_size=3),
        ),
    ),
    max_leaves=5,
)
PIECES = st.sampled_from(["[a-c]", "é", "[^\\n]", "(?:x|日y)", "\\d", "/", '"', "\\."])
REGEXES = st.lists(
    st.tuples(PIECES, st.sampled_from(["", "?", "{1,3}", "{2}"])).map("".join), min_size=1, max_size=5
).map("".join)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCHEMAS, st.integers(0, 2**32))
def test_what_masks_allow_follows_the_schema(vocabulary, tokenizer, schema, seed):
    one = request("a", text_of(json=schema), max_tokens=600)
    tokens, end = written(constraints(vocabulary), one, np.random.default_rng(seed))
    if end != "length":
        jsonschema.validate(json.loads(tokenizer.decode(tokens)), schema, cls=jsonschema.Draft202012Validator)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(REGEXES, st.integers(0, 2**32))
def test_what_masks_allow_matches_the_regular_expression(vocabulary, tokenizer, regex, seed):
    one = request("a", text_of(regex=regex))
    tokens, end = written(constraints(vocabulary), one, np.random.default_rng(seed))
    assert end in ("complete", "stop")
    assert re.fullmatch(regex, tokenizer.decode(tokens))


def mask_after(found: GrammarConstraints, one: EngineRequest, text: str) -> np.ndarray:
    found.compiled(one).result()
    masks = np.full((1, -(-VOCAB_SIZE // 32)), 0xFFFFFFFF, np.uint32)
    complete, failed = found.fill([Row(0, one, [TOKENS[character] for character in text])], masks)
    assert (complete, failed) == ([], [])
    return bits(masks[0])


TOKENS = {chr(byte): 3 + byte for byte in range(128)}


def test_bytes_have_the_ids_that_the_tests_take(tokenizer):
    assert tokenizer.decode([TOKENS[character] for character in "a{\n"]) == "a{\n"


def test_the_end_is_allowed_exactly_where_the_grammar_may_end(vocabulary):
    found = constraints(vocabulary)
    for text, may_end in (("", False), ("a", True), ("ab", False), ("aba", True)):
        allowed = mask_after(found, request(text, text_of(regex="a(ba)*")), text)
        assert (EOS_ID in allowed) is may_end, text
        assert set(allowed) - {EOS_ID} == {TOKENS["a" if text in ("", "ab") else "b"]}
    # Whatever the model's own end is no end for: the output goes on as long as the grammar does.
    assert EOS_ID not in mask_after(found, request("b", text_of(regex="a+"), stop_token_ids=()), "a")
    # Special tokens that a client names end it where the grammar may; other ids are text.
    allowed = mask_after(found, request("c", text_of(regex="a+"), stop_token_ids=(0, TOKENS["x"])), "a")
    assert set(allowed) == {0, TOKENS["a"]}


def test_rows_are_filled_alike_alone_and_together(vocabulary):
    """With matchers that are at different places, and one that is rebuilt in the middle of its output."""
    grammars = [text_of(regex="[ab]{1,9}c"), text_of(json={"type": "array", "items": {"enum": [1, "b"]}})]
    texts = ["", "a", "abab", "[1,", '["b"', "[1 ,1"]
    together, words = constraints(vocabulary), -(-VOCAB_SIZE // 32)
    rows = []
    for place, text in enumerate(texts):
        one = request(str(place), grammars[text.startswith("[")])
        together.compiled(one).result()
        rows.append(Row(place, one, [TOKENS[character] for character in text]))
    masks = np.zeros((len(rows), words), np.uint32)
    assert together.fill(rows, masks) == ([], [])
    again = np.zeros_like(masks)
    assert together.fill([row._replace(output_token_ids=row.output_token_ids[:2]) for row in rows], again) == ([], [])
    assert together.fill(rows, again) == ([], [])
    assert (again == masks).all()
    for row in rows:
        alone = np.zeros((1, words), np.uint32)
        assert constraints(vocabulary).fill([row._replace(place=0)], alone) == ([], [])
        assert (alone[0] == masks[row.place]).all()


def test_an_output_that_leaves_its_grammar_fails_alone(vocabulary):
    found, words = constraints(vocabulary), -(-VOCAB_SIZE // 32)
    good, bad = (request(name, text_of(regex="ab+")) for name in ("good", "bad"))
    masks = np.zeros((2, words), np.uint32)
    complete, failed = found.fill([Row(0, good, [TOKENS["a"]]), Row(1, bad, [TOKENS["x"]])], masks)
    assert complete == []
    ((row, line),) = failed
    assert row.request is bad
    assert line.startswith("structured_outputs cannot go on, simplify the grammar: ")
    assert set(bits(masks[0])) == {TOKENS["b"]}


def test_compiled_grammars_are_bounded_and_the_last_used_stay(vocabulary):
    grammars = CompiledGrammars(lambda: vocabulary, StructuredOutputsConfig(max_compiled_grammars=3))
    first = grammars.get(text_of(regex="a0"))
    for number in range(1, 40):
        grammars.get(text_of(regex=f"a{number}")).result()
        assert grammars.get(text_of(regex="a0")) is first
        assert len(grammars) <= 3
    error = grammars.get("%llguidance {}\nstart: nowhere").exception()
    assert isinstance(error, ValueError)
    assert str(error).startswith("structured_outputs cannot be compiled: ")


# ---- in the engine ---------------------------------------------------------------------------------------------------


def make_core(vocabulary: Vocabulary, runner: FakeRunner | None = None, **limits: Any) -> EngineCore:
    runner = runner or FakeRunner(vocab_size=VOCAB_SIZE, eos_token_ids=(EOS_ID,), max_model_len=512, num_pages=300)
    config = EngineConfig(
        architecture=MODEL,
        load_format="dummy",
        scheduler=SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 32, **limits}),
        cache=CacheConfig(num_pages=runner.info.num_pages, swap_space=1.0 if runner.info.num_host_pages else 0.0),
    )
    grammars = CompiledGrammars(lambda: vocabulary, StructuredOutputsConfig())
    return EngineCore(config, runner, now=Clock(0.01), clock=Clock(FAULT_SECONDS), grammars=grammars)


def served(core: EngineCore, wanted: list[EngineRequest]) -> dict[str, tuple[list[int], FinishReason | None, str]]:
    tokens: dict[str, list[int]] = {one.request_id: [] for one in wanted}
    ends: dict[str, tuple[list[int], FinishReason | None, str]] = {}
    messages = [message for one in wanted for message in core.handle(AddRequest(one))]
    while core.busy or messages:
        for output in (output for message in messages for output in outputs(message)):
            assert output.request_id not in ends, "an answer has two ends"
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                ends[output.request_id] = tokens[output.request_id], output.finish_reason, output.error
        if core.pause:
            time.sleep(core.pause)
        messages = core.step() if core.busy else []
        core.check_integrity()
    return ends


def mixed(count: int) -> list[EngineRequest]:
    grammars = [
        text_of(json={"type": "object", "properties": {"a": {"enum": [1, "ä"]}}, "required": ["a"]}),
        text_of(regex="[a-d]{2,6}"),
        "",
        text_of(choice=["ja", "nein", "jaja"]),
    ]
    return [
        request(
            f"r{number}",
            grammars[number % 4],
            prompt_token_ids=tuple(range(3, 6 + 5 * number)),
            seed=number,
            max_tokens=12 + number,
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def alone(vocabulary) -> dict[str, tuple[list[int], FinishReason | None, str]]:
    found = {}
    for one in mixed(12):
        found |= served(make_core(vocabulary), [one])
    return found


def test_requests_end_where_their_grammar_does(alone, tokenizer):
    ends = {name: (tokenizer.decode(tokens), reason) for name, (tokens, reason, _) in alone.items()}
    for number in (1, 5, 9):
        text, reason = ends[f"r{number}"]
        assert reason is FinishReason.STOP
        assert re.fullmatch("[a-d]{2,6}", text)
    for number in (3, 7, 11):
        assert ends[f"r{number}"][0] in ("ja", "nein", "jaja")
    assert all(reason in (FinishReason.STOP, FinishReason.LENGTH) for _, reason in ends.values())


@pytest.mark.parametrize(("mode", "host_pages"), [*((mode, 0) for mode in MODES), ("continuous", 60)])
def test_tokens_are_those_of_a_request_alone(vocabulary, alone, mode, host_pages):
    """In a batch, with chunked prompts, and pages so few that sequences are preempted, computed again or swapped."""
    preemption = PreemptionConfig(preemption_mode="swap") if host_pages else PreemptionConfig()
    runner = FakeRunner(
        vocab_size=VOCAB_SIZE, eos_token_ids=(EOS_ID,), max_model_len=512, num_pages=24, num_host_pages=host_pages
    )
    core = make_core(vocabulary, runner, mode=mode, preemption=preemption, max_num_batched_tokens=16)
    assert served(core, mixed(12)) == alone
    assert core._constraints._grammars.num_open == 0
    assert core.stats().step_histograms["mask_seconds"].num_values > 0
    assert core.stats().num_preemptions or mode in ("none", "static", "dynamic")


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([None, None, None, NOT_STARTED, LOST, LATE]), max_size=20))
def test_a_step_that_fails_changes_no_token(vocabulary, alone, faults):
    calls = [call for fault in faults for call in (fault, None)]
    runner = FaultyRunner(calls, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS_ID,), max_model_len=512, num_pages=200)
    for name, answer in served(make_core(vocabulary, runner), mixed(8)).items():
        if answer[1] is not FinishReason.ERROR:  # it failed alone and once more
            assert answer == alone[name]


def test_a_complete_grammar_ends_a_request_whatever_it_asks_besides(vocabulary, tokenizer):
    one = text_of(choice=["abc"])
    wanted = [
        request("min_tokens", one, min_tokens=50),
        request("no end of its own", one, stop_token_ids=()),
        request("greedy", one, temperature=0.0),
    ]
    for name, (tokens, reason, error) in served(make_core(vocabulary), wanted).items():
        assert (tokenizer.decode(tokens), reason, error) == ("abc", FinishReason.STOP, ""), name
    empty = served(make_core(vocabulary), [request("empty", text_of(regex="a{0}"))])
    assert empty == {"empty": ([], FinishReason.STOP, "")}


def test_an_engine_without_a_tokenizer_refuses_a_grammar():
    runner = FakeRunner()
    config = EngineConfig(architecture=MODEL, load_format="dummy", cache=CacheConfig(num_pages=64))
    (answer,) = EngineCore(config, runner).handle(AddRequest(request("a", "x", prompt_token_ids=(1,))))
    (output,) = outputs(answer)
    assert (output.finish_reason, output.error) == (
        FinishReason.ERROR,
        "structured_outputs need a tokenizer, and this engine has none; leave them out",
    )


def test_a_grammar_that_is_being_compiled_holds_nobody_up(vocabulary):
    """The other requests come and go meanwhile; one that waits for it can be aborted."""
    compile_now = threading.Event()

    def load() -> Vocabulary:
        assert compile_now.wait(60)
        return vocabulary

    core = make_core(vocabulary)
    grammars = CompiledGrammars(load, StructuredOutputsConfig())
    core._constraints._grammars = GrammarConstraints(grammars, (EOS_ID,), 1)
    for name in ("waits", "gone"):
        assert core.handle(AddRequest(request(name, text_of(choice=["ab"])))) == []
    core.handle(AddRequest(request("plain", "", max_tokens=4, stop_token_ids=())))
    tokens: list[int] = []
    while core.scheduler.unfinished:
        tokens += [token for message in core.step() for output in outputs(message) for token in output.token_ids]
    assert len(tokens) == 4
    assert core.busy
    core.step()
    assert core.pause is not None
    assert core.stats().num_waiting == 2
    answers = [output for message in core.handle(AbortRequest("gone")) for output in outputs(message)]
    assert [(answer.request_id, answer.finish_reason) for answer in answers] == [("gone", FinishReason.ABORT)]
    compile_now.set()
    answers = []
    while core.busy:
        time.sleep(core.pause or 0)
        answers += [output for message in core.step() for output in outputs(message)]
    assert {answer.request_id for answer in answers} == {"waits"}
    assert answers[-1].finish_reason is FinishReason.STOP
