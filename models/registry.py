"""Registers the model families that can be served, by the name that a `config.json` gives them. Imports no jax.

To add one, write its file in models/families/ and list it here (docs/models.md).
"""

from __future__ import annotations

import difflib

from jaxserve.models.families.family import Family
from jaxserve.models.families.gemma2 import GEMMA2
from jaxserve.models.families.gemma3 import GEMMA3
from jaxserve.models.families.gpt2 import GPT2
from jaxserve.models.families.gpt_oss import GPT_OSS
from jaxserve.models.families.granite import GRANITE
from jaxserve.models.families.llama import LLAMA
from jaxserve.models.families.ministral import MINISTRAL
from jaxserve.models.families.ministral3 import MINISTRAL3
from jaxserve.models.families.mistral import MISTRAL
from jaxserve.models.families.mixtral import MIXTRAL
from jaxserve.models.families.olmo2 import OLMO2
from jaxserve.models.families.opt import OPT
from jaxserve.models.families.phi3 import PHI3
from jaxserve.models.families.qwen2 import QWEN2
from jaxserve.models.families.qwen2_moe import QWEN2_MOE
from jaxserve.models.families.qwen3 import QWEN3
from jaxserve.models.families.qwen3_moe import QWEN3_MOE
from jaxserve.models.families.smollm3 import SMOLLM3
from jaxserve.models.families.starcoder2 import STARCODER2
from jaxserve.models.value_checks import brief

FAMILIES = (
    GEMMA2, GEMMA3, GPT2, GPT_OSS, GRANITE, LLAMA, MINISTRAL, MINISTRAL3, MISTRAL, MIXTRAL, OLMO2, OPT, PHI3, QWEN2,
    QWEN2_MOE, QWEN3, QWEN3_MOE, SMOLLM3, STARCODER2,
)  # fmt: skip

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
