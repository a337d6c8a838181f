"""Stops a program that works in its main thread in an orderly way on SIGINT, SIGTERM and SIGHUP."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedError(KeyboardInterrupt):
    """The program was asked to stop. A KeyboardInterrupt, so that nothing takes it for an error of its own."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """While entered, the first stop signal raises StoppedError in the main thread, and a second ends the process.

    The second is seen by a thread, because the main thread may be within a long call that no handler can interrupt.
    A signal that was ignored before (`nohup`) stays so. Outside the main thread this does nothing.
    farewell: a line for standard error when the second signal ends the process.
    """

    def __init__(self, farewell: str) -> None:
        self._farewell = farewell
        self._caught: int | None = None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        taken = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        thread = threading.Thread(target=_end_at_the_second, args=(ours, taken, self._farewell), daemon=True)
        thread.start()
        self._undo.callback(ours.close)
        self._undo.callback(thread.join)
        self._undo.callback(theirs.close)  # which ends the thread
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False))
        for number in taken:
            self._undo.callback(signal.signal, number, signal.signal(number, self._on_signal))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def check(self) -> None:
        """Raises StoppedError once a signal has come: an exception that a handler raises may get lost."""
        if self._caught is not None:
            raise StoppedError(self._caught)

    def _on_signal(self, number: int, frame: FrameType | None) -> Any:
        if self._caught is None:
            self._caught = number
            raise StoppedError(number)


def _end_at_the_second(numbers: socket.socket, taken: list[signal.Signals], farewell: str) -> None:
    caught = 0
    while data := numbers.recv(1):
        caught += data[0] in taken
        if caught == 2:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{farewell}\n".encode())
            os._exit(128 + data[0])
