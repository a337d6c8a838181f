"""Converts token ids to text as they arrive, at a constant cost per token.

A tokenizer's decoder is a chain of small steps over a list of tokens. `DecoderPlan` reads that chain from the tokenizer
and a `Detokenizer` runs the same steps one token at a time. Returned text is final: the deltas of a request,
concatenated, are exactly what `tokenizers.Tokenizer.decode(ids)` gives for prompt and output together beyond the text
of the prompt, for any ids.

Text is held back only while later tokens can still change it: the first bytes of a character, and, in tokenizers with
byte fallback (sentencepiece), a whole run of byte tokens, because such a decoder replaces every byte of a run that
turns out to be invalid.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import tokenizers

from jaxserve.frontend.decoder_stages import (
    ByteFallback,
    Ctc,
    PerToken,
    ReplaceText,
    Stage,
    StripStart,
    Utf8,
    Whole,
    WordEnd,
    byte_of,
    strip_start,
)

_log = logging.getLogger(__name__)

_PROMPT_TAIL = 16
"""Number of tokens with text at the end of the prompt that determine its continuation, except for a run of byte
tokens."""

_PROMPT_TAIL_LIMIT = 1024
"""Maximum number of prompt tokens that are examined."""


class DecoderPlan:
    """Holds what all detokenizers of a tokenizer share: the pieces of its ids and the stages of its decoder.

    Raises ValueError for a decoder that fails on some texts.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special = {token.content for token in added.values() if token.special}
        self.added = {token_id: token.content for token_id, token in added.items()}
        self._pieces: dict[int, str | None] = {}  # special tokens included
        self._shown_pieces: dict[int, str | None] = {}
        self._changes: list[Callable[[str], str]] = []  # the first steps, as far as they look at one token alone
        self._factories: list[Callable[[], Stage]] = []
        self._fused = False
        self.has_byte_fallback = False
        self._byte_level = False
        spec = json.loads(backend.to_str())["decoder"]
        if spec is None:
            self._factories.append(lambda: PerToken(lambda text, first: text if first else f" {text}"))
            return
        steps = _flat(spec)
        if any(step["type"] == "Strip" and step["stop"] for step in steps):
            # The tokenizers library panics on texts shorter than what is stripped, so there is nothing to agree with.
            raise ValueError("tokenizer has a decoder that strips the end of the text; it cannot be streamed")
        for index, step in enumerate(steps):
            rest = steps[index:]
            if not (self._add_joined(step) if self._fused else self._add_step(step, rest[1:])):
                self._add_whole(rest)
                return

    def _add_step(self, step: dict[str, Any], following: Sequence[dict[str, Any]]) -> bool:
        """Adds a step that takes single tokens; returns False when it cannot run token by token."""
        match step:
            case {"type": "Fuse"}:
                self._fused = True
            case {"type": "ByteLevel"}:
                self._byte_level = not self._factories and not self._changes
                self._add_change(_byte_level_text)
                self._factories.append(Utf8)
                self._fused = True
            case {"type": "ByteFallback"}:
                self._factories.append(ByteFallback)
                self.has_byte_fallback = True
            case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
                self._add_change(lambda text: text.replace(pattern, content))
            case {"type": "Replace"}:
                decoder = _library_decoder([step])
                self._add_change(lambda text: decoder.decode([text]))
            case {"type": "Strip", "content": character, "start": count}:
                self._add_change(lambda text: strip_start(text, character, count))
            case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}:
                never = scheme == "never"
                self._add_first(lambda text, first: text.replace(mark, "" if first and not never else " "))
            case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup}:
                clean = _clean if cleanup else _same
                self._add_first(lambda text, first: clean(text if first else _after_word(text, prefix)))
            case {"type": "CTC", "pad_token": pad, "word_delimiter_token": delimiter, "cleanup": cleanup}:
                change = functools.partial(_replaced, replace=_ctc_replace(pad, delimiter, cleanup))
                self._factories.append(lambda: Ctc(change))
            case {"type": "BPEDecoder", "suffix": suffix} if suffix and (
                not following or following[0]["type"] == "Fuse"
            ):
                self._factories.append(lambda: WordEnd(suffix))
            case _:
                return False
        return True

    def _add_joined(self, step: dict[str, Any]) -> bool:
        """Adds a step behind one that joins all tokens to one; returns False when it cannot run piece by piece."""
        replace: Sequence[tuple[str, str]] = ()
        match step:
            case {"type": "Fuse"}:
                return True
            case {"type": "Strip", "content": character, "start": count}:
                self._factories.append(lambda: StripStart(character, count))
                return True
            case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
                replace = [(pattern, content)]
            case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}:
                replace = [(mark, " " if scheme == "never" else "")]
            case {"type": "WordPiece", "cleanup": cleanup}:
                replace = _CLEANUP if cleanup else ()
            case {"type": "CTC", "pad_token": pad, "word_delimiter_token": delimiter, "cleanup": cleanup}:
                replace = _ctc_replace(pad, delimiter, cleanup)
            case {"type": "BPEDecoder", "suffix": suffix}:
                replace = [(suffix, "")]
            case _:
                return False
        if not all(pattern for pattern, _ in replace):
            return False
        for pattern, content in replace:
            self._factories.append(lambda pattern=pattern, content=content: ReplaceText(pattern, content))
        return True

    def _add_change(self, change: Callable[[str], str]) -> None:
        if self._factories:
            self._add_first(lambda text, first: change(text))
        else:
            self._changes.append(change)

    def _add_first(self, change: Callable[[str, bool], str]) -> None:
        self._factories.append(lambda: PerToken(change))

    def _add_whole(self, steps: Sequence[dict[str, Any]]) -> None:
        decoder, fused = _library_decoder(steps), self._fused
        self._factories.append(lambda: Whole(decoder, fused))
        _log.warning(
            "the tokenizer's decoder %s cannot run token by token: the text of a request comes when it ends, and stop "
            "strings are found then",
            steps[0]["type"],
        )

    def stages(self) -> list[Stage]:
        """Returns new stages, for one request."""
        return [factory() for factory in self._factories]

    def piece(self, token_id: int) -> str | None:
        """Returns the first stage's input for a token; None for ids without a token."""
        try:
            return self._pieces[token_id]
        except KeyError:
            piece = self._backend.id_to_token(token_id)
            if piece is not None:
                for change in self._changes:
                    piece = change(piece)
            self._pieces[token_id] = piece
            return piece

    def shown_piece(self, token_id: int) -> str | None:
        """Returns the result of `piece`, but None for special tokens, which are not shown."""
        try:
            return self._shown_pieces[token_id]
        except KeyError:
            special = self._backend.id_to_token(token_id) in self._special
            piece = self._shown_pieces[token_id] = None if special else self.piece(token_id)
            return piece

    def token_bytes(self, token_id: int) -> bytes | None:
        """Returns the bytes that a token alone stands for, which may be a part of a character; None where it stands for
        text, or for nothing."""
        piece = self.piece(token_id)
        if piece is None:
            return None
        if self._byte_level:
            return piece.encode("latin-1")
        byte = byte_of(piece) if self.has_byte_fallback else None
        return None if byte is None else bytes([byte])


class Detokenizer:
    """Detokenizes one request's output token by token: the text of all tokens beyond that of the prompt.

    The text of the prompt is that of its tokens without an incomplete character at its end, which belongs to the
    output, where it is completed or becomes U+FFFD.

    Args:
        skip_special_tokens: special tokens give no text, as in the text that is shown.
        spaces_between_special_tokens: where False, and special tokens are not skipped, an added token behind an added
            one is its content alone, without the space that the decoder may put before a token (vLLM's meaning).
    """

    def __init__(
        self,
        plan: DecoderPlan,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ):
        self._plan = plan
        self._skips = skip_special_tokens
        self._piece = _piece_of(plan, skip_special_tokens)
        self._joins_added = not (skip_special_tokens or spaces_between_special_tokens)
        self._after_added = False
        self._stages = plan.stages()
        if prompt_token_ids:
            self._end(self._prompt_tail(prompt_token_ids), of_prompt=True)

    def _prompt_tail(self, token_ids: Sequence[int]) -> list[str]:
        """Returns the pieces of the prompt's last tokens that put the stages into the state after the whole prompt."""
        tail: list[str] = []
        for token_id in reversed(token_ids[-_PROMPT_TAIL_LIMIT:]):
            piece = self._piece(token_id)
            if piece is None:
                continue
            if len(tail) >= _PROMPT_TAIL and not (self._plan.has_byte_fallback and byte_of(piece) is not None):
                break
            tail.append(piece)
        else:
            if len(token_ids) > _PROMPT_TAIL_LIMIT:
                # The run of byte tokens goes on before: a character that begins there would make it invalid here.
                while tail and 0x80 <= (byte_of(tail[-1]) or 0) < 0xC0:
                    tail.pop()
        tail.reverse()
        return tail

    def add(self, token_ids: Iterable[int]) -> str:
        """Takes the next tokens and returns the text that they make final; may be empty."""
        return "".join([self.add_token(token_id) for token_id in token_ids])

    def add_token(self, token_id: int) -> str:
        """Does the same as `add` for one token."""
        piece = self._piece(token_id)
        if piece is None:
            return ""
        pieces: Sequence[str] = (piece,)
        for stage in self._stages:
            if len(pieces) == 1:
                pieces = stage.feed(pieces[0])
            else:
                pieces = [text for piece in pieces for text in stage.feed(piece)]
        text = pieces[0] if len(pieces) == 1 else "".join(pieces)
        return self._without_space(token_id, text) if self._joins_added else text

    def _without_space(self, token_id: int, text: str) -> str:
        """Returns the text of a token without the space that stands between two added tokens."""
        content, after_added = self._plan.added.get(token_id), self._after_added
        self._after_added = content is not None
        return content if content is not None and after_added and text == f" {content}" else text

    def finish(self) -> str:
        """Returns the text still held back, incomplete characters as U+FFFD. Nothing may be added afterwards."""
        return self._end()

    def peek(self) -> str:
        """Returns the result of `finish` without ending the text."""
        return self.copy().finish()

    def leaves_out(self, token_id: int) -> bool:
        """Returns whether a token has a text that is left out here, since it is special."""
        return self._skips and self._plan.shown_piece(token_id) is None and self._plan.piece(token_id) is not None

    def copy(self, *, skip_special_tokens: bool = True) -> Self:
        """Returns an independent detokenizer in the same state."""
        other = object.__new__(type(self))
        other._plan, other._piece = self._plan, _piece_of(self._plan, skip_special_tokens)
        other._skips = skip_special_tokens
        other._joins_added, other._after_added = self._joins_added, self._after_added
        other._stages = [stage.copy() for stage in self._stages]
        return other

    def goes_on_like(self, other: Detokenizer) -> bool:
        """Returns whether both give the same text for any continuation, special tokens aside."""
        return self._stages == other._stages

    def _end(self, pieces: Iterable[str] = (), of_prompt: bool = False) -> str:
        """Feeds pieces and then ends the text of each stage in order; returns all text that becomes final."""
        for stage in self._stages:
            pieces = [text for piece in pieces for text in stage.feed(piece)]
            pieces.extend(stage.end_prompt() if of_prompt else stage.finish())
        return "".join(pieces)


def _piece_of(plan: DecoderPlan, skip_special_tokens: bool) -> Callable[[int], str | None]:
    return plan.shown_piece if skip_special_tokens else plan.piece


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the single steps of a decoder."""
    return [inner for one in step["decoders"] for inner in _flat(one)] if step["type"] == "Sequence" else [step]


def _library_decoder(steps: Sequence[dict[str, Any]]) -> Any:
    """Returns the tokenizers library's own decoder of these steps."""
    spec = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    spec["decoder"] = {"type": "Sequence", "decoders": list(steps)}
    return tokenizers.Tokenizer.from_str(json.dumps(spec)).decoder


_CLEANUP = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    *((f" {end}", end) for end in ("'s", "'ve", "'re")),
)
"""Replacements of the library's WordPiece and CTC decoders in English text, in this order."""


def _ctc_replace(pad: str, delimiter: str, cleanup: bool) -> list[tuple[str, str]]:
    return [(pad, ""), *([*_CLEANUP, (delimiter, " ")] if cleanup else ())]


def _replaced(text: str, replace: Iterable[tuple[str, str]]) -> str:
    for pattern, content in replace:
        text = text.replace(pattern, content)
    return text


def _clean(text: str) -> str:
    return _replaced(text, _CLEANUP)


def _same(text: str) -> str:
    return text


def _after_word(token: str, prefix: str) -> str:
    """Returns the text of a WordPiece token that is not the first: with `prefix` it goes on with the word before."""
    return token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"


def _byte_table() -> dict[str, int]:
    """Returns GPT-2's table: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_table()


def _byte_level_text(token: str) -> str:
    """Returns the bytes that a byte-level token stands for, as latin-1 text.

    A token with a character outside the table (added tokens such as " word") stands for its own UTF-8 bytes.
    """
    try:
        data = bytes(_BYTES[character] for character in token)
    except KeyError:
        data = token.encode()
    return data.decode("latin-1")
