"""The engine's side of two processes: `python -m jaxserve.engine.worker FD`, started by `EngineProcess`.

When the front end dies, the engine reads the end of the stream and ends too.
"""

from __future__ import annotations

import queue
import signal
import socket
import sys
import threading
import time

from jaxserve.config import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.framing import FrameReader, send_frames
from jaxserve.engine.messages import EngineFailed, FromEngine, Shutdown, ToEngine, decode, encode
from jaxserve.engine.wire_config import config_from_bytes
from jaxserve.runner.model_runner import ModelRunner


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
