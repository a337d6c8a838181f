"""A request's output: stop strings against what is generated, special tokens included, and the text that is shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from jaxserve.frontend.detokenizer import DecoderPlan, Detokenizer
from jaxserve.frontend.output import OutputState
from jaxserve.request import FinishReason
from tests.frontend.tokenizers_for_tests import EOS, byte_fallback, byte_level, metaspace, words

SPECIAL = ("<|im_start|>", "<|im_end|>")


def _chat_byte_level():
    tokenizer = byte_level()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


TOKENIZERS = {
    "byte level": _chat_byte_level(),
    "byte fallback": byte_fallback(special=SPECIAL),
    "byte fallback, no strip": byte_fallback(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), SPECIAL
    ),
    "metaspace": metaspace("always"),
    "metaspace first": metaspace("first"),
    "word piece": words(decoders.WordPiece(), ["a", "##a", "b", "##b", ".", "n't"]),
    "words' ends": words(decoders.BPEDecoder("</w>"), ["a", "b", "a</w>", "b</w>"]),
}
PLANS = {name: DecoderPlan(tokenizer) for name, tokenizer in TOKENIZERS.items()}
CHAT = "byte fallback"


def new_output(name, prompt=(), stop=(), min_tokens=0, stop_token_ids=(EOS,)):
    shown, generated = (Detokenizer(PLANS[name], prompt, skip_special_tokens=skip) for skip in (True, False))
    return OutputState(shown, generated, stop, min_tokens, stop_token_ids)


def run(name, ids, stop, prompt=(), ends=None, **options):
    """(texts, token ids, stopped) of an output that comes token by token. ends: the engine's reason, else length."""
    output = new_output(name, prompt, stop, **options)
    texts, taken = [], []
    for index, token_id in enumerate(ids):
        texts.append(output.add((token_id,), (ends or FinishReason.LENGTH) if index == len(ids) - 1 else None))
        taken += output.take_token_ids()
        if output.stopped:
            break
    return texts, taken, output.stopped


def tokens(name, *pieces):
    ids = [TOKENIZERS[name].token_to_id(piece) for piece in pieces]
    assert None not in ids
    return ids


def chat(*pieces):
    return tokens(CHAT, *pieces)


# ---- special tokens in stop strings ----------------------------------------------------------------------------------


def test_a_stop_string_that_is_a_special_token():
    ids = chat("▁ab", "b", "<|im_end|>", "▁ab")
    assert run(CHAT, ids, ["<|im_end|>"], chat("a")) == ([" ab", "b", ""], ids[:3], True)


@pytest.mark.parametrize(
    ("stop", "texts", "count"),
    [
        ("ab<|im_end|>\nc", ["", "", "", "", ""], 5),  # other text on both sides
        ("b<|im_end|>", ["a", "", ""], 3),  # begins in the token before
        ("<|im_end|>\n", ["a", "b", "", ""], 5),  # the newline is a byte token, certain with the token behind it
        ("im_end", ["a", "b", ""], 3),  # within one
        ("b<|im", ["a", "", ""], 3),  # begins before and ends inside
        ("end|>\nc", ["a", "b", "", "", ""], 5),  # begins inside and ends behind
        ("<|im_end|>\nc<|im_start|><|im_end|>", ["a", "b", *[""] * 5], 7),  # several
        ("<|im_start|><|im_end|>", ["a", "b", "", "", "\nc", "", ""], 7),
        ("c<|im_start|>", ["a", "b", "", "", "\n", ""], 6),
    ],
)
def test_stop_strings_that_hold_special_tokens(stop, texts, count):
    ids = chat("a", "b", "<|im_end|>", "<0x0A>", "c", "<|im_start|>", "<|im_end|>", "▁ab")
    got, taken, stopped = run(CHAT, ids, [stop], chat("a"))
    assert stopped
    assert taken == ids[:count]
    assert got == [*texts, *[""] * (count - len(texts))]


def test_text_is_held_back_through_special_tokens_only_while_a_stop_string_may_come():
    ids = chat("a", "b", "<|im_end|>", "<|im_start|>", "a", "b", "<|im_end|>", "c")
    texts, taken, stopped = run(CHAT, ids, ["b<|im_end|>c"], chat("a"))
    assert (texts, taken, stopped) == (["a", "", "", "b", "a", "", "", ""], ids, True)
    texts, _, stopped = run(CHAT, ids[:-1], ["b<|im_end|>c"], chat("a"))
    assert ("".join(texts), stopped) == ("abab", False)


def test_the_end_token_itself():
    ids = chat("a", "b", "</s>")
    for ends in (FinishReason.STOP, FinishReason.LENGTH):  # LENGTH: ignore_eos, with the budget used up
        assert run(CHAT, ids, ["</s>"], chat("a"), ends) == (["a", "b", ""], ids, True)
        assert run(CHAT, ids, ["b</s"], chat("a"), ends) == (["a", "", ""], ids, True)
        assert run(CHAT, ids, ["b</s>c"], chat("a"), ends) == (["a", "", "b"], ids, False)
    # With ignore_eos the engine goes on behind it.
    assert run(CHAT, [*ids, *ids], ["</s>"], chat("a"), stop_token_ids=()) == (["a", "b", ""], ids, True)


def test_a_stop_token_with_text_ends_a_stop_string_but_is_not_shown():
    ids = chat("a", "b")
    assert run(CHAT, ids, ["ab"], chat("c"), FinishReason.STOP, stop_token_ids=ids[1:]) == (["", ""], ids, True)
    assert run(CHAT, ids, ["abc"], chat("c"), FinishReason.STOP, stop_token_ids=ids[1:]) == (["", "a"], ids, False)


def test_min_tokens():
    ids = chat("a", "<|im_end|>", "b", "<|im_end|>", "c")
    for min_tokens, count, text in ((0, 2, "a"), (2, 2, "a"), (3, 4, "ab"), (4, 4, "ab")):
        texts, taken, stopped = run(CHAT, ids, ["<|im_end|>"], chat("a"), min_tokens=min_tokens)
        assert ("".join(texts), taken, stopped) == (text, ids[:count], True)
    assert run(CHAT, ids, ["<|im_end|>"], chat("a"), min_tokens=5)[2] is False


def test_of_a_special_token_and_a_word_the_first_wins():
    ids = chat("a", "b", "<|im_end|>", "c")
    assert run(CHAT, ids, ["c", "<|im_end|>"], chat("a"))[:2] == (["a", "b", ""], ids[:3])
    # "b<|im_end|>c" may still come and would start earlier.
    texts, taken, _ = run(CHAT, ids, ["<|im_end|>", "b<|im_end|>a"], chat("a"))
    assert ("".join(texts), taken) == ("ab", ids[:3])
    texts, taken, _ = run(CHAT, ids, ["<|im_end|>", "b<|im_end|>c"], chat("a"))
    assert ("".join(texts), taken) == ("a", ids)


# ---- prompt and output -----------------------------------------------------------------------------------------------


def test_the_prompt_is_not_searched_but_the_space_of_the_first_word_is():
    ids = chat("▁ab", "c")
    assert run(CHAT, ids, [" ab"], chat("<s>", "▁ab")) == ([""], ids[:1], True)
    assert run(CHAT, ids, ["ab ab", "b a"], chat("<s>", "▁ab")) == ([" ", "abc"], ids, False)
    assert run(CHAT, chat("b"), ["ab"], chat("a")) == (["b"], chat("b"), False)
    assert run(CHAT, chat("a"), ["<|im_end|>", "<|im_end|>a"], chat("<|im_end|>")) == (["a"], chat("a"), False)


def test_a_first_piece_that_holds_a_stop_string():
    assert run(CHAT, chat("▁ab"), ["a"], chat("<s>", "c")) == ([" "], chat("▁ab"), True)
    # The text of all tokens begins with this word: it has no space that could be shown, but was generated with one.
    assert run(CHAT, chat("▁ab"), ["b"], chat("<s>")) == (["a"], chat("▁ab"), True)
    assert run(CHAT, chat("▁ab"), [" a"], chat("<s>")) == ([""], chat("▁ab"), True)


def test_a_character_begun_in_the_prompt_may_be_a_stop_string():
    apple = chat(*(f"<0x{byte:02X}>" for byte in "🍏".encode()))
    assert run(CHAT, [*apple[2:], *chat("c")], ["🍏"], [*chat("a"), *apple[:2]]) == (
        ["", "", ""],
        [*apple[2:], *chat("c")],
        True,
    )


def test_an_output_without_tokens_has_no_text():
    apple = chat(*(f"<0x{byte:02X}>" for byte in "🍏".encode()))
    for stop in ((), ("a",)):
        assert new_output(CHAT, apple[:2], stop).finish() == ""


def test_without_a_tokenizer_there_is_no_text():
    output = OutputState(None, None, (), 0, (2,))
    assert output.add((5,), None) == ""
    assert output.add((2,), FinishReason.STOP) == ""
    assert (output.take_token_ids(), output.num_tokens, output.stopped) == ((5, 2), 2, False)


# ---- incomplete characters beside special tokens ---------------------------------------------------------------------


def test_what_a_special_token_cuts_off_is_shown_in_front_of_it():
    apple = chat(*(f"<0x{byte:02X}>" for byte in "é🍏".encode()))
    for count, text in ((2, "é"), (3, "\ufffd" * 3), (6, "é🍏")):
        ids = [*chat("a"), *apple[:count], *chat("<|im_end|>")]
        texts, taken, stopped = run(CHAT, ids, ["<|im_end|>"], chat("a"))
        assert ("".join(texts), taken, stopped) == ("a" + text, ids, True)
        assert "".join(texts) == TOKENIZERS[CHAT].decode(ids, skip_special_tokens=True)


def test_a_character_around_a_special_token_is_shown_whole():
    """As in the text of all tokens, which has no special tokens; a stop string sees the two parts of it."""
    for name, apple in (
        (CHAT, chat(*(f"<0x{byte:02X}>" for byte in "🍏".encode()))),
        ("byte level", TOKENIZERS["byte level"].encode("🍏", add_special_tokens=False).ids),
    ):
        end = TOKENIZERS[name].token_to_id("<|im_end|>")
        ids = [*apple[:2], end, *apple[2:], *tokens(name, "a", "b", "c")]
        assert "".join(run(name, ids, ["never"])[0]) == "🍏abc"
        assert "".join(run(name, ids, ["b"])[0]) == "🍏a"
        assert "".join(run(name, ids, ["<|im_end|>\ufffd"])[0]) == ("\ufffd\ufffd" if name == CHAT else "\ufffd")


# ---- any tokens ------------------------------------------------------------------------------------------------------


def _texts(backend, prompt, ids):
    """(generated, shown) text of an output, from the library's decode of all tokens."""
    return tuple(
        backend.decode([*prompt, *ids], skip_special_tokens=skip)[
            len(backend.decode(prompt, skip_special_tokens=skip)) :
        ]
        for skip in (False, True)
    )


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_the_text_is_cut_where_the_first_stop_string_starts(name, data):
    """Against a search of the whole text; a token is where the generated text of the tokens so far becomes longer."""
    backend = TOKENIZERS[name]
    # Neither bytes nor words that lose a space at their end where they are the first.
    pieces = {i: backend.id_to_token(i) for i in range(backend.get_vocab_size())}
    plain = [i for i, piece in pieces.items() if len(piece) < 5 and piece.isprintable() and not piece.endswith("b▁")]
    plain = [i for i in plain if "\ufffd" not in backend.decode([i]) + pieces[i] and not pieces[i].startswith("<0x")]
    special = [i for i, token in backend.get_added_tokens_decoder().items() if token.special]
    token_ids = st.one_of(st.sampled_from(plain[:12]), st.sampled_from(special))
    prompt = data.draw(st.lists(token_ids, max_size=4))
    ids = data.draw(st.lists(token_ids, min_size=1, max_size=10))
    generated, shown = _texts(backend, prompt, ids)
    parts = st.integers(0, len(generated) - 1).flatmap(
        lambda start: st.integers(1, 14).map(lambda length: generated[start : start + length])
    )
    stop = data.draw(st.lists(st.one_of(parts, st.just("never")), min_size=1, max_size=3)) if generated else ["never"]
    texts, taken, stopped = run(name, ids, stop, prompt, stop_token_ids=())
    start = min((generated.find(text) for text in stop if text in generated), default=-1)
    assert stopped == (start >= 0)
    if not stopped:
        assert ("".join(texts), taken) == (shown, ids)
        return
    until = next(count for count in range(1, len(ids) + 1) if len(_texts(backend, prompt, ids[:count])[0]) > start)
    before, through = (_texts(backend, prompt, ids[:count]) for count in (until - 1, until))
    of_token = len(through[1]) - len(before[1])
    expected = through[1][: len(through[1]) - min(of_token, len(through[0]) - start)]
    assert "".join(texts) == expected
    assert taken == ids[: len(taken)]
    assert any(text in _texts(backend, prompt, taken)[0] for text in stop)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_any_tokens_at_all(name, data):
    """Bytes of characters and ids without a token too: all of the text is shown, unless a stop string is found."""
    backend = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() + 1), min_size=1, max_size=16))
    whole = backend.decode(ids, skip_special_tokens=False)
    stop = data.draw(st.lists(st.text("abs<|>/ \ufffd", min_size=1, max_size=3), min_size=1, max_size=3))
    texts, taken, stopped = run(name, ids, stop, stop_token_ids=())
    assert stopped == any(text in whole for text in stop)
    if not stopped:
        assert ("".join(texts), taken) == (backend.decode(ids, skip_special_tokens=True), ids)
