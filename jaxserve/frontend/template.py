"""Renders chat templates within a budget, in a separate process that is ended when it exceeds it.

A template is a program of the checkpoint, and its cost may grow with a client's messages. The sandbox of transformers
keeps it from reaching anything, but not from running on, nor from allocating all memory in one operation: no thread of
this process could stop that. The process starts with the first conversation.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.config.shown import clipped, shown
from jaxserve.frontend.worker_process import WorkerProcess

_START_SECONDS = 60.0
"""Maximum seconds that the process takes to start; it imports transformers."""
_WALL_FACTOR = 5.0
"""Wall-clock seconds per second of CPU time: the machine may be busy."""
_MAX_ERROR = 500
_RESERVED = frozenset(
    "add_generation_prompt chat_template continue_final_message conversation documents max_length messages padding "
    "return_assistant_tokens_mask return_dict return_tensors self tokenize tokenizer_kwargs tools truncation".split()
)
"""Names of the template's own arguments, and of how transformers is to call it."""


class TemplateProcessError(ChildProcessError):
    """The process for chat templates cannot be started, for any conversation."""


@dataclasses.dataclass(frozen=True)
class TemplateBudget:
    """Bounds one conversation: seconds of CPU time, characters of output, bytes of memory beyond the start."""

    seconds: float = 2.0
    characters: int = 16 * 1024 * 1024
    memory: int = 512 * 1024 * 1024


class TemplateRenderer:
    """Renders conversations, one after another. Thread-safe."""

    def __init__(self, budget: TemplateBudget | None = None):
        self._budget = budget or TemplateBudget()
        self._lock = threading.Lock()
        self._worker: WorkerProcess | None = None

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders a conversation.

        Args:
            special_tokens: texts that the template may use, such as bos_token.
            add_generation_prompt: whether the text ends with what an answer begins with, where the template has it.
            template_kwargs: what the template may use besides, by name.

        Raises:
            ValueError: one line, when the template raises an error or exceeds the budget, and for names in
                template_kwargs that are not the client's to choose.
            TemplateProcessError: the process does not start.
        """
        special, given = dict(special_tokens or {}), dict(template_kwargs or {})
        for name in given:
            if name in _RESERVED or name in special:
                raise ValueError(
                    f"chat_template_kwargs has {shown(name)}, which is not for requests to set; leave it out"
                )
        request = json.dumps(
            {
                "template": template,
                "messages": [dict(message) for message in messages],
                "add_generation_prompt": add_generation_prompt,
                "names": given | special,
            }
        ).encode()
        with self._lock:
            answer, fault = self._ask(request)
            if fault:  # others end processes, too: the system that runs out of memory, an operator
                answer, fault = self._ask(request)
        if answer is None:
            seconds = self._budget.seconds
            raise ValueError(fault or f"the chat template takes more than its budget of {seconds:g} s for messages")
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def warm(self) -> None:
        """Starts the process. Raises TemplateProcessError."""
        with self._lock:
            self._worker = self._worker or self._start()

    def _ask(self, request: bytes) -> tuple[dict[str, Any] | None, str]:
        """Returns the response of a running process; None with the reason it ended, or with "" where its time was
        over.
        """
        if self._worker is not None and self._worker.has_ended:
            self._worker.end()
            self._worker = None
        worker = self._worker = self._worker or self._start()
        answer = worker.ask(request, _WALL_FACTOR * self._budget.seconds)
        fault = worker.fault if answer is None else ""
        if answer is None or answer.get("last"):
            worker.end()
            self._worker = None
        return answer, fault

    def _start(self) -> WorkerProcess:
        try:
            worker = WorkerProcess("jaxserve.frontend.template_worker", "chat templates")
        except OSError as error:
            raise TemplateProcessError(f"the process for chat templates cannot be started: {error}") from error
        budget = json.dumps(dataclasses.asdict(self._budget)).encode()
        if worker.ask(budget, _START_SECONDS) is None:
            fault = worker.fault or f"the process for chat templates has not started within {_START_SECONDS:g} s"
            worker.end()
            raise TemplateProcessError(fault)
        return worker


def one_line(error: BaseException) -> str:
    """Returns the first line of an error's text, of bounded length."""
    lines = str(error).strip().splitlines()
    return clipped(lines[0], _MAX_ERROR) if lines else type(error).__name__
