"""jaxserve: a serving engine for large language models on JAX/XLA.

The engines are imported on first use, so that the scheduler, the configuration and the clients load without jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxserve.sampling_params import RequestOutputKind, SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from jaxserve.async_llm import AsyncLLM
    from jaxserve.beam_search_api import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from jaxserve.llm import LLM
    from jaxserve.pooling_params import PoolingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "PoolingParams",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
]
__version__ = "0.1.0"


_MODULES = {
    "LLM": "jaxserve.llm",
    "AsyncLLM": "jaxserve.async_llm",
    "BeamSearchOutput": "jaxserve.beam_search_api",
    "BeamSearchParams": "jaxserve.beam_search_api",
    "BeamSearchSequence": "jaxserve.beam_search_api",
    "PoolingParams": "jaxserve.pooling_params",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        import importlib

        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
