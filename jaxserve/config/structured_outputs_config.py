"""Bounds grammars of structured outputs, as a frozen dataclass that validates itself. Standard library only."""

from __future__ import annotations

import dataclasses

from jaxserve.config.checks import at_least, between


@dataclasses.dataclass(frozen=True)
class StructuredOutputsConfig:
    """Bounds what the grammars of requests may cost, and how they are computed.

    max_grammar_bytes: of a schema, regular expression or grammar. max_grammar_depth: how deep its brackets may nest.
    max_grammar_seconds: CPU time in which it must be translated and compiled. max_grammar_memory: MiB that this may
    take.
    grammar_processes: processes that check grammars at one time; they start with the first grammars.
    max_checked_grammars: grammars whose check the front end remembers. max_compiled_grammars: compiled grammars that
    the engine keeps; those that were not used for longest are compiled again.
    grammar_threads: threads that compile grammars in the engine. mask_threads: threads that compute masks; None is four
    fifths of the cores.
    """

    max_grammar_bytes: int = 128 * 1024
    max_grammar_depth: int = 100
    max_grammar_seconds: float = 1.0
    max_grammar_memory: int = 512
    grammar_processes: int = 2
    max_checked_grammars: int = 256
    max_compiled_grammars: int = 128
    grammar_threads: int = 2
    mask_threads: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "max_grammar_seconds":
                between(field.name, value, 0.01, 60.0)
            elif field.name != "mask_threads" or value is not None:
                at_least(field.name, value, 1)
