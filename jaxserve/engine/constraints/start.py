"""Makes what compiles the grammars of an engine's requests, from its configuration."""

from __future__ import annotations

import functools

from jaxserve.config.settings import EngineConfig
from jaxserve.engine.constraints.compiled_grammars import CompiledGrammars
from jaxserve.engine.constraints.vocabulary import load_vocabulary


def start_grammars(config: EngineConfig, *, now: bool) -> CompiledGrammars | None:
    """Returns what compiles grammars; None for an engine without a tokenizer.

    Args:
        config: names the tokenizer.
        now: begins to read the vocabulary, beside whatever the caller does meanwhile. That holds the interpreter lock
            for up to a second, which no step should wait for. False leaves it to the first request that needs it.
    """
    directory = config.tokenizer or config.model
    if config.skip_tokenizer_init or directory is None:
        return None
    grammars = CompiledGrammars(functools.partial(load_vocabulary, directory), config.structured_outputs)
    if now:
        grammars.start()
    return grammars
