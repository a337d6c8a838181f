"""Renders chat templates in a process: `python -m jaxserve.frontend.template_worker FD`, see `TemplateRenderer`.

When the front end dies, it reads the end of the stream and ends too; while it renders, its own timer ends it.
"""

from __future__ import annotations

import json
import pathlib
import resource
import signal
import socket
import sys
from typing import Any

import tokenizers

from jaxserve.engine.framing import FrameReader, frames
from jaxserve.frontend.fast_tokenizers import fast_class
from jaxserve.frontend.template import TemplateBudget, one_line

_SIGNAL_GRACE = 2.0
"""Multiple of its time after which the process is ended, if a template does not let Python raise an error."""


class _OutOfTimeError(BaseException):
    """The time budget is used up. Neither a template nor what it calls can catch this."""


def serve(connection: socket.socket) -> None:
    """Renders the requests of the front end at the other end of the socket, until it closes."""
    reader = FrameReader(connection)
    first = reader.read()
    if first is None:
        return
    render = _Rendering(TemplateBudget(**json.loads(first[0])))
    connection.sendall(frames([b"{}"]))
    while (payloads := reader.read()) is not None:
        for payload in payloads:
            connection.sendall(frames([json.dumps(render(json.loads(payload))).encode()]))


class _Rendering:
    """Renders conversations within a budget that starts at construction."""

    def __init__(self, budget: TemplateBudget):
        self._budget = budget
        # It holds no tokens: template and special tokens are given with each call.
        self._transformers = fast_class()(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        if sys.platform.startswith("linux"):
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + budget.memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGPROF, _raise_out_of_time)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the response: the text, or an error; `last` where this process should not continue."""
        budget = self._budget
        try:
            signal.setitimer(signal.ITIMER_PROF, budget.seconds)
            # Ends the process: one long operation of the interpreter lets no handler run.
            signal.setitimer(signal.ITIMER_VIRTUAL, _SIGNAL_GRACE * budget.seconds)
            try:
                text = self._transformers.apply_chat_template(
                    request["messages"],
                    chat_template=request["template"],
                    tokenize=False,
                    tools=request["tools"],
                    add_generation_prompt=request["add_generation_prompt"],
                    continue_final_message=request["continue_final_message"],
                    **request["names"],
                )
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except _OutOfTimeError:
            return {"error": f"the chat template takes more than its budget of {budget.seconds:g} s for messages"}
        except MemoryError:
            memory = budget.memory >> 20
            return {"error": f"the chat template takes more than its budget of {memory} MiB for messages", "last": True}
        except Exception as error:  # whatever a template raises is this request's failure
            return {"error": f"messages do not fit the chat template: {one_line(error)}"}
        if len(text) > budget.characters:
            error = f"the chat template makes {len(text)} characters of messages; its budget is {budget.characters}"
            return {"error": error, "last": True}  # its memory is better given back
        return {"text": text}


def _raise_out_of_time(number: int, frame: Any) -> None:
    raise _OutOfTimeError


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the front end decides when to end
        signal.signal(ignored, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))
