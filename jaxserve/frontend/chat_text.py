"""Keeps special tokens that a client writes in a conversation as text, apart from those of the chat template.

A chat template makes one text of its own special tokens and of what the client wrote, in which "<|im_end|>" ends a turn
whoever wrote it. Here the client's are told apart by position, so that a template still sees the contents as they are
and may search, strip and split them:

    mark    a marker, one character that occurs nowhere else, is put into each special token in messages and tools,
            behind its first character; and into what could become one at the beginning or end of a text, where a
            template puts other text beside it
    render  the template runs
    unmark  the markers are taken out again; a special token in which there was one is the client's
    encode  where there is such a one: by a copy of the tokenizer in which special tokens have other names, which nobody
            can guess; the template's are renamed in the text, too

A special token has its id, its flags and its place in that copy, so everything else is encoded as it would be where the
client's was no token. Without one the text is encoded as ever.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import tokenizers

from jaxserve.frontend.encoding import Encoder

_MARKERS = range(0xF0000, 0xFFFFE)
"""Characters of a private use area, of which a marker is the first that does not occur."""

_WORD = re.compile(r"\w")
_NAME = re.compile(r"[\w.-]+")


class RenderedText(str):
    """Text of a chat template. It has the special tokens around it already.

    renamed: the same with the template's special tokens under the names of `ChatTexts.encoder`; None where the client
    wrote no special token, so that the text may be encoded as any other.
    """

    __slots__ = ("renamed",)
    renamed: str | None

    def __new__(cls, text: str, renamed: str | None = None) -> RenderedText:
        made = super().__new__(cls, text)
        made.renamed = renamed
        return made


class ChatTexts:
    """Marks conversations of one tokenizer. Thread-safe."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        tokens = [token for token in backend.get_added_tokens_decoder().values() if token.special and token.content]
        self._tokens = {token.content: token for token in tokens}
        nonce = secrets.token_hex(8)
        self._names = {text: f"<{nonce}{number}>" for number, text in enumerate(self._tokens)}
        folds = backend.normalizer is not None and backend.normalizer.normalize_str("A") == "a"
        # A normalizer that makes letters small makes those of such tokens so, too.
        self._folded = {text.lower(): token for text, token in self._tokens.items() if token.normalized and folds}
        by_length = sorted(self._tokens, key=len, reverse=True)
        flags = re.IGNORECASE if self._folded else 0
        self._pattern = re.compile("|".join(map(re.escape, by_length)), flags) if tokens else None
        self._longest = max(map(len, by_length), default=0)
        texts = [*self._tokens, *self._folded]
        self._beginnings = {text[:end] for text in texts for end in range(1, len(text))}
        self._ends = {text[start:] for text in texts for start in range(1, len(text))}

    def mark(self, template: str, *values: Any) -> tuple[str, list[Any]]:
        """Marks what a client sent.

        Args:
            template: the template's source, in which the marker must not occur.
            values: JSON values, such as the messages.

        Returns:
            The marker, "" where nothing is marked, and the values, marked.
        """
        if self._pattern is None or not any(self._needs_marks(value) for value in values):
            return "", list(values)
        used = set(template).union(*(text for value in values for text in texts_of(value)))
        marker = next(chr(number) for number in _MARKERS if chr(number) not in used)
        return marker, [self._marked(value, marker) for value in values]

    def unmark(self, text: str, marker: str) -> RenderedText:
        """Returns a rendered text without its markers."""
        if not marker or marker not in text:
            return RenderedText(text)
        parts = text.split(marker)
        places = set(itertools.accumulate(len(part) for part in parts[:-1]))
        plain = "".join(parts)
        matches = list(self._template_tokens(plain, places))
        if matches == list(self._template_tokens(plain, set())):
            return RenderedText(plain)
        renamed, end = [], 0
        for start, stop, token in matches:
            renamed += [plain[end:start], self._names[token.content]]
            end = stop
        return RenderedText(plain, "".join([*renamed, plain[end:]]))

    @functools.cached_property
    def encoder(self) -> Encoder:
        """Returns the encoder for `RenderedText.renamed`."""
        return Encoder(_renamed(self._backend, self._names))

    def _places(self, text: str) -> list[int]:
        """Returns where to mark a text: behind the first character of each special token, and before the last one of
        what may be the end of one that begins in the text before it."""
        assert self._pattern is not None
        places: set[int] = set()
        start = 0
        while (match := self._pattern.search(text, start)) is not None:
            places.add(match.start() + 1)
            start = match.start() + 1
        for length in range(1, min(len(text), self._longest) + 1):
            if self._is_in(self._beginnings, text[-length:]):
                places.add(len(text) - length + 1)
            if self._is_in(self._ends, text[:length]):
                places.add(length - 1)
        return sorted(places)

    def _key_places(self, key: str) -> list[int]:
        """Returns where to mark the name of a member. A template finds members by their names, so one that is a word
        and no special token stays as it is."""
        assert self._pattern is not None
        return self._places(key) if self._pattern.search(key) or not _NAME.fullmatch(key) else []

    def _needs_marks(self, value: Any) -> bool:
        if isinstance(value, str):
            return bool(self._places(value))
        if isinstance(value, Mapping):
            return any(self._key_places(key) or self._needs_marks(item) for key, item in value.items())
        return isinstance(value, Sequence) and any(self._needs_marks(item) for item in value)

    def _is_in(self, texts: Set[str], text: str) -> bool:
        return text in texts or (bool(self._folded) and text.lower() in texts)

    def _marked(self, value: Any, marker: str) -> Any:
        if isinstance(value, str):
            return _divided(value, self._places(value), marker)
        if isinstance(value, Mapping):
            return {
                _divided(key, self._key_places(key), marker): self._marked(item, marker) for key, item in value.items()
            }
        if isinstance(value, Sequence):
            return [self._marked(item, marker) for item in value]
        return value

    def _template_tokens(self, text: str, places: Set[int]) -> Iterator[tuple[int, int, tokenizers.AddedToken]]:
        """Yields the special tokens in which there is no marked place, each with its beginning and end, as the
        tokenizer finds them: from left to right, the longest first."""
        assert self._pattern is not None
        start = 0
        while (match := self._pattern.search(text, start)) is not None:
            begin, start = match.start(), match.start() + 1
            for length in range(match.end() - begin, 0, -1):
                spelled = text[begin : begin + length]
                token = self._tokens.get(spelled) or self._folded.get(spelled.lower())
                if token is None or not places.isdisjoint(range(begin + 1, begin + length)):
                    continue
                if token.single_word and not _stands_alone(text, begin, begin + length):
                    continue
                yield begin, begin + length, token
                start = begin + length
                break


def _divided(text: str, places: Sequence[int], marker: str) -> str:
    return marker.join(text[start:stop] for start, stop in itertools.pairwise([0, *places, len(text)]))


def _stands_alone(text: str, start: int, stop: int) -> bool:
    """Tells whether no character of a word stands beside text[start:stop]."""
    return not (_WORD.match(text[start - 1 : start]) or _WORD.match(text[stop : stop + 1]))


def texts_of(value: Any) -> Iterator[str]:
    """Yields the texts in a JSON value, names of members among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from texts_of(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from texts_of(item)


def _renamed(backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
    """Returns a copy of a tokenizer in which the special tokens have other names, also in the model's vocabulary, where
    a text could find them without their being added tokens. It adds none around a text."""
    state = json.loads(backend.to_str())
    state["post_processor"] = state["truncation"] = state["padding"] = None
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), *rest] for piece, *rest in vocab]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return tokenizers.Tokenizer.from_str(json.dumps(state))
