"""A server with both ports on free ports, and what is to be known about it while it is under stress."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message

from benchmarks import report
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2_grpc as pb_grpc

_START_SECONDS = 600.0
_END_SECONDS = 120.0
_BAD_LINE = re.compile(r"Traceback|\bCRITICAL\b|Exception in ASGI|Task exception was never retrieved")


class StressServer:
    """A server process.

    Attributes:
        grpc_address, http_address: HOST:PORT of its ports.
        process: of the front end.
        lines: what it wrote to standard error.
    """

    def __init__(self, config: str, overrides: Sequence[str] = ()):
        ports = [_free_port() for _ in range(2)]
        self.grpc_address, self.http_address = (f"127.0.0.1:{port}" for port in ports)
        self.lines: list[str] = []
        command = [sys.executable, "-m", "jaxserve.server", "--config", config]
        command += [f"--gin.ServerConfig.port={ports[0]}", f"--gin.ServerConfig.http_port={ports[1]}"]
        command.append("--gin.EngineConfig.ready_when='complete'")  # no compiler beside what is measured
        self.process = subprocess.Popen(
            [*command, *overrides],
            cwd=report.ROOT,
            env=os.environ | {"PYTHONPATH": str(report.ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(_START_SECONDS) or self.process.poll() is not None:
            self.process.kill()
            raise RuntimeError(f"the server did not start: {self.lines[-3:]}")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if " ready on " in line:
                self._ready.set()
        self._ready.set()

    @property
    def bad_lines(self) -> list[str]:
        """What in the log tells of an error of the server's own: each with the error that ends its traceback."""
        lines, found = list(self.lines), []
        for place, line in enumerate(lines):
            if _BAD_LINE.search(line):
                behind = lines[place + 1 : place + 120]
                ends = [one for one in behind if re.match(r"[A-Za-z_.]+(Error|Exception|Group)\b", one)]
                found.append(f"{line}: {ends[0] if ends else ''}")
        return found

    def memory(self) -> dict[str, float]:
        """MB that the front end and its engine hold now."""
        pids = {"front_end": [self.process.pid], "engine": _children(self.process.pid)}
        return {name: sum(map(_resident_mb, found)) for name, found in pids.items()}

    def info(self) -> Message:
        """What GetServerInfo says."""
        with grpc.insecure_channel(self.grpc_address) as channel:
            stub: Any = pb_grpc.JaxServeStub(channel)
            return stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=60.0)

    def leaked(self, seconds: float = 60.0) -> dict[str, int]:
        """What is still held when nobody asks for anything: after `seconds` at most."""
        until = time.monotonic() + seconds
        while True:
            info: Any = self.info()
            stats = info.stats
            found = {
                "pages": info.num_pages - stats.pages_free - stats.pages_cached,
                "running": stats.num_running,
                "waiting": stats.num_waiting,
            }
            if not any(found.values()) or time.monotonic() > until:
                return found
            time.sleep(0.1)

    def end(self) -> int:
        """Ends it with SIGTERM; returns its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextlib.contextmanager
def stressed(config: str, overrides: Sequence[str] = ()) -> Iterator[StressServer]:
    """A server that is ended afterwards, whatever happens."""
    server = StressServer(config, overrides)
    try:
        yield server
    finally:
        server.end()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _children(pid: int) -> list[int]:
    path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def _resident_mb(pid: int) -> float:
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    match = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return round(int(match[1]) / 1000, 1) if match else 0.0
