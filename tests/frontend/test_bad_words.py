"""Bad words as token sequences, with and without a space before them."""

from __future__ import annotations

import pytest

from jaxserve.frontend.bad_words import bad_words_token_ids
from tests.frontend.tokenizers_for_tests import byte_fallback, byte_level, load


def test_a_word_is_forbidden_as_it_begins_and_after_a_space(tmp_path):
    """The second only where it is another sequence as long, as in vLLM: else its tail is the first."""
    tokenizer = load(tmp_path / "bytes", byte_level(added=("word", " word")))
    word, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in ("word", " word"))
    assert len(word) == len(spaced) == 1
    found = bad_words_token_ids(["word", "  word", "ab"], tokenizer, 1000)
    letters = tokenizer.encode("ab", add_special_tokens=False)
    assert found == (tuple(word), tuple(spaced), tuple(letters))
    pieces = load(tmp_path / "pieces", byte_fallback(), bos_token="<s>", eos_token="</s>")
    assert bad_words_token_ids(["ab"], pieces, 1000) == (tuple(pieces.encode("ab", add_special_tokens=False)),)


def test_what_cannot_be_forbidden_is_refused(tmp_path):
    tokenizer = load(tmp_path, byte_level())
    with pytest.raises(ValueError, match="bad_words needs text, and this server has no tokenizer"):
        bad_words_token_ids(["a"], None, 1000)
    with pytest.raises(ValueError, match="bad_words has ' ', which is no token; leave it out"):
        bad_words_token_ids([" "], tokenizer, 1000)
    with pytest.raises(ValueError, match=r"bad_words has 'a' with token .*; the model has token ids from 0 to 9"):
        bad_words_token_ids(["a"], tokenizer, 10)
    assert bad_words_token_ids([], None, 10) == ()
