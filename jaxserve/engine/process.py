"""Runs the engine in its own process, away from the front end's interpreter lock.

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

from jaxserve.config.settings import EngineConfig
from jaxserve.config.wire_config import config_to_bytes
from jaxserve.engine.channel import END_SECONDS
from jaxserve.engine.framing import FrameReader, FrameSender
from jaxserve.engine.messages import (
    AskProgress,
    EngineFailed,
    EngineReady,
    FromEngine,
    Progress,
    Shutdown,
    ToEngine,
    decode,
    encode,
)

_EXIT_SECONDS = 5.0
"""Seconds that an engine that has closed its connection may take to exit before it is killed."""


class LaunchedEngine:
    """Starts a child process that imports what an engine needs, which takes seconds, and then waits for its
    configuration."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "jaxserve.engine.worker", str(theirs.fileno())]
            # A session of its own: Ctrl-C and signals to our group are ours to answer, and the engine drains with us.
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )


class EngineProcess:
    """Implements PolledEngineClient over a child process. The constructor returns when the engine is ready.

    launched: its process, if already started; it must not be shared.
    Raises ValueError with the engine's own line when it cannot start.
    """

    def __init__(self, config: EngineConfig, launched: LaunchedEngine | None = None):
        launched = LaunchedEngine() if launched is None else launched
        self._process = launched.process
        self._socket = ours = launched.socket
        self._reader, self._sender = FrameReader(ours), FrameSender(ours)
        self._backlog: list[FromEngine] = []
        self._asked = 0
        self._progress = Progress(0, 0, False)
        with contextlib.suppress(OSError):  # a child that is dead already has left its exit code to `_read`
            self._sender.send([config_to_bytes(config)])
        first, *self._backlog = self._read()
        if not isinstance(first, EngineReady):
            self.close()
            assert isinstance(first, EngineFailed)
            raise ValueError(first.error)
        self.ready: EngineReady = first

    @property
    def unsent_bytes(self) -> int:
        return self._sender.queued_bytes

    def send(self, message: ToEngine) -> None:
        """Sends a message without ever waiting, even if the engine is stopped. Sends nothing to a dead engine, which
        `receive` reports."""
        with contextlib.suppress(OSError):
            self._sender.send([encode(message)])

    def receive(self) -> Sequence[FromEngine]:
        if self._backlog:
            messages, self._backlog = self._backlog, []
            return messages
        return self._read()

    def fileno(self) -> int:
        return self._socket.fileno()

    def poll(self) -> Sequence[FromEngine] | None:
        messages, self._backlog = self._backlog, []
        payloads = self._reader.poll()
        if payloads is None:
            return messages or None
        return messages + self._from_engine(payloads)

    def progress(self) -> Progress:
        if self._progress.beat == self._asked:  # one question at a time: an engine that is stopped answers none
            self._asked += 1
            self.send(AskProgress(self._asked))
        return self._progress

    def kill(self) -> None:
        self._process.kill()

    def close(self, seconds: float = END_SECONDS) -> str:
        problem = ""
        if self._process.poll() is None:
            self.send(Shutdown())
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                problem = f"the engine process did not end within {seconds:g} s and was killed"
                self._process.kill()
                self._process.wait()
        code = self._process.returncode
        self._socket.close()
        return problem or (f"the engine process ended with exit code {code}" if code else "")

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> list[FromEngine]:
        messages: list[FromEngine] = []
        while not messages:
            payloads = self._reader.read()
            if payloads is None:
                return [EngineFailed(f"engine process {self._ended()}")]
            messages = self._from_engine(payloads)
        return messages

    def _from_engine(self, payloads: Sequence[bytes]) -> list[FromEngine]:
        """Decodes messages; keeps answers about progress for `progress`."""
        messages: list[FromEngine] = []
        for payload in payloads:
            message = decode(payload)
            if isinstance(message, Progress):
                self._progress = message
            elif not isinstance(message, ToEngine):
                messages.append(message)
        return messages

    def _ended(self) -> str:
        """Describes how a process that has closed its connection ended."""
        try:
            return f"ended with exit code {self._process.wait(_EXIT_SECONDS)}"
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "closed its connection, did not exit and was killed"
