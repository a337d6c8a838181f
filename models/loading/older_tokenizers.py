"""Reads token ids from tokenizer files older than tokenizer.json, without loading a tokenizer."""

from __future__ import annotations

import pathlib
from typing import Any

from google.protobuf import empty_pb2, message, unknown_fields

from jaxserve.models.loading.json_files import read_object

_FORMATS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "tiktoken.model")

_SENTENCEPIECE = ("tokenizer.model", "spiece.model")
_TEKKEN = "tekken.json"
_JSON = ("vocab.json", "added_tokens.json")

FILES = (*_SENTENCEPIECE, _TEKKEN, *_JSON)
"""Names of the files that are read."""


def has_older_format(tokenizer: pathlib.Path) -> bool:
    """Returns whether a directory holds a tokenizer in a format other than tokenizer.json."""
    return any((tokenizer / name).is_file() for name in _FORMATS)


def read_older(tokenizer: pathlib.Path) -> dict[Any, Any]:
    """Returns the id of each token by its text; tokens of files in other formats are missing.

    Raises ValueError, one line that names the file, where a JSON file is malformed.
    """
    ids: dict[Any, Any] = {}
    for name in _SENTENCEPIECE:
        if (tokenizer / name).is_file():
            ids |= _pieces(tokenizer / name)
    if (tokenizer / _TEKKEN).is_file():
        ids |= _tekken(tokenizer / _TEKKEN)
    for name in _JSON:
        if (tokenizer / name).is_file():
            ids |= read_object(tokenizer / name)
    return ids


def _pieces(path: pathlib.Path) -> dict[str, int]:
    """Returns the pieces of a sentencepiece model by id; empty where the file is of another format under that name.

    It is a protobuf message whose field 1 holds a message for each piece, whose field 1 in turn is the text.
    """
    try:
        pieces = _fields(path.read_bytes(), 1)
        texts = [next(iter(_fields(piece, 1)), b"").decode() for piece in pieces]
    except OSError as error:
        raise ValueError(f"tokenizer file {path} cannot be read: {error.strerror}") from error
    except (message.DecodeError, TypeError, AttributeError, ValueError):
        return {}
    return {text: number for number, text in enumerate(texts)}


def _fields(encoded: bytes, number: int) -> list[Any]:
    """Returns the values of one field of an encoded protobuf message, without its schema."""
    found = unknown_fields.UnknownFieldSet(empty_pb2.Empty.FromString(encoded))
    return [field.data for field in found if field.field_number == number]


def _tekken(path: pathlib.Path) -> dict[Any, Any]:
    """Reads the tokens of Mistral's tekken format: special tokens first, then as many others as the vocabulary
    holds.
    """
    content = read_object(path, contradictions=True)
    try:
        settings = content["config"]
        special = settings["default_num_special_tokens"]
        given = content.get("special_tokens") or []
        if not given:
            given = [{"token_str": text, "rank": rank} for rank, text in enumerate(("<unk>", "<s>", "</s>"))]
        room = settings["default_vocab_size"] - special
        ids = {token["token_str"]: token["rank"] + special for token in content["vocab"] if token["rank"] < room}
        return ids | {token["token_str"]: token["rank"] for token in given}
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"tokenizer file {path} is malformed: {error!r}") from error
