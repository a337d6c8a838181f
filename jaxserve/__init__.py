"""jaxserve: a serving engine for large language models on JAX/XLA.

`LLM` is imported on first use, so that the scheduler, the configuration and the clients load without jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxserve.request import RequestOutputKind, SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM

__all__ = ["LLM", "RequestOutputKind", "SamplingParams", "StructuredOutputsParams"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LLM":
        import importlib

        return importlib.import_module("jaxserve.llm").LLM
    raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
