"""Who may import whom, where import-linter cannot say it: whole lists of what is allowed, and what is really loaded.

The layers themselves are contracts in pyproject.toml and are checked by lint-imports.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIRST_PARTY = {"jaxserve"}
FOLDERS = ("jaxserve", "models", "pallas_kernels", "server")
ENTRY_POINTS = {f"jaxserve.{name}" for name in ("server", "client", "batch", "simulate", "tune", "compile", "explain")}


def imported_modules(path: pathlib.Path) -> set[str]:
    """Dotted names that a file imports anywhere in it; `from a import b` counts as both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def third_party(path: pathlib.Path) -> set[str]:
    tops = {name.partition(".")[0] for name in imported_modules(path)}
    return tops - set(sys.stdlib_module_names) - FIRST_PARTY


def sources(*places: str) -> list[pathlib.Path]:
    found: list[pathlib.Path] = []
    for place in places:
        path = ROOT / place
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.is_file()
    return found


@pytest.mark.parametrize(
    ("places", "allowed"),
    [
        # numba and llvmlite compile the kernels for CPUs.
        (("pallas_kernels",), {"jax", "numpy", "numba", "llvmlite"}),
        (
            (
                "jaxserve/request.py",
                "jaxserve/request_checks.py",
                "jaxserve/sampling_params.py",
                "jaxserve/config/settings.py",
                "jaxserve/scheduler",
                "jaxserve/telemetry/recorder.py",
            ),
            {"numpy"},
        ),
        (("jaxserve/config/targets.py", "jaxserve/planning/model_cost.py"), set()),
        (("jaxserve/simulator",), {"numpy", "matplotlib", "tqdm"}),  # to draw, and to show how far it is
        (("jaxserve/runner/protocol.py", "jaxserve/runner/fake.py", "models/config.py"), {"numpy"}),
    ],
)
def test_only_listed_packages_are_imported(places, allowed):
    files = sources(*places)
    assert files
    unexpected = {
        str(path.relative_to(ROOT)): sorted(extra) for path in files if (extra := third_party(path) - allowed)
    }
    assert unexpected == {}


def test_nothing_imports_an_entry_point():
    found = {
        str(path.relative_to(ROOT)): sorted(hits)
        for path in sources(*FOLDERS)
        if (hits := imported_modules(path) & ENTRY_POINTS)
    }
    assert found == {}


@pytest.mark.parametrize(
    "module", ["jaxserve", "jaxserve.scheduler", "jaxserve.request", "jaxserve.config.gin_config", "jaxserve.simulator"]
)
def test_loads_without_jax(module):
    code = (
        f"import sys, {module}; print(*sorted({{'jax', 'jaxlib', 'flax', 'torch', 'transformers'}} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""
