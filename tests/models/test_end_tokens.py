"""The tokens that end a text, and those of a tokenizer, as the files of a checkpoint say together."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.models.config import ModelConfig
from jaxserve.models.loading.end_tokens import check_vocabulary
from tests.models.checkpoints import write_files as write

TOKENS = {f"t{number}": number for number in range(150)}
UNIGRAM = [[f"piece{number}", -1.0] for number in range(140)]


PIECES = ["<unk>", "<s>", "</s>", "<e>", *(f"▁{number}" for number in range(136))]
TEKKEN = {
    "config": {"default_vocab_size": 140, "default_num_special_tokens": 10},
    "vocab": [{"rank": number, "token_str": f"t{number}", "token_bytes": ""} for number in range(150)],
}
SPECIAL = [{"rank": number, "token_str": text, "is_control": True} for number, text in enumerate(["<s>", "<e>"])]


def sentencepiece(pieces: list[str]) -> bytes:
    """A model file: each piece with its text, score and type, and a field of the settings after them."""

    def field(key: int, value: bytes) -> bytes:
        return bytes([key, len(value)]) + value

    encoded = [field(0x0A, piece.encode()) + b"\x15\0\0\x80\xbf\x18\x03" for piece in pieces]
    return b"".join(field(0x0A, piece) for piece in encoded) + field(0x12, b"\x18\x02")


def tokenizer(added: dict[str, int] | None = None, vocab: Any = None) -> dict[str, Any]:
    extra = [{"id": number, "content": text, "special": True} for text, number in (added or {}).items()]
    return {"added_tokens": extra, "model": {"type": "BPE", "vocab": TOKENS if vocab is None else vocab, "merges": []}}


ENDS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...], bool]] = {
    "config": ({"eos_token_id": 2}, {}, (2,), False),
    "config list": ({"eos_token_id": [5, 2, 5]}, {}, (5, 2), False),
    "none at all": ({"eos_token_id": []}, {}, (), False),
    "generation": ({"eos_token_id": 2}, {"generation_config": {"eos_token_id": [7, 8]}}, (2, 7, 8), True),
    "generation alone": ({}, {"generation_config": {"eos_token_id": 7}}, (7,), False),
    "generation null": ({"eos_token_id": 2}, {"generation_config": {"eos_token_id": None}}, (2,), False),
    "empty list beside an id": ({"eos_token_id": 2}, {"generation_config": {"eos_token_id": []}}, (2,), True),
    "order alone": ({"eos_token_id": [2, 7]}, {"generation_config": {"eos_token_id": [7, 2]}}, (2, 7), False),
    "tokenizer": (
        {"eos_token_id": 2},
        {"tokenizer_config": {"eos_token": "<end>"}, "tokenizer": tokenizer({"<end>": 150})},
        (2, 150),
        True,
    ),
    "tokenizer's object": (
        {"eos_token_id": 2},
        {"tokenizer_config": {"eos_token": {"content": "t9", "lstrip": False}}, "tokenizer": tokenizer()},
        (2, 9),
        True,
    ),
    "tokenizer alone": ({}, {"tokenizer_config": {"eos_token": "t9"}, "tokenizer": tokenizer()}, (9,), False),
    "special tokens": (
        {"eos_token_id": 2},
        {"special_tokens_map": {"eos_token": {"content": "piece4"}}, "tokenizer": tokenizer(vocab=UNIGRAM)},
        (2, 4),
        True,
    ),
    "all agree": (
        {"eos_token_id": 9},
        {
            "generation_config": {"eos_token_id": [9]},
            "tokenizer_config": {"eos_token": "t9"},
            "special_tokens_map": {"eos_token": "t9"},
            "tokenizer": tokenizer(),
        },
        (9,),
        False,
    ),
    "decoder": (
        {"eos_token_id": 2},
        {
            "tokenizer_config": {"eos_token": "<e>", "added_tokens_decoder": {"151": {"content": "<e>"}}},
            "tokenizer": tokenizer(),
        },
        (2, 151),
        True,
    ),
    "older format": (
        {"eos_token_id": 2},
        {"tokenizer_config": {"eos_token": "<e>"}, "vocab": TOKENS, "added_tokens": {"<e>": 152}},
        (2, 152),
        True,
    ),
    "nested": ({"eos_token_id": 2, "text_config": {"eos_token_id": 3}}, {}, (2, 3), True),
    "a text that no file knows": (
        {"eos_token_id": 2},
        {"tokenizer_config": {"eos_token": "<nope>"}, "tokenizer": tokenizer()},
        (2,),
        True,
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_end_tokens_are_the_union_of_all_files(tmp_path, name, caplog):
    fields, files, expected, told = ENDS[name]
    found = ModelConfig.from_directory(write(tmp_path, fields, **files))
    assert found.eos_token_ids == expected
    assert bool(caplog.messages) == told
    if told and "no file" not in name:
        (line,) = caplog.messages
        assert "disagree on the end tokens" in line
        assert f"each of {', '.join(map(str, expected))} ends a text" in line


def test_a_tokenizer_of_another_directory_tells_the_end_tokens(tmp_path):
    model = write(
        tmp_path / "model",
        {"eos_token_id": 2},
        tokenizer_config={"eos_token": "t1"},
        tokenizer=tokenizer(),
    )
    other = write(tmp_path / "other", tokenizer_config={"eos_token": "t8"}, tokenizer=tokenizer())
    assert ModelConfig.from_directory(model).eos_token_ids == (2, 1)
    assert ModelConfig.from_directory(model, other).eos_token_ids == (2, 8)


@pytest.mark.parametrize(
    ("fields", "files", "message"),
    [
        (
            {"eos_token_id": 160},
            {},
            r"^config.json eos_token_id has the id 160; .* has 160 tokens",
        ),
        ({"bos_token_id": 999}, {}, r"^config.json bos_token_id has the id 999; the model's"),
        (
            {},
            {"generation_config": {"eos_token_id": [2, 4000]}},
            r"^generation_config.json eos_token_id has the id 4",
        ),
        (
            {},
            {"generation_config": {"eos_token_id": "2"}},
            r"^generation_config.json eos_token_id is '2'; it",
        ),
        ({}, {"generation_config": "{"}, r"generation_config.json is not valid JSON"),
        ({"eos_token_id": -1}, {}, r"^config.json eos_token_id is -1; it must be a token id"),
        ({"eos_token_id": [[2]]}, {}, r"^config.json eos_token_id is \[\[2\]\]; it must"),
        (
            {},
            {"tokenizer_config": {"eos_token": "<e>"}, "tokenizer": tokenizer({"<e>": 160})},
            r"^tokenizer_config.json eos_token '<e>' has the id 160; the model's",
        ),
        ({}, {"tokenizer_config": {"eos_token": 5}}, r"tokenizer_config.json has the eos_token 5; it must be a text"),
        ({}, {"special_tokens_map": "[]"}, r"special_tokens_map.json holds a list; it must hold an object$"),
        (
            {},
            {"tokenizer_config": {"eos_token": "<e>"}, "tokenizer": {"added_tokens": [3]}},
            r"tokenizer.json is malformed: TypeError",
        ),
    ],
)
def test_end_tokens_that_cannot_be_are_refused(tmp_path, fields, files, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_directory(write(tmp_path, fields, **files))


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_end_tokens_of_a_sentencepiece_model(tmp_path, name, caplog):
    write(tmp_path, {"eos_token_id": 2}, tokenizer_config={"eos_token": "<e>"})
    (tmp_path / name).write_bytes(sentencepiece(PIECES))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (2, 3)
    assert "disagree on the end tokens" in caplog.text
    write(tmp_path, {"eos_token_id": 2}, tokenizer_config={"eos_token": "<a>"}, added_tokens={"<a>": 150})
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (2, 150)
    write(tmp_path, {"eos_token_id": 2}, added_tokens={}, tokenizer_config={"eos_token": "▁135"})
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (2, 139)
    check_vocabulary(tmp_path, 140)
    with pytest.raises(ValueError, match=r"has the token '▁135' with the id 139; the model's .* has 139 tokens"):
        check_vocabulary(tmp_path, 139)


def test_end_tokens_of_tekken(tmp_path):
    write(tmp_path, {"eos_token_id": 0}, tokenizer_config={"eos_token": "</s>"}, tekken=TEKKEN)
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (0, 2)
    check_vocabulary(tmp_path, 140)
    with pytest.raises(ValueError, match=r"has the token 't129' with the id 139; the model's .* has 139 tokens"):
        check_vocabulary(tmp_path, 139)
    write(tmp_path, tokenizer_config={"eos_token": "<e>"}, tekken=TEKKEN | {"special_tokens": SPECIAL})
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (1,)
    write(tmp_path, tokenizer_config={"eos_token": "<e>"}, tekken={"config": {}})
    with pytest.raises(ValueError, match=r"tekken.json is malformed: KeyError"):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", sentencepiece(PIECES)),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n"),
        ("tokenizer.model", b""),
        ("spiece.model", sentencepiece(PIECES)[:-3]),
        ("tiktoken.model", b"IQ== 0\nIg== 1\n"),
        ("vocab.txt", b"[PAD]\n[CLS]\n"),
        ("vocab.json", b"{}"),
    ],
)
def test_an_end_token_of_an_older_format_without_an_id_is_refused(tmp_path, name, content, caplog):
    write(tmp_path, {"eos_token_id": 2}, tokenizer_config={"eos_token": "<|eot|>"})
    ModelConfig.from_directory(tmp_path)  # there is no tokenizer yet
    (tmp_path / name).write_bytes(content)
    message = (
        r"config.json names the end token '<\|eot\|>', whose id .* to tokenizer.json, or name .* in generation_conf"
    )
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_directory(tmp_path)
    write(tmp_path, {"eos_token_id": 2}, generation_config={"eos_token_id": 9})
    caplog.clear()
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (2, 9)
    assert "whose id no file there tells; it is not used" in caplog.text


def test_tokens_beyond_the_model_are_refused_and_a_padded_vocabulary_is_not(tmp_path):
    write(tmp_path, tokenizer=tokenizer({"<pad>": 159}))
    check_vocabulary(tmp_path, 160)
    with pytest.raises(ValueError, match=r"has the token '<pad>' with the id 159; the model's .* 159 tokens"):
        check_vocabulary(tmp_path, 159)
    with pytest.raises(ValueError, match=r"the token 't149' with the id 149 and 1 more; the model's .* has 149 tokens"):
        check_vocabulary(tmp_path, 149)
    write(tmp_path, tokenizer=tokenizer(), tokenizer_config={"added_tokens_decoder": {"200": {"content": "<x>"}}})
    with pytest.raises(ValueError, match=r"has the token '<x>' with the id 200"):
        check_vocabulary(tmp_path, 160)
    write(tmp_path, tokenizer=tokenizer(vocab=UNIGRAM), tokenizer_config={})
    with pytest.raises(ValueError, match=r"has the token 'piece139' with the id 139"):
        check_vocabulary(tmp_path, 139)
