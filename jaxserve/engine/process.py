"""The engine in a process of its own, away from the front end's interpreter lock.

The front end starts `python -m jaxserve.engine.process FD` with one end of a socket pair and sends the configuration;
the engine answers EngineReady or EngineFailed, and messages flow both ways until one end closes. msgpack only: nothing
that arrives is executed. When the front end dies the engine reads the end of the stream and ends too.
"""

from __future__ import annotations

import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from jaxserve.config import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.framing import FrameReader, send_frames
from jaxserve.engine.messages import EngineFailed, EngineReady, FromEngine, Shutdown, ToEngine, decode, encode
from jaxserve.engine.wire_config import config_from_bytes, config_to_bytes
from jaxserve.runner.model_runner import ModelRunner

_END_SECONDS = 10.0
"""How long a closing engine may take to end before it is killed."""


class EngineProcess:
    """EngineClient over a child process. The constructor returns when the engine is ready.

    Raises ValueError with the engine's own line when it cannot start.
    """

    def __init__(self, config: EngineConfig):
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "jaxserve.engine.process", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._socket = ours
        self._reader = FrameReader(ours)
        self._backlog: list[FromEngine] = []
        self._failed = False
        send_frames(ours, [config_to_bytes(config)])
        first, *self._backlog = self._read()
        if not isinstance(first, EngineReady):
            self.close()
            assert isinstance(first, EngineFailed)
            raise ValueError(first.error)
        self.ready: EngineReady = first

    def send(self, message: ToEngine) -> None:
        """Never blocks on a step: a thread of the engine drains the socket. After a failure it does nothing."""
        try:
            send_frames(self._socket, [encode(message)])
        except OSError:
            self._failed = True  # `receive` tells the front end

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


def serve(connection: socket.socket) -> int:
    """Runs an engine for the front end at the other end of `connection`; returns the process's exit code."""
    reader = FrameReader(connection)
    first = reader.read()
    if first is None:
        return 0
    start = time.perf_counter()
    try:
        config = config_from_bytes(first[0])
        core = _build_core(config)
    except (ValueError, OSError, MemoryError) as error:
        send_frames(connection, [encode(EngineFailed(_one_line(error)))])
        return 1
    send_frames(connection, [encode(core.ready(time.perf_counter() - start))])
    inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
    threading.Thread(target=_drain, args=(reader, inbox), daemon=True).start()
    try:
        _loop(core, connection, inbox)
    except ConnectionError:
        return 0  # the front end is gone and nobody is left to answer
    except Exception as error:
        send_frames(connection, [encode(EngineFailed(f"engine step failed: {_one_line(error)}"))])
        raise
    return 0


def _loop(core: EngineCore, connection: socket.socket, inbox: queue.SimpleQueue[ToEngine | None]) -> None:
    while True:
        outputs: list[FromEngine] = []
        while core.busy is False or not inbox.empty():
            message = inbox.get()
            if message is None or isinstance(message, Shutdown):
                return
            outputs.extend(core.handle(message))
            if outputs and not core.busy:
                break
        if core.busy:
            outputs.extend(core.step())
        if outputs:
            send_frames(connection, map(encode, outputs))


def _drain(reader: FrameReader, inbox: queue.SimpleQueue[ToEngine | None]) -> None:
    while (payloads := reader.read()) is not None:
        for payload in payloads:
            message = decode(payload)
            assert isinstance(message, ToEngine)
            inbox.put(message)
    inbox.put(None)


def _build_core(config: EngineConfig) -> EngineCore:
    return EngineCore(config, ModelRunner(config, progress=sys.stderr.isatty()))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front end decides when to end
    sys.exit(serve(socket.socket(fileno=int(sys.argv[1]))))
