"""Registers the model families that can be served, by the name that a `config.json` gives them. Imports no jax.

To add one, write its file in models/families/ and list it here (docs/models.md).
"""

from __future__ import annotations

import difflib

from jaxserve.models.families.family import Family
from jaxserve.models.families.llama import LLAMA
from jaxserve.models.families.mistral import MISTRAL
from jaxserve.models.families.qwen2 import QWEN2
from jaxserve.models.families.qwen3 import QWEN3
from jaxserve.models.value_checks import brief

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)

ARCHITECTURES: dict[str, Family] = {family.architecture: family for family in FAMILIES}


def lookup(architecture: str) -> Family:
    """Returns the family of an architecture. Raises ValueError, with the known names, where it is not known."""
    if architecture not in ARCHITECTURES:
        near = difflib.get_close_matches(architecture, ARCHITECTURES, n=3, cutoff=0.75)
        told = f"near ones are {', '.join(near)}; " if near else ""
        raise ValueError(
            f"model architecture is {brief(architecture)}; {told}known architectures are "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[architecture]
