"""Text to token ids and back, with the tokenizer of a Hugging Face checkpoint directory.

Only files of that directory are read: no network, and no code of the checkpoint runs.
"""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from jaxserve.config import EngineConfig
from jaxserve.frontend.detokenizer import DecoderPlan, Detokenizer
from models.config import check_directory

_OTHER_FORMATS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "tiktoken.model")


class Tokenizer:
    """The tokenizer in `directory`: tokenizer.json, with the special tokens and chat template of its configuration.

    A directory without tokenizer.json but with an older format is converted by transformers where it can be.
    Raises ValueError, one line that names the file, when the tokenizer is missing, corrupt or cannot be streamed.
    Encoding and decoding are thread-safe.
    """

    def __init__(self, directory: str | pathlib.Path):
        self._directory = pathlib.Path(directory)
        self._transformers = _load(self._directory)
        self._backend: tokenizers.Tokenizer = self._transformers.backend_tokenizer
        # tokenizer.json may carry the training run's truncation and padding; a prompt is never cut or padded.
        self._backend.no_truncation()
        self._backend.no_padding()
        try:
            self._plan = DecoderPlan(self._backend)
        except ValueError as error:
            raise ValueError(f"{self._directory / 'tokenizer.json'}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Token ids are below this, added tokens included; the model's vocabulary may be larger (padding)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._transformers.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens (such as <bos>) that the tokenizer itself puts around a text.

        Raises ValueError when the text holds a lone surrogate, that is, came from invalid UTF-8 or UTF-16.
        """
        _check_text(text)
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no valid UTF-8 become U+FFFD. Ids without a token give no text.

        Raises ValueError when an id is negative or over 2^32 - 1.
        """
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < 2**32:
                raise ValueError(f"token_ids[{index}] is {token_id}; token ids must be from 0 to {2**32 - 1}")
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """Returns a new incremental detokenizer, for the output of one request."""
        return Detokenizer(self._plan, prompt_token_ids, skip_special_tokens=skip_special_tokens)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation in the checkpoint's chat template, up to where the assistant's answer begins.

        The template runs in the sandbox of transformers. Raises ValueError without a template, or when it fails.
        """
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text that `encode_chat` encodes."""
        if not self.has_chat_template:
            raise ValueError("messages cannot be used: the tokenizer has no chat template; send a prompt instead")
        try:
            text = self._transformers.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever a template raises is this request's failure, never the server's
            raise ValueError(f"messages do not fit the chat template: {_one_line(error)}") from error
        return text


def _load(directory: pathlib.Path) -> Any:
    """The tokenizer as a PreTrainedTokenizerFast."""
    if not directory.is_dir():
        raise ValueError(f"tokenizer directory {str(directory)!r} does not exist; set EngineConfig.tokenizer")
    path = directory / "tokenizer.json"
    _check_json(directory / "tokenizer_config.json")
    _check_json(directory / "special_tokens_map.json")
    if not path.is_file():
        if any((directory / name).is_file() for name in _OTHER_FORMATS):
            return _convert(directory)
        raise ValueError(f"tokenizer file {str(path)!r} does not exist")
    try:
        tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the bindings raise Exception itself
        raise ValueError(f"tokenizer file {str(path)!r} cannot be read: {_one_line(error)}") from error
    try:
        return _fast_class().from_pretrained(str(directory), local_files_only=True)
    except Exception as error:
        raise ValueError(f"tokenizer in {str(directory)!r} cannot be loaded: {_one_line(error)}") from error


def _fast_class() -> Any:
    """PreTrainedTokenizerFast, imported late: transformers takes a second, which token id prompts need not pay.

    AutoTokenizer would take seconds more, because it imports torch where torch is installed.
    """
    advice = logging.getLogger("transformers")
    advice.addFilter(_is_not_advice)
    try:
        from transformers import PreTrainedTokenizerFast
    finally:
        advice.removeFilter(_is_not_advice)
    return PreTrainedTokenizerFast


def _is_not_advice(record: logging.LogRecord) -> bool:
    """False for the advice to install torch, which nothing here needs."""
    return "PyTorch was not found" not in record.getMessage()


def _convert(directory: pathlib.Path) -> Any:
    """Converts an older tokenizer format; this may need packages such as sentencepiece, which the error then names."""
    _fast_class()  # for its filter of the advice to install torch
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except Exception as error:
        raise ValueError(
            f"tokenizer file {str(directory / 'tokenizer.json')!r} does not exist, and the older format in its place "
            f"cannot be converted: {_one_line(error)}"
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
        raise ValueError(f"tokenizer file {str(path)!r} cannot be read: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"tokenizer file {str(path)!r} does not hold a JSON object")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prompt has a lone surrogate at character {error.start}; text must be valid Unicode"
        ) from error


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The tokenizer that a configuration names; None with skip_tokenizer_init or when there is no directory to read.

    Raises ValueError as `Tokenizer` does, and where the model's own directory does not exist or its `config.json` is
    faulty.
    """
    directory = config.tokenizer or config.model
    if config.skip_tokenizer_init or directory is None:
        return None
    if config.tokenizer is None and not pathlib.Path(directory).is_dir():
        raise ValueError(
            f"model directory {directory!r} does not exist; set EngineConfig.model (model= in Python) to the directory "
            "of a checkpoint"
        )
    if config.model is not None and config.load_format != "dummy":
        check_directory(config.model)
    return Tokenizer(directory)
