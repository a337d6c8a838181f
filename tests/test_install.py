"""One name is installed, and the checks see everything that stands under it."""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import grimp
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxserve"
LINKS = {"models": "models", "pallas_kernels": "pallas_kernels", "serving": "server", "configs": "configs"}


def run(*arguments: str, cwd: pathlib.Path, path: pathlib.Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def modules() -> set[str]:
    """Names of the modules that stand under jaxserve/, behind links too."""
    names = set()
    for directory, _, files in os.walk(PACKAGE, followlinks=True):
        parts = ("jaxserve", *pathlib.Path(directory).relative_to(PACKAGE).parts)
        for file in files:
            if file.endswith(".py"):
                names.add(".".join(parts if file == "__init__.py" else (*parts, file.removesuffix(".py"))))
    return names


def copy_sources(target: pathlib.Path) -> None:
    for folder in ("jaxserve", *LINKS.values()):
        shutil.copytree(
            ROOT / folder, target / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / file, target)


@pytest.fixture
def foreign(tmp_path: pathlib.Path) -> pathlib.Path:
    """A user's directory, whose files have the names of folders of this project."""
    directory = tmp_path / "foreign"
    directory.mkdir()
    for name in ("server", "configs", "tests", "benchmarks"):
        (directory / f"{name}.py").write_text("raise SystemExit('the user file was imported')\n", encoding="utf-8")
    for name in ("models", "pallas_kernels"):
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text("raise SystemExit('the user package was imported')\n")
    return directory


@pytest.mark.parametrize(("link", "folder"), LINKS.items())
def test_links_are_relative(link, folder):
    assert (PACKAGE / link).is_symlink()
    assert os.readlink(PACKAGE / link) == f"../{folder}"


def test_import_graph_holds_every_module():
    graph = grimp.build_graph("jaxserve", cache_dir=None)
    expected = modules()
    assert len(expected) > 200
    # A folder without __init__.py is no package to grimp, so nothing stands in one unseen.
    assert expected - graph.modules == set()


def test_type_checker_looks_behind_every_link():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pyright"]
    python = {f"jaxserve/{link}" for link in LINKS if any((PACKAGE / link).rglob("*.py"))}
    assert python | {"jaxserve"} == set(settings["include"])


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("models/layers/rope.py", "import jaxserve.serving.clients.grpc_client"),
        ("jaxserve/scheduler/plan.py", "import jax"),
        ("pallas_kernels/paged_attention/spec.py", "import jaxserve.models.config"),
        ("server/grpc_port/calls.py", "import gin"),
    ],
)
def test_forbidden_import_is_caught(file, line, tmp_path):
    copy_sources(tmp_path)
    with open(tmp_path / file, "a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    command = [str(pathlib.Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert " 0 broken" not in done.stdout


def test_bare_names_are_banned():
    code = "import models\nfrom server.client import Client\nfrom pallas_kernels import cpu\n"
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", "jaxserve/llm.py", "-"]
    done = subprocess.run(command, cwd=ROOT, input=code, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.count("TID251") == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "jaxserve.server", "--help"),
        ("-m", "jaxserve.client", "--help"),
        ("-m", "jaxserve.batch", "--help"),
        ("-c", "import jaxserve; jaxserve.LLM; import jaxserve.models.registry"),
    ],
)
def test_foreign_files_do_not_stand_in_the_way(arguments, foreign):
    done = run(*arguments, cwd=foreign, path=ROOT)
    assert done.returncode == 0, done.stderr


def test_wheel_installs_one_name(tmp_path, foreign):
    """Of a copy, so that a build leaves nothing in the checkout."""
    source, place = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    copy_sources(source)
    wheel = ("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path))
    built = run(*wheel, cwd=source)
    assert built.returncode == 0, built.stderr
    (file,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
        archive.extractall(place)
    assert {name for name in tops if not name.endswith(".dist-info")} == {"jaxserve"}
    assert {path.name for path in (place / "jaxserve" / "configs").glob("*.gin")} >= {"tiny.gin", "llama.gin"}
    page = pathlib.Path("serving", "http_port", "page")
    assert {path.name for path in (place / "jaxserve" / page).iterdir()} == {
        path.name for path in (PACKAGE / page).iterdir()
    }
    lines = ("import jaxserve.serving.clients.grpc_client as client", "from jaxserve.config import gin_config")
    code = "\n".join((*lines, "gin_config.load('tiny.gin')", "print(client.__file__)"))
    done = run("-c", code, cwd=foreign, path=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(place))
