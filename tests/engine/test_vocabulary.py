"""llguidance's view of a tokenizer, beside what the tokenizer itself makes of its tokens."""

from __future__ import annotations

import json
import pathlib

import pytest
from tokenizers import AddedToken, Tokenizer, decoders

from jaxserve.engine.constraints.vocabulary import load_vocabulary, vocabulary_of
from tests.frontend.tokenizer_kinds import CORPUS, KINDS, kind

REFUSED = {"WordPiece", "WordLevel"}
"""Kinds whose tokens have no text of their own."""


PIECES = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
"""The decoder of checkpoints with sentencepiece's tokens; some of the kinds, which are for encoding, have none."""


def content(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())


@pytest.mark.parametrize("name", [name for name in KINDS if name not in REFUSED])
def test_tokens_have_the_bytes_of_their_text(name):
    """The bytes of a text's tokens are the text, however a tokenizer marks spaces and what it has no token for."""
    tokenizer = Tokenizer.from_str(kind(name).to_str())
    tokenizer.decoder = tokenizer.decoder or PIECES
    vocabulary = vocabulary_of(content(tokenizer))
    added = {number for number, token in tokenizer.get_added_tokens_decoder().items()}
    for line in CORPUS.splitlines()[:6]:
        ids = tokenizer.encode(line, add_special_tokens=False).ids
        if any(number in added for number in ids):
            continue
        expected, found = tokenizer.decode(ids).encode(), vocabulary.tokenizer.decode_bytes(ids)
        assert found.lstrip(b" ") == expected.lstrip(b" "), line
    assert vocabulary.end_id == vocabulary.tokenizer.vocab_size - 1
    assert vocabulary.tokenizer.eos_tokens == [vocabulary.end_id]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_tokenizer_whose_tokens_have_no_text_of_their_own_is_refused(name):
    with pytest.raises(ValueError, match=r"^structured_outputs cannot be used with this tokenizer: the text of"):
        vocabulary_of(content(kind(name)))


def test_added_tokens():
    """Special ones are no text; others are, if their text is what bytes of theirs say."""
    made = Tokenizer.from_str(kind("tiny").to_str())
    made.add_special_tokens(["<|call|>", "[END]"])
    made.add_tokens([AddedToken("new one", normalized=False), AddedToken("größe", normalized=False)])
    vocabulary = vocabulary_of(content(made))
    ids = {text: made.token_to_id(text) for text in ("<|call|>", "[END]", "new one", "größe", "<eos>")}
    assert {text: ids[text] for text in ("<|call|>", "[END]", "größe", "<eos>")}.items() <= vocabulary.special.items()
    assert "new one" not in vocabulary.special
    assert vocabulary.tokenizer.decode_bytes([ids["new one"]]) == b"new one"
    assert all(vocabulary.tokenizer.is_special_token(number) for number in vocabulary.special_ids)
    assert max(vocabulary.special_ids) < vocabulary.end_id


def test_ids_without_a_token():
    made = content(kind("tiny"))
    made["added_tokens"] = [token for token in made["added_tokens"] if token["special"]]
    last = max(made["model"]["vocab"].values())
    made["model"]["vocab"]["zz"] = last + 5
    vocabulary = vocabulary_of(made)
    assert vocabulary.end_id == last + 6
    assert vocabulary.tokenizer.decode_bytes([last + 5]) == b"zz"
    assert all(vocabulary.tokenizer.is_special_token(number) for number in range(last + 1, last + 5))
    assert set(vocabulary.special) == {"<pad>", "<bos>", "<eos>"}


def test_tokens_that_only_the_configuration_adds(tmp_path: pathlib.Path):
    made = kind("Llama 3")
    made.save(str(tmp_path / "tokenizer.json"))
    number = made.get_vocab_size()
    token = {"content": "<|tool|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    configured = {"added_tokens_decoder": {str(number): token}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(configured), encoding="utf-8")
    assert load_vocabulary(tmp_path).special["<|tool|>"] == number


def test_a_directory_without_tokenizer_json(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=r"^structured_outputs need the file '.*tokenizer\.json', which does not"):
        load_vocabulary(tmp_path)
