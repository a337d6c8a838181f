"""Options of a request's text: the stop string as part of it, special tokens shown, no spaces between them, no text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.frontend.detokenizer import DecoderPlan, Detokenizer
from jaxserve.frontend.output import OutputState
from jaxserve.llm import LLM
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
from tests.frontend.fakes import RuleEngine
from tests.frontend.test_output import CHAT, PLANS, TOKENIZERS, chat
from tests.frontend.tokenizers_for_tests import load, words

ENDS = ("<|im_end|>", "ab<|im_end|>", "b<|im", "im_end|>", "<|im_start|><|im_end|>", "\ufffd", "c")


def run(name, ids, stop=(), prompt=(), *, skip=True, include=False, spaces=True, ends=None, stop_token_ids=()):
    """(text, token ids, stopped) of an output that comes token by token. ends: the engine's reason, else length."""
    shown = Detokenizer(PLANS[name], prompt, skip_special_tokens=skip, spaces_between_special_tokens=spaces)
    generated = Detokenizer(PLANS[name], prompt, skip_special_tokens=False) if stop and skip else None
    output = OutputState(shown, generated, stop, 0, stop_token_ids, include)
    text, taken = "", []
    for index, token_id in enumerate(ids):
        text += output.add((token_id,), (ends or FinishReason.LENGTH) if index == len(ids) - 1 else None)
        taken += output.take_token_ids()
        if output.stopped:
            break
    return text, taken, output.stopped


def generated_text(backend, prompt, ids):
    return backend.decode([*prompt, *ids], skip_special_tokens=False)[
        len(backend.decode(prompt, skip_special_tokens=False)) :
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_with_special_tokens_shown_the_text_is_what_is_generated(name, data):
    """Against the library's decode of all tokens, and a search of the whole text."""
    backend = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() + 1), min_size=1, max_size=12))
    whole = generated_text(backend, (), ids)
    assert run(name, ids, skip=False) == (whole, ids, False)
    parts = st.integers(0, max(len(whole) - 1, 0)).flatmap(
        lambda start: st.integers(1, 9).map(lambda length: whole[start : start + length] or "never")
    )
    stop = data.draw(st.lists(st.one_of(parts, st.sampled_from(ENDS)), min_size=1, max_size=3))
    found = [(whole.find(text), whole.find(text) + len(text)) for text in stop if text in whole]
    for include in (False, True):
        text, taken, stopped = run(name, ids, stop, skip=False, include=include)
        assert stopped == bool(found)
        assert text == (whole if not found else whole[: min(found)[1 if include else 0]])
        assert taken == ids[: len(taken)]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_a_stop_string_of_shown_text_is_added_where_it_is_included(name, data):
    """Same tokens, and the text that is shown without it, then the stop string."""
    backend = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() - 1), min_size=1, max_size=12))
    stop = data.draw(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3))
    without, taken, stopped = run(name, ids, stop)
    text, *rest = run(name, ids, stop, include=True)
    assert rest == [taken, stopped]
    if not stopped:
        assert text == without
        return
    # A piece of special tokens' names is not shown, and a decoder may take a space away from the shown text alone.
    contents = [token.content for token in backend.get_added_tokens_decoder().values()]
    if not any(set(string) & set("".join(contents)) for string in stop):
        assert text in [without + string for string in stop]
    assert text.startswith(without)


@pytest.mark.parametrize(
    ("stop", "skipped", "shown"),
    [
        ("b", "aab", "aab"),
        ("<|im_end|>", "aabc", "aabc<|im_end|>"),
        ("c<|im_end|>", "aabc", "aabc<|im_end|>"),
        ("c<|im", "aabc", "aabc<|im"),
        ("end|>a", "aabca", "aabc<|im_end|>a"),
        ("<|im_end|>a", "aabca", "aabc<|im_end|>a"),
        ("ab", "aab", "aab"),
    ],
)
def test_what_of_an_included_stop_string_is_shown(stop, skipped, shown):
    ids = chat("a", "ab", "c", "<|im_end|>", "ab", "c")
    assert run(CHAT, ids, [stop], include=True)[0] == skipped
    assert run(CHAT, ids, [stop], include=True, skip=False)[0] == shown


def test_an_incomplete_character_before_an_included_special_token():
    """What the special token makes certain of the text before it stands before the stop string."""
    start = chat("a", "<0xF0>", "<0x9F>", "<|im_end|>", "a")
    for stop, text in (
        ("<|im_end|>", "a\ufffd\ufffd"),
        ("\ufffd<|im_end|>", "a\ufffd\ufffd"),
        ("\ufffd", "a\ufffd"),
        ("\ufffd\ufffd", "a\ufffd\ufffd"),
        ("\ufffd<|im", "a\ufffd\ufffd"),
    ):
        assert run(CHAT, start, [stop], include=True) == (text, start[:4], True)


def test_the_text_of_a_stop_token_is_included_too():
    ids = chat("a", "b")
    ended = {"ends": FinishReason.STOP, "stop_token_ids": ids[1:]}
    assert run(CHAT, ids, prompt=chat("c"), **ended) == ("a", ids, False)
    assert run(CHAT, ids, prompt=chat("c"), include=True, **ended) == ("ab", ids, False)
    ids = chat("a", "<|im_end|>")
    ended = {"ends": FinishReason.STOP, "stop_token_ids": ids[1:]}
    for skip, include, text in ((True, True, "a"), (False, False, "a"), (False, True, "a<|im_end|>")):
        assert run(CHAT, ids, prompt=chat("c"), skip=skip, include=include, **ended)[0] == text


def test_added_tokens_that_follow_one_another_stand_together_where_asked():
    """Only what the decoder puts between them is left out; vLLM's fast detokenizer does the same."""
    PLANS["no decoder"] = plan = DecoderPlan(backend := words(None, ["x", "y"]))
    ids = [backend.token_to_id(piece) for piece in ("x", "[SEP]", "[CLS]", "[SEP]", "y", "[SEP]", "[PAD]")]
    whole = backend.decode(ids, skip_special_tokens=False)
    assert whole == "x [SEP] [CLS] [SEP] y [SEP] [PAD]"
    try:
        assert run("no decoder", ids, skip=False)[0] == whole
        assert run("no decoder", ids, skip=False, spaces=False)[0] == "x [SEP][CLS][SEP] y [SEP][PAD]"
        assert run("no decoder", ids, spaces=False)[0] == "x y"  # nothing to stand together
        assert run("no decoder", ids, ["[SEP][CLS]"], skip=False, spaces=False, include=True)[0] == "x [SEP][CLS]"
    finally:
        assert PLANS.pop("no decoder") is plan
    for name in ("byte level", CHAT):  # no decoder puts spaces there
        special = [TOKENIZERS[name].token_to_id(piece) for piece in ("<|im_end|>", "<|im_start|>", "<|im_end|>")]
        assert run(name, special, skip=False, spaces=False)[0] == "<|im_end|><|im_start|><|im_end|>"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(client=RuleEngine(), tokenizer=load(tmp_path_factory.mktemp("tokenizer")))


def test_the_options_reach_the_text_of_a_request(llm):
    """The engine repeats the prompt and ends with <eos>."""

    def text(prompt="abcd", **options):
        (output,) = llm.generate(prompt, SamplingParams(**options), use_tqdm=False)
        return output.outputs[0].text, output.outputs[0].finish_reason, len(output.outputs[0].token_ids)

    assert text() == ("abcd", "stop", 5)
    assert text(stop="c") == ("ab", "stop", 3)
    assert text(stop="c", include_stop_str_in_output=True) == ("abc", "stop", 3)
    assert text(skip_special_tokens=False) == ("abcd", "stop", 5)  # the token that ends it is not part of it
    assert text(skip_special_tokens=False, include_stop_str_in_output=True) == ("abcd<eos>", "stop", 5)
    assert text(include_stop_str_in_output=True) == ("abcd", "stop", 5)
    assert text(detokenize=False) == ("", "stop", 5)
    assert text(skip_special_tokens=False, stop="<eos>") == ("abcd", "stop", 5)
