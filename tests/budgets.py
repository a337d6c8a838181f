"""How much the property tests do: a fixed amount in every check, much more in `make test-all`."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

ALL = os.environ.get("JAXSERVE_TEST_ALL") == "1"
"""Whether this is `make test-all`: tests marked `long` run too, and property tests draw other cases every time."""

TIMES = 20
"""Examples of a property test in such a run, for one in every check."""


def load_profile() -> None:
    """Sets what every property test has in common; to be called before the modules of tests are imported."""
    # No deadline: the first example of a test may compile a program. Derandomized: the same commit gives the same
    # result. A failure prints the line that repeats it.
    settings.register_profile(
        "jaxserve",
        deadline=None,
        derandomize=not ALL,
        max_examples=100 * (TIMES if ALL else 1),
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("jaxserve")


def budget(examples: int, **more: Any) -> settings:
    """Gives a property test a budget of its own: `examples` in every check, `TIMES` as many in `make test-all`.

    Args:
        more: further settings of hypothesis.
    """
    return settings(max_examples=examples * (TIMES if ALL else 1), **more)
