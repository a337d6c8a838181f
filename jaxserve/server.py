"""Runs the gRPC server: `python -m jaxserve.server --config tiny.gin [--gin.BINDING=VALUE ...]`.

The exit code is 0 where a signal ended the process and the engine ended when it was asked to. It is 1, with one line on
stderr, where the start failed, the engine died or hung, or had to be killed at the end; whatever signals came.

--dry-run checks all that the start checks, prints what that was, and serves nothing; the exit code is 0 or 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jaxserve.config import gin_config
from jaxserve.serving.server_run import run_checks, run_server
from jaxserve.telemetry.startup_spans import StartupSpans


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until a signal; returns the exit code when the port cannot be bound, and else ends the process with it."""
    phases = StartupSpans()
    phases.until_now("interpreter, imports")
    parser = argparse.ArgumentParser(prog="jaxserve.server", description="Serves a model over gRPC and HTTP.")
    parser.add_argument("--dry-run", action="store_true", help="check everything without serving; exit with 0 or 1")
    with phases.phase("configuration"):
        parsed, config, operative = gin_config.load_from_command_line(parser, arguments)
    if parsed.dry_run:
        return run_checks(config)
    return run_server(config, operative, phases)


if __name__ == "__main__":
    sys.exit(main())
