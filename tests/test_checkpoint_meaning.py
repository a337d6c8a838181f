"""Engines over checkpoints whose files disagree, with models whose next token is a table lookup."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from tests.frontend.tokenizers_for_tests import byte_level, save
from tests.models.checkpoints import BASE, lookup_tensors, write_files

VOCABULARY = 272
A, B, C, END = (3 + ord(letter) - ord("!") for letter in "abc~")
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": VOCABULARY,
    "num_hidden_layers": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}


@pytest.fixture
def tensors() -> dict[str, Any]:
    return lookup_tensors(BASE | SHAPE, {A: B, B: C, C: END, END: A})


def tokens(model: str, prompt: Any = "a", **options: Any) -> tuple[str, tuple[int, ...]]:
    """Why generation ended, and its tokens."""
    with LLM(model=model, max_num_seqs=4, max_num_batched_tokens=8, num_pages=17, **options) as llm:
        done = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=6), use_tqdm=False)[0].outputs[0]
    return done.finish_reason, done.token_ids


def test_end_tokens_that_the_tokenizer_alone_names_end_a_text(tmp_path, tensors):
    model = write_files(tmp_path / "model", SHAPE, tensors)
    assert tokens(model, {"prompt_token_ids": [A]}, skip_tokenizer_init=True) == ("length", (B, C, END, A, B, C))
    stopped = ("stop", (B, C, END))
    other = save(tmp_path / "other", byte_level(), eos_token="~")
    assert tokens(model, tokenizer=str(other)) == stopped
    save(pathlib.Path(model), byte_level(), eos_token={"content": "~", "__type": "AddedToken"})
    assert tokens(model) == stopped
    assert tokens(model, {"prompt_token_ids": [A]}, skip_tokenizer_init=True) == stopped


def test_a_stored_head_is_used_and_an_equal_one_is_not(tmp_path, tensors, caplog):
    model = write_files(tmp_path, SHAPE | {"tie_word_embeddings": True}, tensors)
    assert tokens(model, {"prompt_token_ids": [A]}, skip_tokenizer_init=True)[1][:3] == (B, C, END)
    assert "the stored head is used" in caplog.text
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_files(tmp_path, SHAPE | {"tie_word_embeddings": True}, tensors)
    # Tied to one-hot embeddings, a token is followed by itself.
    assert tokens(model, {"prompt_token_ids": [A]}, skip_tokenizer_init=True)[1][:3] == (A, A, A)


@pytest.mark.parametrize("files", [{}, {"tokenizer": "{"}, {"vocab": "[]"}])
def test_an_unknown_architecture_is_named_before_a_tokenizer_is_looked_for(tmp_path, files):
    model = write_files(tmp_path, {"architectures": ["BloomForCausalLM"], "hidden_size": None}, **files)
    with pytest.raises(ValueError, match=r"'BloomForCausalLM'; .*known architectures are .*LlamaForCausalLM"):
        LLM(model=model)
    write_files(tmp_path, {"num_hidden_layers": 10**9})
    with pytest.raises(ValueError, match=r"^config.json num_hidden_layers is 1000000000; it must be at most 1024$"):
        LLM(model=model)
