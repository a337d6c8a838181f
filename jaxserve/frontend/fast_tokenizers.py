"""Imports transformers' class for fast tokenizers, late and without its advice."""

from __future__ import annotations

import logging
from typing import Any


def fast_class() -> Any:
    """Returns PreTrainedTokenizerFast, imported late: transformers takes a second, which token id prompts need not pay.

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
    """Returns False for the advice to install torch, which nothing here needs."""
    return "PyTorch was not found" not in record.getMessage()
