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
from collections.abc import Sequence
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
        """Returns the response to a message, an object in JSON; None when there is none in time, or the process has
        ended."""
        payloads = self._exchange(request, seconds)
        return None if payloads is None else json.loads(payloads[0])

    def ask_parts(self, request: bytes, seconds: float) -> list[bytes] | None:
        """Returns the parts of the response to a message, as `frames_of_parts` makes them; None as `ask` does. seconds:
        for the request, and for each part."""
        payloads = self._exchange(request, seconds)
        if payloads is None:
            return None
        count, parts = int.from_bytes(payloads[0]), payloads[1:]
        while len(parts) < count:
            more = self._receive()
            if more is None:
                return None
            parts += more
        return parts

    def _exchange(self, request: bytes, seconds: float) -> list[bytes] | None:
        """Sends a message and returns what arrives first, or None."""
        self._socket.settimeout(seconds)
        try:
            self._socket.sendall(frames([request]))
        except TimeoutError:
            self._timed_out = True
            return None
        except ConnectionError:  # it has ended before it read everything
            return None
        return self._receive()

    def _receive(self) -> list[bytes] | None:
        try:
            return self._reader.read()
        except TimeoutError:
            self._timed_out = True
            return None

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


def frames_of_parts(parts: Sequence[bytes]) -> bytes:
    """Returns a response in parts as bytes on the wire: their number, and each in a frame of its own.

    The reader copies what it receives more than once, and so no more than a part at a time.
    """
    return frames([len(parts).to_bytes(4), *parts])


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
