"""Encodes text and decodes token ids with the tokenizer of a Hugging Face checkpoint directory.

Only files of that directory are read: no network access, and no code of the checkpoint runs.
"""

from __future__ import annotations

import array
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import tokenizers

from jaxserve.config.chat_config import ChatConfig
from jaxserve.config.id_checks import first_wrong_id
from jaxserve.config.settings import EngineConfig
from jaxserve.config.shown import shown
from jaxserve.frontend.chat_format import ChatFormat
from jaxserve.frontend.chat_text import ChatTexts, RenderedText
from jaxserve.frontend.detokenizer import DecoderPlan, Detokenizer
from jaxserve.frontend.encoding import Encoder
from jaxserve.frontend.fast_tokenizers import fast_class
from jaxserve.frontend.preparation_steps import Steps, finish
from jaxserve.frontend.template import TemplateRenderer, one_line
from jaxserve.frontend.tokenizer_process import CHARACTERS_PER_PART, LONG_IDS, LONG_TEXT, TokenizerProcess
from jaxserve.models.config import check_config_file
from jaxserve.models.loading.older_tokenizers import has_older_format

_log = logging.getLogger(__name__)


class Tokenizer:
    """Wraps the tokenizer in `directory`: tokenizer.json, with its special tokens and chat template.

    A directory without tokenizer.json but with an older format is converted by transformers where it can be. Encoding
    and decoding are thread-safe.

    Args:
        directory: the checkpoint's.
        chat: how conversations become prompts, and outputs replies.

    Raises:
        ValueError: one line that names the file, when the tokenizer is missing, corrupt or cannot be streamed, or the
            file of a chat template cannot be read; or that names a setting of `chat`.
    """

    def __init__(self, directory: str | pathlib.Path, chat: ChatConfig = ChatConfig()):
        self._directory = pathlib.Path(directory)
        self._transformers = _load(self._directory)
        self._backend: tokenizers.Tokenizer = self._transformers.backend_tokenizer
        self._cuts_or_pads = bool(self._backend.truncation or self._backend.padding)
        # tokenizer.json may carry the training run's truncation and padding; a prompt is never cut or padded.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._encoder = Encoder(self._backend)
        self._process: TokenizerProcess | None = None
        self._renderer = TemplateRenderer()
        self._chat_texts = ChatTexts(self._backend)
        if chat.chat_template is not None:
            self._transformers.chat_template = _template_of(chat.chat_template)
        self._special_ids = {
            token.content: token_id
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        }
        self.chat_format = ChatFormat(chat, _all_templates(self._transformers.chat_template), self._special_ids)
        self._token_texts: dict[int, str] = {}  # as many as there are ids
        try:
            self._plan = DecoderPlan(self._backend)
        except ValueError as error:
            raise ValueError(f"{self._directory / 'tokenizer.json'}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Exclusive upper bound of token ids, added tokens included; the model's vocabulary may be larger (padding)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def directory(self) -> pathlib.Path:
        """The directory that it was loaded from."""
        return self._directory

    @property
    def bos_token_id(self) -> int | None:
        return self._transformers.bos_token_id

    @property
    def pad_token_id(self) -> int | None:
        return self._transformers.pad_token_id

    def own_json(self) -> str | None:
        """Returns the tokenizer.json that encodes as this tokenizer does, where the directory's does not: where there
        is none, or one that cuts or pads. None where the directory's does.
        """
        if (self._directory / "tokenizer.json").is_file() and not self._cuts_or_pads:
            return None
        return self._backend.to_str()

    @property
    def has_chat_template(self) -> bool:
        return self._transformers.chat_template is not None

    def take_long_texts_apart(self) -> None:
        """From now on encodes and decodes long texts in a process of their own, which the first of them starts."""
        self._process = self._process or TokenizerProcess(self._backend)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of `text`, with the special tokens (such as <bos>) that the tokenizer puts around a
        text.

        Raises ValueError when the text holds a lone surrogate, that is, came from invalid UTF-8 or UTF-16.
        """
        token_ids: list[int] = []
        finish(self.encode_steps(text, lambda more, _: token_ids.extend(more), add_special_tokens))
        return token_ids

    def encode_steps(
        self, text: str, take: Callable[[list[int], int], object], add_special_tokens: bool = True
    ) -> Steps[None]:
        """Encodes as `encode` does, in steps of bounded size where the text allows it.

        Args:
            text: the text. In a `RenderedText` only the special tokens of its template are tokens.
            take: called with token ids, in order and no more than IDS_PER_PART at a time, and the fewest tokens that
                can follow; for the first time before the first step, without ids. An exception of it ends the work.
        """
        encoder = self._encoder
        apart = self._process if len(text) > LONG_TEXT else None
        if isinstance(text, RenderedText) and text.renamed is not None:
            encoder, text, apart = self._chat_texts.encoder, text.renamed, None
        bound = encoder.bound
        take([], bound.of_size(len(text)))
        yield 0
        take([], bound.of_text(_bytes(text)))
        pieces = encoder.pieces(text)
        piece, following = next(pieces)
        if not following:
            yield len(piece)
            for token_ids in encoder.parts(piece, add_special_tokens, apart):
                take(token_ids, 0)
            return
        before, behind = encoder.around if add_special_tokens else ([], [])
        take(before, bound.of_size(len(text)))
        while True:
            yield len(piece)
            for token_ids in encoder.parts(piece, False, apart):
                take(token_ids, bound.of_size(following))
            if not following:
                break
            piece, following = next(pieces)
        take(behind, 0)

    def least_tokens(self, num_bytes: int) -> int:
        """Returns the fewest tokens that a text of at least `num_bytes` bytes (UTF-8) can have; 0 where nothing is
        known.
        """
        return self._encoder.bound.of_size(num_bytes)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids; bytes that are no valid UTF-8 become U+FFFD. Ids without a token give no text.

        Raises ValueError when an id is negative or over 2^32 - 1.
        """
        parts: list[str] = []
        finish(self.decode_steps(token_ids, parts.append, skip_special_tokens=skip_special_tokens))
        return "".join(parts)

    def decode_steps(
        self,
        token_ids: Sequence[int] | np.ndarray,
        take: Callable[[str], object],
        vocab_size: int = 2**32,
        skip_special_tokens: bool = True,
    ) -> Steps[None]:
        """Decodes as `decode` does, in steps.

        Args:
            token_ids: a million cost a hundredth of the time in an array of numpy.
            take: called with parts of the text, in order and no more than CHARACTERS_PER_PART at a time.

        Raises ValueError when an id is no whole number, negative, or not below vocab_size.
        """
        checked = array.array("I")
        for start in range(0, len(token_ids), LONG_IDS):
            yield 0
            part = token_ids[start : start + LONG_IDS]
            if (index := _first_wrong_id(part, vocab_size)) is not None:
                value: Any = part[index].item() if isinstance(part, np.ndarray) else part[index]
                is_number = isinstance(value, int) and not isinstance(value, bool)
                words = f"token ids must be from 0 to {vocab_size - 1}" if is_number else "it must be a whole number"
                raise ValueError(f"token_ids[{start + index}] is {shown(value)}; {words}")
            if isinstance(part, np.ndarray):
                checked.frombytes(part.astype(np.uint32).tobytes())
            else:
                checked.extend(part)
        yield 0
        apart = self._process if len(checked) > LONG_IDS else None
        parts = None if apart is None else apart.decode(checked, skip_special_tokens)
        if parts is None:
            # Unlike `decode`, it lets go of the interpreter lock.
            text = self._backend.decode_batch([checked.tolist()], skip_special_tokens=skip_special_tokens)[0]
            size = CHARACTERS_PER_PART
            parts = [text[start : start + size] for start in range(0, len(text), size)]
        for part in parts:
            take(part)

    def detokenizer(
        self,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        shown_token_ids: Set[int] = frozenset(),
    ) -> Detokenizer:
        """Returns a new incremental detokenizer, for the output of one request."""
        return Detokenizer(
            self._plan,
            prompt_token_ids,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
            shown_token_ids=shown_token_ids,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Returns the token ids of a conversation in the chat template.

        The template runs in the sandbox of transformers, in a process of its own, within a budget of time, output and
        memory. Arguments are as for `TemplateRenderer.render`. Special tokens that the messages or arguments spell stay
        text (see chat_text.py).

        Raises ValueError without a template, when it fails, and when it exceeds its budget.
        """
        text = self.render_chat(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> RenderedText:
        """Returns the text that `encode_chat` encodes."""
        template = self._template(has_tools=bool(tools))
        marker, (marked, marked_tools, given) = self._chat_texts.mark(template, messages, tools, template_kwargs or {})
        text = self._renderer.render(
            template,
            marked,
            self._transformers.special_tokens_map,
            tools=marked_tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=given,
        )
        return self._chat_texts.unmark(text, marker)

    def warm_chat(self) -> None:
        """Starts the process for chat templates, so that the first conversation does not wait for it. May block."""
        if self.has_chat_template:
            self._renderer.warm()

    def token_text(self, token_id: int) -> str:
        """Returns the text of one token on its own, special or not; bytes that are no character become U+FFFD."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._backend.decode([token_id], skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of one token on its own, which may be a part of a character."""
        found = self._plan.token_bytes(token_id)
        return self.token_text(token_id).encode() if found is None else found

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Returns the tokens as the vocabulary spells them; "" for ids without a token."""
        return [self._backend.id_to_token(token_id) or "" for token_id in token_ids]

    def _template(self, has_tools: bool) -> str:
        """Returns the chat template; of several the one for conversations with tools or without."""
        if not self.has_chat_template:
            raise ValueError("messages cannot be used: the tokenizer has no chat template; send a prompt instead")
        try:
            return self._transformers.get_chat_template(tools=[{}] if has_tools else None)
        except Exception as error:  # several templates, and none is the default
            raise ValueError(f"messages cannot be used: {one_line(error)}") from error


def _first_wrong_id(token_ids: Sequence[int] | np.ndarray, vocab_size: int) -> int | None:
    """Returns what `first_wrong_id` does, for an array too."""
    if not isinstance(token_ids, np.ndarray):
        return first_wrong_id(token_ids, vocab_size)
    wrong = np.flatnonzero((token_ids < 0) | (token_ids >= vocab_size))
    return int(wrong[0]) if len(wrong) else None


def _template_of(path: str) -> str:
    """Reads the file of a chat template. Raises ValueError."""
    try:
        return pathlib.Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat_template is {path!r}; the file cannot be read: {one_line(error)}") from error


def _all_templates(template: Any) -> str:
    """Returns the source of a tokenizer's chat templates, of which it may have several by name."""
    return "\n".join(template.values()) if isinstance(template, Mapping) else template or ""


def _load(directory: pathlib.Path) -> Any:
    """Loads the tokenizer as a PreTrainedTokenizerFast."""
    if not directory.is_dir():
        raise ValueError(f"tokenizer directory {str(directory)!r} does not exist; set EngineConfig.tokenizer")
    path = directory / "tokenizer.json"
    _check_json(directory / "tokenizer_config.json")
    _check_json(directory / "special_tokens_map.json")
    if not path.is_file():
        if has_older_format(directory):
            return _convert(directory)
        raise ValueError(f"tokenizer file {str(path)!r} does not exist")
    try:
        tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the bindings raise Exception itself
        raise ValueError(f"tokenizer file {str(path)!r} cannot be read: {one_line(error)}") from error
    try:
        return fast_class().from_pretrained(str(directory), local_files_only=True)
    except Exception as error:
        raise ValueError(f"tokenizer in {str(directory)!r} cannot be loaded: {one_line(error)}") from error


def _convert(directory: pathlib.Path) -> Any:
    """Converts an older tokenizer format; this may need packages such as sentencepiece, which the error then names."""
    fast_class()  # for its filter of the advice to install torch
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except Exception as error:
        raise ValueError(
            f"tokenizer file {str(directory / 'tokenizer.json')!r} does not exist, and the older format in its place "
            f"cannot be converted: {one_line(error)}"
        ) from error
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), tokenizers.Tokenizer):
        raise ValueError(f"tokenizer in {str(directory)!r} has no fast form; convert it to tokenizer.json first")
    return tokenizer


def _check_json(path: pathlib.Path) -> None:
    if not path.is_file():
        return
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer file {str(path)!r} cannot be read: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"tokenizer file {str(path)!r} does not hold a JSON object")


def _bytes(text: str) -> bytes:
    """Encodes the text as UTF-8. Raises ValueError for text that is not valid."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prompt has a lone surrogate at character {error.start}; text must be valid Unicode"
        ) from error


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """Loads the tokenizer that a configuration names; None with skip_tokenizer_init or without a directory.

    Raises ValueError as `Tokenizer` does, and where the model's own directory does not exist or its `config.json` is
    faulty, or where a tokenizer that had to be converted has more tokens than the model.
    """
    directory = config.tokenizer or config.model
    if config.skip_tokenizer_init or directory is None:
        return None
    if config.tokenizer is None and not pathlib.Path(directory).is_dir():
        raise ValueError(
            f"model directory {directory!r} does not exist; set EngineConfig.model (model= in Python) to the directory "
            "of a checkpoint"
        )
    model = None
    if config.model is not None and config.load_format != "dummy":
        model = check_config_file(config.model)
    tokenizer = Tokenizer(directory, config.chat)
    for line in tokenizer.chat_format.lines():
        _log.info("%s", line)
    # What tokenizer.json has is compared with the rest of the checkpoint; conversion may add tokens that no file has.
    converted = not (pathlib.Path(directory) / "tokenizer.json").is_file()
    if model is not None and converted and tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"tokenizer in {directory!r}, converted from an older format, has {tokenizer.vocab_size} tokens; the "
            f"model's vocabulary (vocab_size) has {model.vocab_size} tokens, and must have as many: set "
            "EngineConfig.tokenizer to the directory of the model's own, or skip_tokenizer_init for prompts of ids"
        )
    return tokenizer
