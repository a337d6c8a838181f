"""Bounds what llguidance may spend on a grammar, alike where it is checked and where it is used."""

from __future__ import annotations

import llguidance

_SYMBOLS = 300_000
_LEXER_STATES = 50_000
"""Of one grammar, all of its requests together; a state takes one or two kilobytes."""


def parser_limits() -> llguidance.LLParserLimits:
    """Returns the limits of one grammar: its size, the work of compiling it (about 20 ms) and of one mask (about 15 ms)
    and the memory of its lexer. Errors do not repeat the grammar."""
    return llguidance.LLParserLimits(
        max_grammar_size=_SYMBOLS,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=_LEXER_STATES,
        verbose_errors=False,
    )


def first_line(error: str) -> str:
    """Returns what an error of llguidance says first, in at most 300 characters."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return (lines[0] if lines else "unknown error")[:300]
