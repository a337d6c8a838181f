"""Runs unmodified clients of other projects against a server, each in an environment of its own:
`python -m benchmarks.clients.run_clients --folder DIR`.

Environments are made in DIR once, with pip and npm, and used again. Without --url a server of --config is started. The
exit code is 1 where a client fails.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

from benchmarks.load.server_process import started_server
from jaxserve.serving.clients.grpc_client import Client

HERE = pathlib.Path(__file__).parent
PYTHON = {
    "openai-1": ("openai>=1,<2", "openai_python.py"),
    "openai-2": ("openai>=2,<3", "openai_python.py"),
    "openai-3": ("openai>=3,<4", "openai_python.py"),
    "langchain-openai": ("langchain-openai", "langchain_client.py"),
    "pydantic-ai": ("pydantic-ai-slim[openai]", "pydantic_ai_client.py"),
    "instructor": ("instructor", "instructor_client.py"),
}
"""What each environment has, and the script that it runs."""


@contextlib.contextmanager
def served(config: str) -> Iterator[str]:
    """A server on free ports; yields the URL of OpenAI's routes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with started_server(config, (), http_port=port) as (address, _):
        with Client(address) as client:
            client.wait_ready(600.0)
        yield f"http://127.0.0.1:{port}/v1"


def run_python(folder: pathlib.Path, name: str, url: str, model: str) -> int:
    """Runs a script in its environment; returns its exit code."""
    requirement, script = PYTHON[name]
    python = folder / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True)
    return subprocess.run([python, HERE / script, url, model]).returncode


def run_node(folder: pathlib.Path, url: str, model: str) -> int:
    """Runs the client for node; returns its exit code."""
    place = folder / "node"
    if not (place / "node_modules" / "openai").exists():
        place.mkdir(parents=True, exist_ok=True)
        (place / "package.json").write_text('{"private": true}', encoding="utf-8")
        subprocess.run(["npm", "install", "--silent", "openai@latest"], cwd=place, check=True)
    shutil.copy(HERE / "openai_node.mjs", place)
    return subprocess.run(["node", "openai_node.mjs", url, model], cwd=place).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="where the environments are kept")
    parser.add_argument("--url", help="of a server that runs, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--config", default="tiny.gin")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    failed = []
    with contextlib.nullcontext(options.url) if options.url else served(options.config) as url:
        for name in PYTHON:
            if run_python(folder, name, url, options.model):
                failed.append(name)
            print(flush=True)
        if shutil.which("npm") is None:
            print("openai for node: npm is not installed")
        elif run_node(folder, url, options.model):
            failed.append("node")
    print(f"failed: {', '.join(failed)}" if failed else "every client ran to its end")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
