"""What the front end checks of a grammar: its budget, what it refuses, and what it remembers."""

from __future__ import annotations

import json
import pathlib
import time

import pytest

from jaxserve.config.structured_outputs_config import StructuredOutputsConfig
from jaxserve.frontend.grammar_checker import GrammarChecker
from jaxserve.structured_outputs import ReplyStructuredOutputs, StructuredOutputsParams

CHECKPOINT = pathlib.Path(__file__).parents[2] / "models" / "tiny" / "checkpoint"
CONFIG = StructuredOutputsConfig(max_checked_grammars=8, max_grammar_memory=256, grammar_processes=1)


@pytest.fixture(scope="module")
def checker():
    checker = GrammarChecker(CHECKPOINT, CONFIG)
    yield checker
    checker.close()


def chain(length: int) -> str:
    """A schema whose references lead from one to the next."""
    steps = {f"a{number}": {"type": "array", "items": {"$ref": f"#/$defs/a{number + 1}"}} for number in range(length)}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": steps | {f"a{length}": {"type": "null"}}})


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"json": nested(60_000)},
            r"^structured_outputs\.json has 600002 bytes; at most 131072",
        ),
        (
            {"json": nested(9_000)},
            r"^structured_outputs\.json is nested more than 100 deep",
        ),
        (
            {"json": chain(1_500)},
            r"^structured_outputs\.json is refused: it ends the process that compiles",
        ),
        ({"json": "{'a'}"}, r"^structured_outputs\.json is no JSON: "),
        ({"json": "[]"}, r"^structured_outputs\.json must be a schema: an object$"),
        ({"json": {"type": "nothing"}}, r"^structured_outputs\.json is refused: Invalid type"),
        (
            {"json": {"allOf": [{"type": "null"}, {"type": "string"}]}},
            r"^structured_outputs\.json is refused: Unsat",
        ),
        ({"json": {"uniqueItems": True, "type": "array"}}, r"^structured_outputs\.json is refused: Unimplemented keys"),
        ({"regex": "(" * 60_000 + ")" * 60_000}, r"^structured_outputs\.regex is refused: "),
        ({"regex": "a(?=b)"}, r"^structured_outputs\.regex is refused: "),
        ({"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000}, r"^structured_outputs\.grammar is refused: "),
        ({"grammar": "start: other"}, r"^structured_outputs\.grammar is refused: "),
        ({"grammar": "nothing"}, r"^structured_outputs\.grammar is refused: "),
        ({"grammar": "start: <|nope|>"}, r"^structured_outputs\.grammar is refused: .*unknown special token"),
        ({"choice": ["a" * 200_000]}, r"^structured_outputs\.choice has 200000 bytes; at most 131072"),
        ({"structural_tag": {}}, r"^structured_outputs\.structural_tag has neither format nor structures"),
    ],
)
def test_fault_11_a_grammar_that_is_refused(checker, given, message):
    begin = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        checker.check(StructuredOutputsParams(**given))
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 60
    assert checker.check(StructuredOutputsParams(regex="a+")), "the next one is checked as if nothing had been"


def test_what_a_chat_makes_of_a_constraint(checker):
    """Errors name the field that it follows from, and a grammar behind a lead is another one."""
    kept = {"json": {"type": "integer"}}
    assert checker.check(StructuredOutputsParams(**kept))
    led = ReplyStructuredOutputs(**kept, lead='lead: "a" | "b"')
    assert checker.known(led) is None
    assert checker.check(led) != checker.check(StructuredOutputsParams(**kept))
    for schema, words in (
        ({"uniqueItems": True, "type": "array"}, r"^tools is refused: Unimplemented keys"),
        (nested(200), r"^tools is nested more than 100 deep"),
        ({"title": "x" * 200_000}, r"^tools has 2000\d\d bytes; at most 131072"),
    ):
        with pytest.raises(ValueError, match=words):
            checker.check(ReplyStructuredOutputs(json=schema, source="tools"))


def test_a_grammar_over_its_time_ends_the_process_and_not_the_next_grammar():
    checker = GrammarChecker(CHECKPOINT, StructuredOutputsConfig(max_grammar_seconds=0.01))
    slow = {"anyOf": [{"type": "string", "pattern": f"^(a|b)*a(a|b){{{number}}}$"} for number in range(900)]}
    with pytest.raises(ValueError, match=r"^structured_outputs\.json (is refused: it takes more than|needs)"):
        checker.check(StructuredOutputsParams(json=slow))
    assert checker.check(StructuredOutputsParams(choice=["a"]))
    checker.close()


def test_fault_12_many_grammars_after_one_another_are_not_kept(checker):
    kept = StructuredOutputsParams(regex="kept")
    for number in range(40):
        assert checker.check(kept)
        given = StructuredOutputsParams(json={"type": "object", "title": str(number)})
        assert checker.known(given) is None
        assert checker.check(given) == checker.known(given)
    assert len(checker._passed) == 8
    assert checker.known(kept) is not None
    assert checker.known(StructuredOutputsParams(json={"type": "object", "title": "1"})) is None


def test_one_process_checks_grammar_after_grammar(checker):
    checker.check(StructuredOutputsParams(regex="b+"))
    (worker,) = checker._idle
    checker.check(StructuredOutputsParams(regex="c+"))
    assert checker._idle == [worker]


def test_a_process_that_is_killed_between_two_grammars_is_replaced(checker):
    checker.check(StructuredOutputsParams(regex="d+"))
    checker._idle[0]._process.kill()
    checker._idle[0]._process.wait()
    assert checker.check(StructuredOutputsParams(regex="e+"))


def test_a_tokenizer_that_cannot_be_used_says_so(tmp_path):
    checker = GrammarChecker(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"^structured_outputs need the file"):
        checker.check(StructuredOutputsParams(regex="a"))
