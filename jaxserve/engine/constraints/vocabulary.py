"""Builds llguidance's view of a tokenizer: the bytes of every token, and how a text is split into tokens.

llguidance reads a fast tokenizer's tokenizer.json. Some of what checkpoints hold it would misread, so the content is
changed on its way: added tokens that are not ASCII would become other bytes, ids between two tokens would be missing,
and decoders without byte tokens are unknown to it. It also gets one more token, which stands for the end of the output:
grammars allow it exactly where they may end, whatever ends the output of a model or of a request.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

import llguidance
import tokenizers

_END = "<|end of the grammar|>"
_HOLE = "<|no token {}|>"
_BYTE_LEVEL = ("ByteLevel",)
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_UNREADABLE = ("WordPiece", "CTC", "BPEDecoder")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Holds a tokenizer as llguidance uses it.

    end_id: the token that stands for the end of an output; every other id is the tokenizer's own. special: ids of
    special tokens by their text; no text of a grammar matches them.
    """

    tokenizer: llguidance.LLTokenizer
    end_id: int
    special: dict[str, int]

    @property
    def words(self) -> int:
        """Returns the number of 32-bit words of a mask."""
        return -(-self.tokenizer.vocab_size // 32)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.special.values())


def load_vocabulary(directory: str | pathlib.Path) -> Vocabulary:
    """Reads the tokenizer of a checkpoint directory. Takes a second for 100,000 tokens, and holds the interpreter lock.

    Raises ValueError, one line, when there is none, or when its text cannot be told from single tokens.
    """
    return vocabulary_of(_content(pathlib.Path(directory)))


def vocabulary_of(content: dict[str, Any]) -> Vocabulary:
    """Builds the vocabulary from the content of a tokenizer.json, which it changes. Raises ValueError, one line."""
    content["truncation"] = content["padding"] = None  # a training run's; a text is never cut or padded
    _set_decoder(content)
    added = content["added_tokens"] = list(content.get("added_tokens") or [])
    ids = {token["content"]: token["id"] for token in added}
    own = _model_ids(content["model"])
    ids |= own
    byte_level = _has_step(content["decoder"], *_BYTE_LEVEL)
    for token in added:
        text = token["content"]
        token["special"] = bool(token["special"] or (byte_level and not text.isascii()))
    if _has_step(content["decoder"], "ByteFallback"):  # llguidance takes these for bytes, and fails
        texts = [piece for piece in own if piece.startswith("<0x") and not _BYTE.fullmatch(piece)]
        added += [_special_token(own[piece], piece) for piece in texts]
    _fill_holes(content, ids)
    end_id = max(ids.values(), default=-1) + 1
    added.append(_special_token(end_id, _END))
    try:
        tokenizer = llguidance.LLTokenizer(json.dumps(content), n_vocab=end_id + 1, eos_token=[end_id])
    except BaseException as error:  # the bindings raise what Rust does, and a panic is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"structured_outputs cannot be used with this tokenizer: {line}") from error
    unnamed = (_END, _HOLE.partition("{")[0])
    special = {
        token["content"]: token["id"]
        for token in added
        if token["special"] and not token["content"].startswith(unnamed)
    }
    return Vocabulary(tokenizer, end_id, special)


def _content(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a tokenizer.json, with the tokens that tokenizer_config.json adds to it."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"structured_outputs need the file {str(path)!r}, which does not exist; save the tokenizer in that form"
        )
    try:
        content = json.loads(path.read_bytes())
        known = {token["content"] for token in content.get("added_tokens") or []} | set(_model_ids(content["model"]))
        missing = _configured_tokens(directory / "tokenizer_config.json", known)
        if not missing:
            return content
        backend = tokenizers.Tokenizer.from_file(str(path))
        for token in missing:  # in the order of their ids, as transformers does
            text, flags = token.pop("content"), {name: token[name] for name in _FLAGS if name in token}
            added = tokenizers.AddedToken(text, **flags)
            (backend.add_special_tokens if token.get("special") else backend.add_tokens)([added])
        return json.loads(backend.to_str())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"tokenizer file {str(path)!r} cannot be read: {error}") from error


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _configured_tokens(path: pathlib.Path, known: set[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    tokens = json.loads(path.read_bytes()).get("added_tokens_decoder") or {}
    return [dict(tokens[number]) for number in sorted(tokens, key=int) if tokens[number]["content"] not in known]


def _model_ids(model: dict[str, Any]) -> dict[str, int]:
    """Returns the ids of a tokenizer's own tokens."""
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}


def _steps(decoder: Any) -> list[dict[str, Any]]:
    """Returns the steps of a decoder in order."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    return [decoder]


def _has_step(decoder: Any, *kinds: str) -> bool:
    return any(step["type"] in kinds for step in _steps(decoder))


def _set_decoder(content: dict[str, Any]) -> None:
    """Gives a decoder that marks spaces a form that llguidance knows. Raises ValueError for one whose tokens have no
    text of their own."""
    decoder = content.get("decoder")
    if decoder is None or _has_step(decoder, *_UNREADABLE):
        kind = "none" if decoder is None else next(step["type"] for step in _steps(decoder))
        raise ValueError(
            f"structured_outputs cannot be used with this tokenizer: the text of a token depends on others (decoder "
            f"{kind})"
        )
    if _has_step(decoder, "ByteLevel", "ByteFallback"):
        return
    marks = [step["replacement"] for step in _steps(decoder) if step["type"] == "Metaspace"]
    space = {"type": "Replace", "pattern": {"String": marks[0] if marks else " "}, "content": " "}
    content["decoder"] = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]}


def _fill_holes(content: dict[str, Any], ids: dict[str, int]) -> None:
    """Names the ids between others that have no token of their own, as special tokens.

    Where a list of pieces has one twice, its text is that of the last.
    """
    vocab, taken = content["model"]["vocab"], set(ids.values())
    last = max(taken, default=-1) if isinstance(vocab, dict) else max([*taken, len(vocab) - 1])
    for number in range(last + 1):
        if number in taken:
            continue
        name = _HOLE.format(number)
        if isinstance(vocab, dict):
            vocab[name] = number
        elif number < len(vocab):
            vocab[number] = [name, vocab[number][1]]
        else:
            raise ValueError(
                f"structured_outputs cannot be used with this tokenizer: id {number} has no token, but {last} has"
            )
        content["added_tokens"].append(_special_token(number, name))


def _special_token(number: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **flags, "special": True}
