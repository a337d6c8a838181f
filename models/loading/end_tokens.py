"""Determines the end tokens and the token ids of a tokenizer from the files of a checkpoint.

Files are read, and no tokenizer is loaded, so that end tokens are known where none is.

    config.json, generation_config.json             eos_token_id: an id or a list of them
    tokenizer_config.json, special_tokens_map.json  eos_token: a text, whose id the tokenizer's vocabulary has
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxserve.models.loading.json_files import read_object
from jaxserve.models.loading.older_tokenizers import FILES, has_older_format, read_older
from jaxserve.models.value_checks import brief

TOKENIZER_FILE = "tokenizer.json"
_GENERATION = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_NAMING = (_TOKENIZER_CONFIG, "special_tokens_map.json")


def end_token_ids(
    raw: Mapping[str, Any], model: pathlib.Path, tokenizer: pathlib.Path
) -> tuple[tuple[int, ...], list[str]]:
    """Finds the end tokens that any file of a checkpoint names.

    Args:
        raw: the content of config.json.
        model: directory of generation_config.json.
        tokenizer: directory of the tokenizer's files.

    Returns:
        The union of the ids, those of config.json first, and a line for each disagreement of the files.

    Raises:
        ValueError: a file is malformed, an id is no token of the model, or that of an end token which a tokenizer
            in an older format names cannot be found, though generation_config.json names none either.
    """
    told: dict[str, tuple[int, ...]] = {}
    lines: list[str] = []
    vocabulary = raw.get("vocab_size")
    sources: dict[str, Any] = {"config.json": raw}
    if isinstance(raw.get("text_config"), dict):
        sources["config.json text_config"] = raw["text_config"]
    if (model / _GENERATION).is_file():
        sources[_GENERATION] = read_object(model / _GENERATION)
    for source, content in sources.items():
        if content.get("eos_token_id") is not None:
            told[source] = as_ids(f"{source} eos_token_id", content["eos_token_id"], vocabulary)
    ids: dict[str, int] | None = None
    for name in _NAMING:
        text = _eos_text(tokenizer / name)
        if text is None:
            continue
        ids = _ids_by_text(tokenizer) if ids is None else ids
        if text in ids:
            told[f"{name} ({text!r})"] = as_ids(f"{name} eos_token {text!r}", ids[text], vocabulary)
            continue
        if has_older_format(tokenizer) and not (tokenizer / TOKENIZER_FILE).is_file() and not told.get(_GENERATION):
            raise ValueError(
                f"tokenizer file {tokenizer / name} names the end token {brief(text)}, whose id no file there tells, "
                "so that texts would run past their end: convert the tokenizer to tokenizer.json, or name the id as "
                "eos_token_id in generation_config.json"
            )
        lines.append(
            f"{tokenizer / name} names the end token {brief(text)}, whose id no file there tells; it is not used"
        )
    union = tuple(dict.fromkeys(token for found in told.values() for token in found))
    if any(set(found) != set(union) for found in told.values()):
        names = ", ".join(f"{source}: {_listed(found)}" for source, found in told.items())
        lines.append(f"the files of {model} disagree on the end tokens ({names}); each of {_listed(union)} ends a text")
    return union, lines


def as_ids(name: str, value: Any, vocabulary: Any = None) -> tuple[int, ...]:
    """Reads an id, a list of them or None.

    Raises ValueError, which begins with `name`, where it is neither, or where an id is not below `vocabulary`.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ValueError(f"{name} is {brief(value)}; it must be a token id or a list of them")
    for token in ids:
        if isinstance(vocabulary, int) and token >= vocabulary:
            raise ValueError(
                f"{name} has the id {brief(token)}; the model's vocabulary (vocab_size) has {vocabulary} tokens, so "
                "ids must be below that"
            )
    return tuple(dict.fromkeys(ids))


def check_vocabulary(tokenizer: pathlib.Path, vocab_size: int) -> None:
    """Compares the ids of a tokenizer with the model's vocabulary, which may be larger (padding).

    Raises ValueError, one line, where the tokenizer has a token that the model has not, or a file is malformed.
    """
    beyond = sorted((token, text) for text, token in _ids_by_text(tokenizer).items() if token >= vocab_size)
    _read_ids.cache_clear()  # it is large, and was needed for the end tokens and here
    if beyond:
        token, text = beyond[0]
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise ValueError(
            f"tokenizer in {str(tokenizer)!r} has the token {brief(text)} with the id {brief(token)}{more}; the "
            f"model's vocabulary (vocab_size) has {vocab_size} tokens, so ids must be below that: set "
            "EngineConfig.tokenizer to the directory of the model's own, or skip_tokenizer_init for prompts of ids"
        )


def _eos_text(path: pathlib.Path) -> str | None:
    """Returns the end token that a tokenizer's file names: a text, or an object that holds it."""
    if not path.is_file():
        return None
    value = read_object(path).get("eos_token")
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"model file {path} has the eos_token {brief(value)}; it must be a text, or an object with content"
        )
    return text or None


def _ids_by_text(tokenizer: pathlib.Path) -> dict[str, int]:
    """Returns the id of each token by its text; added tokens take precedence over the vocabulary's."""
    files = [tokenizer / name for name in (TOKENIZER_FILE, _TOKENIZER_CONFIG, *FILES)]
    stats = [path.stat() for path in files if path.is_file()]
    return _read_ids(tokenizer, tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats))


@functools.lru_cache(maxsize=1)
def _read_ids(tokenizer: pathlib.Path, files: tuple[tuple[int, ...], ...]) -> dict[str, int]:
    """Computes `_ids_by_text` of files with that identity."""
    ids: dict[Any, Any] = {}
    if (tokenizer / TOKENIZER_FILE).is_file():
        content = read_object(tokenizer / TOKENIZER_FILE, contradictions=True)
        try:
            ids |= _vocabulary(content.get("model") or {})
            ids |= {added["content"]: added["id"] for added in content.get("added_tokens") or []}
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"tokenizer file {tokenizer / TOKENIZER_FILE} is malformed: {error!r}") from error
    else:
        ids |= read_older(tokenizer)
    if (tokenizer / _TOKENIZER_CONFIG).is_file():
        ids |= _decoder_ids(tokenizer / _TOKENIZER_CONFIG, ids)
    return {text: token for text, token in ids.items() if isinstance(text, str) and type(token) is int}


def _vocabulary(model: Mapping[str, Any]) -> dict[Any, Any]:
    """Returns the vocabulary of tokenizer.json: an object, or for unigrams a list of pieces with their scores."""
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):
        return {piece[0]: number for number, piece in enumerate(vocabulary)}
    return dict(vocabulary)


def _decoder_ids(path: pathlib.Path, known: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns ids that added_tokens_decoder gives to texts that no other file has."""
    added = read_object(path).get("added_tokens_decoder") or {}
    try:
        found = {token["content"]: int(number) for number, token in added.items()}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"tokenizer file {path} has a malformed added_tokens_decoder: {error!r}") from error
    return {text: token for text, token in found.items() if text not in known}


def _listed(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids)) or "none"
