"""A server to put load on: started on a free port, or one that runs already."""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

from benchmarks import report


@contextlib.contextmanager
def started_server(
    config: str,
    overrides: Sequence[str],
    root: pathlib.Path = report.ROOT,
    open_files: int | None = None,
    http_port: int = 0,
) -> Iterator[tuple[str, int]]:
    """A server process on a free port; yields its address and process id, and ends it with SIGTERM.

    overrides: --gin.BINDING=VALUE. root: of the checkout that it runs. open_files: how many files each of its processes
    may open. http_port: a free one, or 0 for no HTTP.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jaxserve.server", "--config", config, *overrides]
    if root == report.ROOT:  # an earlier checkout is always complete, and knows neither setting
        command.append(f"--gin.ServerConfig.http_port={http_port}")
        command.append("--gin.EngineConfig.ready_when='complete'")  # nothing may be compiled beside what is measured
    process = subprocess.Popen(
        [*command, f"--gin.ServerConfig.port={port}"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    if open_files is not None:  # long before it counts its own
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (open_files, open_files))
    try:
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(60)
