"""Runs the engine's process: `python -m jaxserve.engine.worker FD`, started by `EngineProcess`.

When the front end dies, the engine reads the end of the stream and ends too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback

from jaxserve.config.settings import EngineConfig
from jaxserve.config.wire_config import config_from_bytes
from jaxserve.engine.constraints.start import start_grammars
from jaxserve.engine.core import EngineCore
from jaxserve.engine.framing import FrameReader, FrameSender
from jaxserve.engine.lasting_heap import keep_what_is_loaded
from jaxserve.engine.messages import (
    AskProgress,
    CaptureProfile,
    EngineFailed,
    FromEngine,
    ProfileCaptured,
    Shutdown,
    ToEngine,
    decode,
    encode,
)
from jaxserve.engine.step_executor import EngineBrokenError
from jaxserve.runner.model_runner import ModelRunner, annotate
from jaxserve.runner.profiling import record_profile
from jaxserve.telemetry.batch_timeline import BatchTimelineFile
from jaxserve.telemetry.log_lines import log_to_stderr
from jaxserve.telemetry.startup_spans import StartupSpans

_FLUSH_SECONDS = 5.0
"""Seconds that a slowly reading front end has for the last messages."""

_ORPHAN_SECONDS = 2 * _FLUSH_SECONDS
"""Seconds that a step in flight may continue after the front end has gone: one that hangs would keep the device
forever."""


def serve(connection: socket.socket) -> int:
    """Runs an engine for the front end at the other end of `connection`; returns the process's exit code."""
    reader, sender = FrameReader(connection), FrameSender(connection)
    first = reader.read()
    if first is None:
        return 0
    mailbox = _Mailbox(reader, sender)
    threading.Thread(target=mailbox.run, daemon=True).start()
    start = time.perf_counter()
    try:
        try:
            core = _build_core(config_from_bytes(first[0]))
            tracking = BatchTimelineFile(core.recorder, core.config.composition_dir)
        except Exception as error:  # whatever it is, the front end must learn why
            if not isinstance(error, ValueError | OSError):
                traceback.print_exc()
            sender.send([encode(EngineFailed(_one_line(error)))])
            return 1
        mailbox.core = core
        keep_what_is_loaded()
        sender.send([encode(core.ready(time.perf_counter() - start))])
        with contextlib.closing(tracking):
            _loop(core, sender, mailbox.inbox)
        core.close()
    except ConnectionError:
        return 0  # the front end has gone, so no answer is needed
    except EngineBrokenError as error:  # the log has the faults that led to it
        sender.send([encode(EngineFailed(str(error)))])
        return 1
    except Exception as error:
        sender.send([encode(EngineFailed(f"engine step failed: {_one_line(error)}"))])
        raise
    finally:
        sender.close(_FLUSH_SECONDS)
    return 0


def _loop(core: EngineCore, sender: FrameSender, inbox: queue.SimpleQueue[ToEngine | None]) -> None:
    while True:
        outputs: list[FromEngine] = []
        while core.busy is False or not inbox.empty() or core.pause:
            try:
                message = inbox.get(timeout=core.pause)
            except queue.Empty:
                break  # the pause is over
            if message is None or isinstance(message, Shutdown):
                return
            outputs.extend(core.handle(message))
            if outputs and not core.busy:
                break
        if core.busy:
            outputs.extend(core.step())
        if outputs:
            sender.send(map(encode, outputs))


class _Mailbox:
    """Moves messages from the socket to `inbox`, so that the front end never waits for a step; None is the end.

    Questions about the loop's progress are answered here, whatever the loop is doing, and profiles are recorded in a
    thread of their own. core: None while the model loads;
    a front end that ends meanwhile ends this process at once, and later one whose loop does not end by itself.
    """

    def __init__(self, reader: FrameReader, sender: FrameSender):
        self.inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self.core: EngineCore | None = None
        self._reader, self._sender = reader, sender

    def run(self) -> None:
        """Moves messages until the front end has closed its end."""
        try:
            while (payloads := self._reader.read()) is not None:
                for payload in payloads:
                    self._take(payload)
        finally:
            self.inbox.put(None)
        if self.core is None:
            os._exit(0)
        time.sleep(_ORPHAN_SECONDS)  # a loop that goes on has ended the process by then
        os._exit(1)

    def _take(self, payload: bytes) -> None:
        message = decode(payload)
        assert isinstance(message, ToEngine)
        if isinstance(message, Shutdown) and self.core is None:
            os._exit(0)
        if isinstance(message, AskProgress) and self.core is not None:
            with contextlib.suppress(OSError):  # the front end is gone, and the next read says so
                self._sender.send([encode(self.core.progress(message.beat))])
        elif isinstance(message, CaptureProfile):
            threading.Thread(target=self._profile, args=(message,), name="profile", daemon=True).start()
        else:
            self.inbox.put(message)

    def _profile(self, message: CaptureProfile) -> None:
        error = ""
        try:
            record_profile(message.directory, message.seconds)
        except Exception as failure:  # whatever it is, who asked must learn of it, and serving goes on
            traceback.print_exc()
            error = _one_line(failure)
        with contextlib.suppress(OSError):
            self._sender.send([encode(ProfileCaptured(message.directory, error))])


def _build_core(config: EngineConfig) -> EngineCore:
    phases = StartupSpans()
    phases.until_now("interpreter, imports, configuration")
    grammars = start_grammars(config, now=True)
    runner = ModelRunner(config, progress=True, phases=phases, server=True)
    return EngineCore(config, runner, annotate=annotate, grammars=grammars)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    log_to_stderr()
    logging.getLogger("jaxserve").setLevel(logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):  # the front end decides when to end
        signal.signal(number, signal.SIG_IGN)
    sys.exit(serve(socket.socket(fileno=int(sys.argv[1]))))
