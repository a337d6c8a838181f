"""Python source run in a process of its own."""

import pathlib
import subprocess
import sys


def run_script(script, *arguments):
    """Runs Python source in a process of its own; returns what it prints."""
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
