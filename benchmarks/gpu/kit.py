"""Packs what a GPU machine without a network needs beside the checkout: `python -m benchmarks.gpu.kit --output kit`.

    kit/bundle.tar.xz    the suite's programs, compiled for `--target` without it
    kit/wheels/*.whl     packages that jaxserve needs and the machine lacks (`--wheels NAME NAME==VERSION ...`)

Run it with the jax and the Python of that machine, from the commit that will run there: programs of other versions or
other sources are refused. `python benchmarks/gpu_suite.py --kit kit` takes it. Exit status 1 where it is too large.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import lzma
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence

from benchmarks import report

BUNDLE, WHEELS = "bundle.tar.xz", "wheels"
MOST_BYTES = 40 * 10**6
TRAVEL_BYTES = 64 * 10**6
LACKING = ("gin-config", "grpcio-health-checking", "grpcio-reflection", "llguidance", "msgspec")
"""What a machine that has jax, torch and transformers lacks, as far as jaxserve needs it by now."""
PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)) + (
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)


def pack_bundle(directory: pathlib.Path, target: str) -> None:
    """Compiles the suite's bundle in a process of its own and packs it."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            (sys.executable, "-m", "benchmarks.gpu.bundle_part", folder, target),
            cwd=report.ROOT,
            check=True,
            stdout=sys.stderr,
        )
        with lzma.open(directory / BUNDLE, "wb", preset=6) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
            for path in sorted(pathlib.Path(folder).rglob("*")):
                if path.is_file():
                    archive.add(path, path.relative_to(folder).as_posix())


def unpack_bundle(kit: pathlib.Path, directory: pathlib.Path) -> pathlib.Path | None:
    """The kit's bundle in a directory of this user's own; None where the kit has none."""
    if not (kit / BUNDLE).is_file():
        return None
    with tarfile.open(kit / BUNDLE) as archive:
        archive.extractall(directory, filter="data")
    return directory


def lacking() -> list[str]:
    """Of LACKING what is installed here."""
    found = {str(one.metadata["Name"]).lower().replace("_", "-") for one in importlib.metadata.distributions()}
    return [name for name in LACKING if name in found]


def download_wheels(directory: pathlib.Path, names: Sequence[str], python: str) -> None:
    """One wheel a name, for x86-64 Linux; without a version the one that is installed here."""
    wanted = [name if "==" in name else f"{name}=={importlib.metadata.version(name)}" for name in names]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    subprocess.run([*command, "-d", str(directory), *wanted], check=True)


def install_wheels(kit: pathlib.Path, directory: pathlib.Path) -> pathlib.Path | None:
    """Installs the kit's wheels into a directory for PYTHONPATH; None where the kit has none."""
    wheels = sorted(str(path) for path in (kit / WHEELS).glob("*.whl"))
    if not wheels:
        return None
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*command, "--no-compile", "--no-cache-dir", "--target", str(directory), *wheels], check=True)
    return directory


def tracked_bytes() -> int:
    """Of the checkout as git hands it out."""
    done = subprocess.run(("git", "archive", "HEAD"), cwd=report.ROOT, capture_output=True, check=True)
    return len(done.stdout)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the kit and prints what would travel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--target", default="h200", help="of configs/targets (default h200)")
    parser.add_argument("--wheels", nargs="*", default=lacking(), metavar="NAME", help=f"default: {lacking()}")
    parser.add_argument("--python", default="3.12", help="version of the machine's Python (default 3.12)")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for old in [*(options.output / WHEELS).glob("*.whl"), options.output / BUNDLE]:
        old.unlink(missing_ok=True)
    pack_bundle(options.output, options.target)
    if options.wheels:
        download_wheels(options.output / WHEELS, options.wheels, options.python)
    sizes = {path.relative_to(options.output): path.stat().st_size for path in sorted(options.output.rglob("*.*"))}
    sizes = {name: size for name, size in sizes.items() if (options.output / name).is_file()}
    for name, size in sizes.items():
        print(f"{name}: {size:,} bytes")
    kit, tracked = sum(sizes.values()), tracked_bytes()
    print(f"kit {kit:,} bytes, tracked files {tracked:,}, together {kit + tracked:,}")
    if kit > MOST_BYTES or kit + tracked > TRAVEL_BYTES:
        return report.fail(f"the kit may have {MOST_BYTES:,} bytes, and {TRAVEL_BYTES:,} with the tracked files")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
