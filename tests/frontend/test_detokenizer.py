"""Incremental detokenization against the tokenizer's own decode of prompt and output together."""

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders

from jaxserve.frontend.detokenizer import DecoderPlan, Detokenizer
from tests.frontend.tokenizers_for_tests import byte_fallback, byte_level, metaspace, words


def _without_decoder():
    return Tokenizer.from_str(json.dumps(json.loads(byte_level().to_str()) | {"decoder": None}))


def _with_decoder(tokenizer, decoder):
    tokenizer.decoder = decoder
    return tokenizer


_ENGLISH = ["do", "n't", "not", "##n't", "'", "'s", ".", "?", "!", ",", "##ing", "a", "do not", "x ' y", " .", "é"]
_ENDS = ["a", "b", "a</w>", "b</w>", "</w>"]

TOKENIZERS = {
    "byte level": byte_level(),
    "byte fallback": byte_fallback(),
    "byte fallback, no strip": byte_fallback(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ),
    "strip per token": byte_fallback(decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])),
    "strip two": byte_fallback(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip("b", 2, 0)])
    ),
    "metaspace always": metaspace("always"),
    "metaspace never": metaspace("never"),
    "metaspace first": metaspace("first"),
    "metaspace, byte fallback": byte_fallback(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "metaspace, byte level": _with_decoder(
        byte_level(), decoders.Sequence([decoders.Metaspace(), decoders.ByteLevel()])
    ),
    "no decoder": _without_decoder(),
    "word piece": words(decoders.WordPiece(), _ENGLISH),
    "word piece, no cleanup": words(decoders.WordPiece("##", False), _ENGLISH),
    "word piece, joined": words(decoders.Sequence([decoders.Fuse(), decoders.WordPiece()]), _ENGLISH),
    "CTC": words(decoders.CTC("[PAD]", "|"), [*"ab|.'", "[PAD]a", " ."]),
    "CTC, pad not special": words(decoders.CTC("p", "|"), [*"abp|.", "pp"]),
    "CTC, joined": words(decoders.Sequence([decoders.Fuse(), decoders.CTC("p", "|")]), [*"abp|.", "pp", " "]),
    "words' ends": words(decoders.BPEDecoder("</w>"), _ENDS),
    "words' ends, joined": words(decoders.Sequence([decoders.Fuse(), decoders.BPEDecoder("</w>")]), _ENDS),
    "words' ends, byte level": _with_decoder(
        byte_level(("a</w>",)), decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    ),
    "regular expression": words(decoders.Replace(Regex("[ab]+"), "-"), [*"abc", "ab", "cab"]),
    "regular expression, joined": words(
        decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("[ab]+"), "-")]), [*"abc", "ab", "cab"]
    ),
    "byte level, joined": byte_fallback(decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()])),
    "words' ends, then more": words(
        decoders.Sequence([decoders.BPEDecoder("</w>"), decoders.Metaspace("b")]), _ENDS
    ),
    "joined, joined": words(decoders.Sequence([decoders.Fuse(), decoders.Sequence([decoders.Fuse()])]), _ENDS),
    "metaspace, joined": words(decoders.Sequence([decoders.Fuse(), decoders.Metaspace("b", "never")]), _ENDS),
    "aab, joined": words(decoders.Sequence([decoders.Fuse(), decoders.Replace("aab", "-")]), [*"abc", "aa", "aab"]),
}  # fmt: skip
PLANS = {name: DecoderPlan(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def chunked(data, ids):
    """The ids in chunks of drawn sizes."""
    position = 0
    while position < len(ids):
        size = data.draw(st.integers(1, 4))
        yield ids[position : position + size]
        position += size


def draw_ids(data, backend, max_size=24):
    # Two ids past the vocabulary: a model's embedding may be padded beyond its tokenizer.
    return data.draw(st.lists(st.integers(0, backend.get_vocab_size() + 1), max_size=max_size))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_the_deltas_are_the_decoded_whole(name, skip, data):
    backend = TOKENIZERS[name]
    ids = draw_ids(data, backend)
    detokenizer = Detokenizer(PLANS[name], skip_special_tokens=skip)
    text = "".join(detokenizer.add(chunk) for chunk in chunked(data, ids)) + detokenizer.finish()
    assert text == backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_the_output_continues_the_prompt(name, data):
    backend = TOKENIZERS[name]
    prompt, ids = draw_ids(data, backend), draw_ids(data, backend, max_size=8)
    before, whole = (backend.decode(part, skip_special_tokens=True) for part in (prompt, prompt + ids))
    # A prompt that ends within a character has tests of its own below; bytes of the output may make a whole run of
    # bytes in the prompt invalid, and joined tokens be replaced across the boundary.
    assume(not before.endswith("\ufffd") and whole.startswith(before))
    detokenizer = Detokenizer(PLANS[name], prompt)
    text = "".join(detokenizer.add(chunk) for chunk in chunked(data, ids)) + detokenizer.finish()
    assert before + text == whole


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
@given(text=st.text(max_size=12), data=st.data())
def test_any_text_round_trips_with_nothing_invalid_on_the_way(name, text, data):
    backend = TOKENIZERS[name]
    ids = backend.encode(text, add_special_tokens=False).ids
    if data.draw(st.booleans()) and ids:
        del ids[data.draw(st.integers(0, len(ids) - 1))]  # damage
    detokenizer = Detokenizer(PLANS[name])
    deltas = [detokenizer.add(chunk) for chunk in chunked(data, ids)]
    assert "".join(deltas) + detokenizer.finish() == backend.decode(ids, skip_special_tokens=True)


def _byte_ids(name, data):
    return [TOKENIZERS[name].token_to_id(f"<0x{byte:02X}>") for byte in data]


def _emoji_ids():
    return TOKENIZERS["byte level"].encode("🍏", add_special_tokens=False).ids


def test_an_emoji_split_over_four_tokens_appears_when_it_is_whole():
    detokenizer = Detokenizer(PLANS["byte level"])
    ids = _emoji_ids()
    assert len(ids) == 4
    assert [detokenizer.add([token_id]) for token_id in ids] == ["", "", "", "🍏"]
    assert detokenizer.finish() == ""


def test_bytes_that_cannot_become_a_character_are_flushed_at_once():
    detokenizer = Detokenizer(PLANS["byte level"])
    first, *_, last = _emoji_ids()
    (letter,) = TOKENIZERS["byte level"].encode("a", add_special_tokens=False).ids
    assert detokenizer.add([first]) == ""
    assert detokenizer.add([letter]) == "\ufffda"
    assert detokenizer.add([last]) == "\ufffd"


def test_an_incomplete_character_is_flushed_at_the_end():
    detokenizer = Detokenizer(PLANS["byte level"])
    assert detokenizer.add(_emoji_ids()[:3]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_a_run_of_byte_tokens_is_held_until_it_ends():
    detokenizer = Detokenizer(PLANS["byte fallback"])
    ids = _byte_ids("byte fallback", "🍏".encode())
    assert [detokenizer.add([token_id]) for token_id in ids] == ["", "", "", ""]
    assert detokenizer.add([TOKENIZERS["byte fallback"].token_to_id("a")]) == "🍏a"


def test_an_invalid_run_of_byte_tokens_is_flushed_at_once():
    detokenizer = Detokenizer(PLANS["byte fallback"])
    ids = _byte_ids("byte fallback", b"\xf0\x9f\xff\x41")
    assert [detokenizer.add([token_id]) for token_id in ids] == ["", "", "\ufffd" * 3, "\ufffd"]
    assert detokenizer.finish() == ""


def test_special_tokens_and_ids_without_a_token_give_no_text():
    detokenizer = Detokenizer(PLANS["byte level"])
    assert detokenizer.add([0, 1, 2, 99_999]) == ""
    assert detokenizer.finish() == ""


# ---- prompts -------------------------------------------------------------------------------------------------------


def _character_ids(name, character):
    if name == "byte level":
        return TOKENIZERS[name].encode(character, add_special_tokens=False).ids
    token_id = TOKENIZERS[name].token_to_id(character.replace(" ", "▁"))
    return _byte_ids(name, character.encode()) if token_id is None else [token_id]


@pytest.mark.parametrize("name", ["byte level", "byte fallback", "byte fallback, no strip", "metaspace, byte fallback"])
@given(text=st.text(alphabet="ab ü🍏中\0\ufffd ", max_size=12), data=st.data())
def test_a_character_that_the_prompt_begins_belongs_to_the_output(name, text, data):
    backend = TOKENIZERS[name]
    characters = [_character_ids(name, character) for character in text]
    ids = [token_id for character in characters for token_id in character]
    length = data.draw(st.integers(0, len(ids)))
    complete = []
    while characters and len(complete) + len(characters[0]) <= length:
        complete += characters.pop(0)
    before, whole = (backend.decode(part, skip_special_tokens=True) for part in (complete, ids))
    detokenizer = Detokenizer(PLANS[name], ids[:length])
    output = "".join(detokenizer.add(chunk) for chunk in chunked(data, ids[length:])) + detokenizer.finish()
    assert before + output == whole


def output_text(name, prompt, output):
    detokenizer = Detokenizer(PLANS[name], prompt)
    return [detokenizer.add_token(token_id) for token_id in output] + [detokenizer.finish()]


def test_bytes_of_the_prompt_that_the_output_does_not_complete_are_invalid_once():
    first, second, *_ = _emoji_ids()
    letter = TOKENIZERS["byte level"].token_to_id("a")
    assert output_text("byte level", [letter, first, second], [letter]) == ["\ufffda", ""]
    assert output_text("byte level", [letter, first, second], []) == ["\ufffd"]
    letter = TOKENIZERS["byte fallback"].token_to_id("a")
    prompt = [letter, *_byte_ids("byte fallback", "é🍏".encode()[:4])]  # two bytes of the emoji
    assert output_text("byte fallback", prompt, [letter]) == ["\ufffd\ufffda", ""]
    # The é was shown with the prompt; a byte that makes the run invalid does not take it back.
    assert output_text("byte fallback", prompt, _byte_ids("byte fallback", b"\xff")) == ["\ufffd" * 3, ""]


def test_the_first_word_of_an_output_keeps_its_space():
    word = TOKENIZERS["byte fallback"].token_to_id("▁ab")
    assert output_text("byte fallback", [1, word], [word]) == [" ab", ""]
    assert output_text("byte fallback", [1], [word]) == ["ab", ""]  # the text of all tokens begins with it
    assert output_text("byte fallback", [1, word, 2, 1], [word]) == [" ab", ""]  # special tokens end no text


def test_a_run_of_bytes_longer_than_what_is_looked_at_of_a_prompt():
    apples = _byte_ids("byte fallback", "🍏".encode()) * 1000
    for cut in range(4):
        prompt, output = apples[: len(apples) - cut], apples[len(apples) - cut :]
        assert "".join(output_text("byte fallback", prompt, output)) == ("🍏" if cut else "")


def test_only_the_end_of_a_long_prompt_is_looked_at():
    asked = []

    class Counting(DecoderPlan):
        def shown_piece(self, token_id):
            asked.append(token_id)
            return super().shown_piece(token_id)

    letter = TOKENIZERS["byte fallback"].token_to_id("a")
    for prompt in ([letter] * 100_000, [1] * 100_000, _byte_ids("byte fallback", b"a") * 100_000):
        asked.clear()
        Detokenizer(Counting(TOKENIZERS["byte fallback"]), prompt)
        assert len(asked) <= 1024


# ---- decoders ------------------------------------------------------------------------------------------------------


def test_a_decoder_that_cannot_run_token_by_token_gives_its_text_at_the_end(caplog):
    backend = TOKENIZERS["regular expression, joined"]
    detokenizer = Detokenizer(DecoderPlan(backend))
    assert "decoder Replace cannot run token by token: the text of a request comes when it ends" in caplog.text
    assert detokenizer.add([backend.token_to_id("a"), backend.token_to_id("cab")]) == ""
    assert detokenizer.finish() == "-c-"


def test_other_decoders_give_their_text_token_by_token(caplog):
    for name, pieces, texts in (
        ("word piece", ["do", "n't", "##ing", "."], ["do", "n't", "ing", ".", ""]),
        ("CTC", ["a", "a", "[PAD]", "b", "|"], ["a", "", "", "b", " ", ""]),
        ("words' ends", ["a", "b</w>", "b", "b</w>"], ["a", "b", " b", "b", ""]),
        ("words' ends, byte level", ["a</w>", "a"], ["a ", "a", ""]),
    ):
        ids = [TOKENIZERS[name].token_to_id(piece) for piece in pieces]
        DecoderPlan(TOKENIZERS[name])
        assert output_text(name, [], ids) == texts
    assert not caplog.text


def test_a_decoder_that_fails_on_some_texts_is_refused():
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Strip("b", 0, 2)
    with pytest.raises(ValueError, match="strips the end of the text; it cannot be streamed"):
        DecoderPlan(tokenizer)
