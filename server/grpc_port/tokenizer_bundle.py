"""Packs the files of a tokenizer into a zip, for gateways that encode and decode by themselves."""

from __future__ import annotations

import io
import pathlib
import zipfile

from jaxserve.frontend.tokenizer import Tokenizer

_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
)
_PATTERNS = ("*.jinja", "*.model", "*.tiktoken")
_WRITTEN = (1980, 1, 1, 0, 0, 0)  # equal files are an equal zip, whichever machine they are on


def tokenizer_zip(tokenizer: Tokenizer) -> bytes:
    """Returns the zip: the files of the tokenizer's directory that say how to encode, decode and apply the chat
    template, and the model's configuration.

    Where the directory's tokenizer.json would encode otherwise than the server does, one that does not takes its place.
    Takes seconds for a large tokenizer. Raises OSError when a file cannot be read.
    """
    directory = tokenizer.directory
    own = tokenizer.own_json()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        if own is not None:
            _add(archive, "tokenizer.json", own.encode())
        for path in _files(directory):
            if own is None or path.name != "tokenizer.json":
                _add(archive, path.name, path.read_bytes())
    return buffer.getvalue()


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    names = {name for pattern in _PATTERNS for name in (path.name for path in directory.glob(pattern))} | set(_NAMES)
    return [directory / name for name in sorted(names) if (directory / name).is_file()]


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, _WRITTEN), content, zipfile.ZIP_DEFLATED)
