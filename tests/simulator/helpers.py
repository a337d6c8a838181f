"""A small engine to simulate, whose steps cost what can be worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxserve.config.settings import EngineConfig
from jaxserve.models.config import ModelConfig
from jaxserve.planning.step_cost_models import HostCosts
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.scheduler.step_shape import StepShape
from jaxserve.simulator.simulated_engine import SimulatedDevice

MODEL = ModelConfig("LlamaForCausalLM", 1000, 64, 160, 3, 4, 2, 16, 512)


@dataclasses.dataclass(frozen=True)
class SimpleCosts:
    """step seconds a step, token a token of its bucket, position a position that its decoding rows attend to."""

    step: float = 1.0
    token: float = 0.0
    position: float = 0.0
    host: HostCosts = HostCosts(0.0, 0.0, 0.0, 0.0)
    preemption: PreemptionCosts = PreemptionCosts(1e-3, 1e-3)
    name: str = "simple"

    def seconds(self, shape: StepShape) -> float:
        return self.step + self.token * shape.token_bucket + self.position * shape.decode_context

    def stretch_seconds(self, shape: StepShape, steps: int) -> np.ndarray:
        context = shape.decode_context + shape.decode_rows * np.arange(steps)
        return self.step + self.token * shape.token_bucket + self.position * context


def make_config(**options: Any) -> EngineConfig:
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 16}
    return EngineConfig.from_options(architecture=MODEL, load_format="dummy", **small | options)


def make_device(num_pages: int = 65, num_host_pages: int = 0) -> SimulatedDevice:
    return SimulatedDevice(num_pages, 256, "gpu", num_host_pages)
