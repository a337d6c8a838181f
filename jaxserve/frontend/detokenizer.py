"""Turns token ids into text as they arrive, at a constant cost per token.

A tokenizer's decoder is a chain of small steps over a list of tokens. `DecoderPlan` reads that chain from the
tokenizer and a `Detokenizer` runs the same steps one token at a time. What has been returned is final: the deltas of a
request, put together, are exactly `tokenizers.Tokenizer.decode(ids, skip_special_tokens=True)`, for any ids.

Text is held back only while later tokens can still change it: the first bytes of a character, and, in tokenizers with
byte fallback (sentencepiece), a whole run of byte tokens, because such a decoder replaces every byte of a run that
turns out to be invalid.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import tokenizers

REPLACEMENT = "\ufffd"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _Stage(Protocol):
    """One step of a decoder: text in, the text that is now certain out; `finish` gives the rest."""

    def feed(self, text: str) -> Sequence[str]: ...

    def finish(self) -> Sequence[str]: ...


class _Bytes:
    """Byte-level tokens (GPT-2's table); characters outside the table stand for themselves.

    Takes bytes from `DecoderPlan` by way of latin-1, which keeps stages uniform: one character is one byte.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, text: str) -> Sequence[str]:
        return (self._decoder.decode(text.encode("latin-1")),)

    def finish(self) -> Sequence[str]:
        return (self._decoder.decode(b"", final=True),)


class _ByteFallback:
    """`<0xNN>` tokens: a run of them is its text when all of it is valid UTF-8, else one U+FFFD for each byte."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._check = codecs.getincrementaldecoder("utf-8")("strict")
        self._invalid = False

    def feed(self, text: str) -> Sequence[str]:
        match = _BYTE_TOKEN.fullmatch(text)
        if match is None:
            return (*self.finish(), text)
        byte = bytes((int(match[1], 16),))
        if self._invalid:
            return (REPLACEMENT,)
        self._held += byte
        try:
            self._check.decode(byte)
        except UnicodeDecodeError:
            self._invalid = True
            length = len(self._held)
            self._held.clear()
            return (REPLACEMENT,) * length
        return ()

    def finish(self) -> Sequence[str]:
        held, invalid = bytes(self._held), self._invalid
        self._held.clear()
        self._check.reset()
        self._invalid = False
        if invalid or not held:
            return ()
        try:
            return (held.decode(),)
        except UnicodeDecodeError:
            return (REPLACEMENT,) * len(held)


class _PerToken:
    """A step that looks at one token and at whether it is the first."""

    def __init__(self, change: Callable[[str, bool], str]):
        self._change = change
        self._first = True

    def feed(self, text: str) -> Sequence[str]:
        first, self._first = self._first, False
        return (self._change(text, first),)

    def finish(self) -> Sequence[str]:
        return ()


class _StripText:
    """Drops up to `count` of a character at the beginning of the text."""

    def __init__(self, character: str, count: int):
        self._character = character
        self._count = count

    def feed(self, text: str) -> Sequence[str]:
        while text and self._count and text[0] == self._character:
            text = text[1:]
            self._count -= 1
        if text:
            self._count = 0
        return (text,)

    def finish(self) -> Sequence[str]:
        return ()


class DecoderPlan:
    """What a tokenizer's detokenisers share: which pieces ids stand for, and the stages of its decoder.

    Raises ValueError for a decoder that cannot run token by token.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self._skipped = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        self._pieces: dict[int, str | None] = {}
        spec = json.loads(backend.to_str())["decoder"]
        self._factories: list[Callable[[], _Stage]] = []
        self._byte_level = False
        self._fused = False
        if spec is None:
            self._factories.append(lambda: _PerToken(lambda text, first: text if first else f" {text}"))
        else:
            for step in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
                self._add_step(step)

    def _add_step(self, step: dict[str, Any]) -> None:
        kind = step["type"]
        if kind == "Strip" and step["stop"]:
            # The tokenizers library panics on texts shorter than what is stripped, so there is nothing to agree with.
            raise ValueError("tokenizer has a decoder that strips the end of the text; it cannot be streamed")
        if kind == "Strip" and self._fused:
            self._factories.append(lambda: _StripText(step["content"], step["start"]))
        elif kind == "Fuse":
            self._fused = True
        elif self._fused:
            raise ValueError(f"tokenizer has the decoder {kind} after one that joins tokens; it cannot be streamed")
        elif kind == "ByteLevel" and not self._factories:
            self._byte_level = self._fused = True
            self._factories.append(_Bytes)
        elif kind == "ByteFallback":
            self._factories.append(_ByteFallback)
        else:
            change = _token_change(step)
            self._factories.append(lambda: _PerToken(change))

    def stages(self) -> list[_Stage]:
        """New stages, for one request."""
        return [factory() for factory in self._factories]

    def piece(self, token_id: int) -> str | None:
        """What the first stage takes for a token; None for special tokens and ids without a token."""
        try:
            return self._pieces[token_id]
        except KeyError:
            token = self._backend.id_to_token(token_id)
            if token is None or token in self._skipped:
                piece = None
            else:
                piece = _byte_level_text(token) if self._byte_level else token
            self._pieces[token_id] = piece
            return piece


class Detokenizer:
    """The text of one request's output, token by token."""

    def __init__(self, plan: DecoderPlan):
        self._plan = plan
        self._stages = plan.stages()

    def add(self, token_ids: Iterable[int]) -> str:
        """Takes the next tokens and returns the text that they make certain; may be empty."""
        pieces = [piece for token_id in token_ids if (piece := self._plan.piece(token_id)) is not None]
        for stage in self._stages:
            pieces = [text for piece in pieces for text in stage.feed(piece)]
        return "".join(pieces)

    def finish(self) -> str:
        """The text still held back, incomplete characters as U+FFFD. Nothing may be added afterwards."""
        pieces: list[str] = []
        for stage in self._stages:
            pieces = [text for piece in pieces for text in stage.feed(piece)]
            pieces.extend(stage.finish())
        return "".join(pieces)


def _token_change(step: dict[str, Any]) -> Callable[[str, bool], str]:
    match step:
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
            return lambda text, first: text.replace(pattern, content)
        case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}:
            return lambda text, first: text.replace(mark, "" if first and scheme != "never" else " ")
        case {"type": "Strip", "content": character, "start": count}:
            return lambda text, first: _StripText(character, count).feed(text)[0]
        case _:
            raise ValueError(
                f"tokenizer has the decoder {step['type']}, which cannot be streamed; supported are ByteLevel, "
                "ByteFallback, Fuse, Metaspace, Replace of a string, and Strip"
            )


def _byte_table() -> dict[str, int]:
    """GPT-2's table: the printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_table()


def _byte_level_text(token: str) -> str:
    """The bytes that a byte-level token stands for, as latin-1 text.

    A token with a character outside the table (added tokens such as " word") stands for its own UTF-8 bytes.
    """
    try:
        data = bytes(_BYTES[character] for character in token)
    except KeyError:
        data = token.encode()
    return data.decode("latin-1")
