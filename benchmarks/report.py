"""What every benchmark says about itself: machine, versions, settings; the JSON file and the table it prints.

Standard library only, so that it imports in any process. Nothing here names a path of the machine.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def machine() -> dict[str, Any]:
    """CPU model, cores that this process may use, memory in GiB, and the instruction sets that decide a dot's speed."""
    info: dict[str, str] = {}
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            info.setdefault(name.strip(), value.strip())
    except OSError:
        info["model name"] = platform.processor()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name", ""),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "instructions": [name for name in wanted if name in flags],
        "system": platform.system(),
        "load_average_1m": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, Any]:
    """Python, packages, and the commit of this repository; `dirty` where its code differs from that commit."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["jaxserve_commit"] = commit(ROOT)
    code = ("jaxserve", "models", "pallas_kernels", "server")
    found["dirty"] = bool(_git("status", "--porcelain", "--untracked-files=no", "--", *code))
    return found


def commit(root: pathlib.Path) -> str | None:
    """The commit of a checkout; None where git does not tell."""
    return _git("-C", str(root), "rev-parse", "--short=12", "HEAD")


def document(name: str, settings: dict[str, Any], results: Any) -> dict[str, Any]:
    """What a file of results holds."""
    return {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "results": results,
    }


def write(name: str, settings: dict[str, Any], results: Any) -> pathlib.Path:
    """Writes results/`name`.json and returns its path, relative to the repository where it lies there."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(name, settings, results), indent=2) + "\n", encoding="utf-8")
    return path.relative_to(ROOT)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain table: the first column is flush left, the others flush right; floats with at most two decimals."""
    cells = [list(header)] + [[_text(value) for value in row] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(header))]
    lines = []
    for line in cells:
        parts = [text.ljust(width) if not place else text.rjust(width) for place, (text, width) in _wide(line, widths)]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def describe() -> str:
    """One line on the machine and the versions, for the head of a table."""
    here, what = machine(), versions()
    return (
        f"{here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB ({', '.join(here['instructions'])}); "
        f"Python {what['python']}, jax {what['jax']}, commit {what['jaxserve_commit']}{' (changed)' * what['dirty']}"
    )


def fail(message: str) -> int:
    """Prints one line on standard error; the exit status of a benchmark whose claim does not hold."""
    print(message, file=sys.stderr)
    return 1


def _wide(line: Sequence[str], widths: Sequence[int]) -> list[tuple[int, tuple[str, int]]]:
    return list(enumerate(zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    return f"{value:,.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
