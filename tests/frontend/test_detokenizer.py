"""Incremental detokenisation against the tokenizer's own decode of the whole output."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from jaxserve.frontend.detokenizer import DecoderPlan, Detokenizer
from tests.frontend.tokenizers_for_tests import byte_fallback, byte_level, metaspace


def _without_decoder():
    return Tokenizer.from_str(json.dumps(json.loads(byte_level().to_str()) | {"decoder": None}))


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
    "no decoder": _without_decoder(),
}
PLANS = {name: DecoderPlan(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def chunked(data, ids):
    """The ids in chunks of drawn sizes."""
    position = 0
    while position < len(ids):
        size = data.draw(st.integers(1, 4))
        yield ids[position : position + size]
        position += size


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_the_deltas_are_the_decoded_whole(name, data):
    backend = TOKENIZERS[name]
    # Two ids past the vocabulary: a model's embedding may be padded beyond its tokenizer.
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() + 1), max_size=24))
    detokenizer = Detokenizer(PLANS[name])
    text = "".join(detokenizer.add(chunk) for chunk in chunked(data, ids)) + detokenizer.finish()
    assert text == backend.decode(ids, skip_special_tokens=True)


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


def test_a_decoder_that_cannot_be_streamed_is_refused():
    tokenizer = byte_level()
    tokenizer.decoder = decoders.CTC()
    with pytest.raises(ValueError, match="decoder CTC, which cannot be streamed; supported are ByteLevel"):
        DecoderPlan(tokenizer)
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "b")])
    with pytest.raises(ValueError, match="decoder Replace after one that joins tokens; it cannot be streamed"):
        DecoderPlan(tokenizer)
    tokenizer.decoder = decoders.Strip("b", 0, 2)
    with pytest.raises(ValueError, match="strips the end of the text; it cannot be streamed"):
        DecoderPlan(tokenizer)
