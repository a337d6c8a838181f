"""Compiles the grammars of requests in threads of their own, and keeps the ones used last."""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import llguidance

from jaxserve.config.structured_outputs_config import StructuredOutputsConfig
from jaxserve.engine.constraints.limits import first_line, parser_limits
from jaxserve.engine.constraints.vocabulary import Vocabulary


class CompiledGrammars:
    """Compiles grammars. For one thread, the engine's; compilation itself lets go of the interpreter lock.

    A compiled grammar is shared by all of its requests, with the states of its lexer. Those that were not used for
    longest are dropped, and live on in the requests that use them.

    Args:
        load: reads the vocabulary; called once, in a thread, by `start` or with the first grammar.
        config: how many are kept, and the number of threads.
    """

    def __init__(self, load: Callable[[], Vocabulary], config: StructuredOutputsConfig):
        self._load = load
        self._most = config.max_compiled_grammars
        self._threads = ThreadPoolExecutor(config.grammar_threads, thread_name_prefix="grammar")
        self._vocabulary: Future[Vocabulary] | None = None
        self._compiled: collections.OrderedDict[str, Future[llguidance.LLMatcher]] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._compiled)

    def start(self) -> None:
        """Begins to read the vocabulary, so that no request waits for it."""
        if self._vocabulary is None:
            self._vocabulary = self._threads.submit(self._load)

    @property
    def vocabulary(self) -> Vocabulary:
        """Returns the vocabulary, which a compiled grammar implies."""
        assert self._vocabulary is not None, "no grammar was compiled"
        return self._vocabulary.result()

    def get(self, grammar: str) -> Future[llguidance.LLMatcher]:
        """Returns a grammar's matcher at its start, of which each request takes a copy, or what it will be. Its error
        is a ValueError."""
        self.start()
        found = self._compiled.get(grammar)
        if found is None or (found.done() and found.exception() is not None):
            found = self._compiled[grammar] = self._threads.submit(self._compile, grammar)
        self._compiled.move_to_end(grammar)
        while len(self._compiled) > self._most:
            self._compiled.popitem(last=False)
        return found

    def drop(self, grammar: str) -> None:
        """Forgets a compiled grammar, which is compiled anew for the next request."""
        self._compiled.pop(grammar, None)

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self.vocabulary.tokenizer, grammar, log_level=0, limits=parser_limits())
        if matcher.is_error():
            raise ValueError(f"structured_outputs cannot be compiled: {first_line(matcher.get_error())}")
        return matcher
