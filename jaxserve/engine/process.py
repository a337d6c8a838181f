"""The engine in a process of its own, away from the front end's interpreter lock.

`EngineProcess` is the front end's side and loads no jax. It starts `python -m jaxserve.engine.worker FD` with one end
of a socket pair and sends the configuration; the engine answers EngineReady or EngineFailed, and messages flow both
ways until one end closes. msgpack only: nothing that arrives is executed.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Sequence

from jaxserve.config import EngineConfig
from jaxserve.engine.framing import FrameReader, send_frames
from jaxserve.engine.messages import EngineFailed, EngineReady, FromEngine, Shutdown, ToEngine, decode, encode
from jaxserve.engine.wire_config import config_to_bytes

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""Of the server and of its engine's process, which write to the same standard error."""

_END_SECONDS = 10.0
"""How long a closing engine may take to end before it is killed."""


class LaunchedEngine:
    """A child process that imports what an engine needs, seconds of work, and then waits for its configuration."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "jaxserve.engine.worker", str(theirs.fileno())]
            # A session of its own: Ctrl-C and signals to our group are ours to answer, and the engine drains with us.
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )


class EngineProcess:
    """EngineClient over a child process. The constructor returns when the engine is ready.

    launched: its process, where that was started before; nobody else may use it.
    Raises ValueError with the engine's own line when it cannot start.
    """

    def __init__(self, config: EngineConfig, launched: LaunchedEngine | None = None):
        launched = LaunchedEngine() if launched is None else launched
        self._process = launched.process
        self._socket = ours = launched.socket
        self._reader = FrameReader(ours)
        self._backlog: list[FromEngine] = []
        with contextlib.suppress(OSError):  # a child that is dead already has left its exit code to `_read`
            send_frames(ours, [config_to_bytes(config)])
        first, *self._backlog = self._read()
        if not isinstance(first, EngineReady):
            self.close()
            assert isinstance(first, EngineFailed)
            raise ValueError(first.error)
        self.ready: EngineReady = first

    def send(self, message: ToEngine) -> None:
        """Never blocks on a step: a thread of the engine drains the socket. To a dead engine it sends nothing:
        `receive` tells the front end."""
        with contextlib.suppress(OSError):
            send_frames(self._socket, [encode(message)])

    def receive(self) -> Sequence[FromEngine]:
        if self._backlog:
            messages, self._backlog = self._backlog, []
            return messages
        return self._read()

    def close(self) -> None:
        if self._process.poll() is None:
            self.send(Shutdown())
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._socket.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> list[FromEngine]:
        payloads = self._reader.read()
        if payloads is None:
            code = self._process.wait()
            return [EngineFailed(f"engine process ended with exit code {code}")]
        return [message for payload in payloads if not isinstance(message := decode(payload), ToEngine)]
