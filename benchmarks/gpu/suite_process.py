"""Running a part in a process of its own, ended when its time is up. Standard library only."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[2]
POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended. status: exit status, negative for a signal; None where its time was up."""

    status: int | None
    seconds: float

    @property
    def text(self) -> str:
        if self.status is None:
            return f"time: ended after {self.seconds:.0f} s"
        if self.status < 0:
            with contextlib.suppress(ValueError):
                return f"ended by {signal.Signals(-self.status).name}"
        return f"exit status {self.status}"


def environment(gpu: bool, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a part's process.

    One process at a time holds the device, so each takes most of its memory at once: later allocations cost nothing and
    do not fragment. What is left is for what XLA's allocator does not hold: the context, library workspaces and
    command buffers.
    """
    known = dict(os.environ)
    path = known.get("PYTHONPATH")
    known["PYTHONPATH"] = f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)
    known["PYTHONUNBUFFERED"] = "1"
    known.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    if gpu:
        known["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
        known["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.85"
        known.pop("XLA_PYTHON_CLIENT_ALLOCATOR", None)
    else:
        known["JAX_PLATFORMS"] = "cpu"
    return known | dict(extra or {})


def run(
    command: Sequence[str],
    log: pathlib.Path,
    seconds: float,
    *,
    env: Mapping[str, str],
    heard: Callable[[str], None] | None = None,
) -> Ended:
    """Runs `command` with its output appended to `log`, for `seconds` at most.

    heard: called with every line of output that starts with "case ".
    Whatever ends the wait (an interrupt too) ends the process and its children with it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    offset = log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(env), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        while process.poll() is None and time.monotonic() - start < seconds:
            time.sleep(POLL_SECONDS)
            offset = _tell(log, offset, heard)
        status = process.poll()
    finally:
        end(process)
    _tell(log, offset, heard)
    return Ended(status, time.monotonic() - start)


def end(process: subprocess.Popen) -> None:
    """Ends a process group: asks first, then does not ask. One that the system cannot end is left behind."""
    for wanted, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, wanted)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # children that outlived it


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this repository under this Python."""
    return [sys.executable, "-m", module, *arguments]


def tail(log: pathlib.Path, characters: int = 4000) -> str:
    """The end of a log; "" where there is none."""
    try:
        return log.read_text(encoding="utf-8", errors="replace")[-characters:]
    except OSError:
        return ""


def _tell(log: pathlib.Path, offset: int, heard: Callable[[str], None] | None) -> int:
    """Hands the whole lines of `log` after `offset` on; returns the offset of what is left."""
    with log.open("rb") as source:
        source.seek(offset)
        data = source.read()
    complete = data.rfind(b"\n") + 1
    if heard is not None:
        for line in data[:complete].decode(errors="replace").splitlines():
            if line.startswith("case "):
                heard(line)
    return offset + complete
