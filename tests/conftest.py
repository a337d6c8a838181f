"""Settings of every test: CPU only, reproducible hypothesis runs. Warnings are errors (pyproject.toml)."""

import os
import pathlib
import signal
import sys
import tempfile

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could choose its platform")
os.environ["JAX_PLATFORMS"] = "cpu"

# Engines of the same configuration share their compiled programs within one run, in subprocesses and between the
# workers of pytest-xdist too, which inherit the directory. jax's own cache is each worker's alone: jax does not write
# an entry as a whole, so another process might read a part of it.
worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if not worker:
    _cache = tempfile.TemporaryDirectory(prefix="jaxserve-tests-")
    os.environ["XDG_CACHE_HOME"] = _cache.name
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["XDG_CACHE_HOME"], "jax" + worker)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# A shell that runs the suite in the background has it ignore SIGINT; children that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from hypothesis import HealthCheck, settings

# No deadline: the first example of a test may compile a program. Derandomized: the same commit gives the same result.
settings.register_profile(
    "ci", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
# A developer's search for new counterexamples: `pytest --hypothesis-profile=explore`.
settings.register_profile("explore", parent=settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile("ci")

_WITHOUT_JAX = ("benchmarks", "frontend", "scheduler", "simulator")
"""Folders of tests that another jax cannot make fail: what they test never reaches jax, or only by way of a server."""


def pytest_collection_modifyitems(items):
    """Marks what `.ci/run` leaves out of its second lane."""
    here = pathlib.Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).parts[0] in _WITHOUT_JAX:
            item.add_marker("without_jax")
