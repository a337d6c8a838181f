"""Runs work of unbounded cost in a process of its own, which is ended when it exceeds its budget.

No thread could be stopped in one long operation, nor kept from allocating all memory.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import weakref
from typing import Any

from jaxserve.engine.framing import FrameReader, frames


class WorkerProcess:
    """Starts `python -m MODULE FD`, which answers one message after another. It ends with this object.

    Args:
        module: what the process runs.
        work: what it does, for errors.

    Raises OSError where no process can be started.
    """

    def __init__(self, module: str, work: str):
        self._work = work
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", module, str(theirs.fileno())]
            # A session of its own: signals to our group are ours to answer.
            try:
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
                )
            except OSError:
                self._socket.close()
                raise
        self._reader = FrameReader(self._socket)
        self._timed_out = False
        self.end = weakref.finalize(self, _end, self._process, self._socket)

    def ask(self, request: bytes, seconds: float) -> dict[str, Any] | None:
        """Returns the response to a message, an object in JSON, as `ask_bytes` does."""
        answer = self.ask_bytes(request, seconds)
        return None if answer is None else json.loads(answer)

    def ask_bytes(self, request: bytes, seconds: float) -> bytes | None:
        """Returns the response to a message; None when there is none in time, or the process has ended."""
        self._socket.settimeout(seconds)
        try:
            self._socket.sendall(frames([request]))
            payloads = self._reader.read()
        except TimeoutError:
            self._timed_out = True
            return None
        except ConnectionError:  # it has ended before it read everything
            return None
        return None if payloads is None else payloads[0]

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def was_killed(self) -> bool:
        """Tells whether it was killed from outside, after `ask` returned None."""
        return not self._timed_out and self._process.wait() == -signal.SIGKILL

    @property
    def fault(self) -> str:
        """Returns why the process ended, after `ask` returned None; empty where its time was over."""
        if self._timed_out or (code := self._process.wait()) == -signal.SIGVTALRM:
            return ""
        return f"the process for {self._work} ended with exit code {code}"


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
