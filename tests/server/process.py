"""A server process whose standard error is read line by line."""

from __future__ import annotations

import contextlib
import queue
import re
import subprocess
import threading

from tests.server.fakes import WAIT_SECONDS


class Process:
    """A server process whose standard error is read line by line."""

    def __init__(self, arguments: list[str]):
        self.popen = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.seen: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.popen.stderr:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def until(self, pattern: str) -> re.Match:
        """The first further line in which the pattern is found."""
        while (line := self._lines.get(timeout=WAIT_SECONDS)) is not None:
            self.seen.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"the process ended without {pattern!r}: {self.seen}")

    def order(self, line: str) -> None:
        """Controls the engine, see echo_server."""
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()
        self.until("^obeyed$")

    def end(self) -> tuple[int, list[str]]:
        """The exit code and every line, when the process has ended."""
        code = self.popen.wait(WAIT_SECONDS)
        self._reader.join()
        while (line := self._lines.get()) is not None:
            self.seen.append(line)
        return code, self.seen

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self._reader.join()
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
