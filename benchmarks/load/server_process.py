"""A server to put load on: started on a free port, or one that runs already."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

from benchmarks import report


@contextlib.contextmanager
def started_server(
    config: str, overrides: Sequence[str], root: pathlib.Path = report.ROOT
) -> Iterator[tuple[str, int]]:
    """A server process on a free port; yields its address and process id, and ends it with SIGTERM.

    overrides: --gin.BINDING=VALUE. root: of the checkout that it runs.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jaxserve.server", "--config", config, *overrides]
    process = subprocess.Popen(
        [*command, f"--gin.ServerConfig.port={port}"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    try:
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(60)
