"""What the engine asks of a runner. Imports no jax, so that an engine over a fake runner needs no device."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from jaxserve.phases import Phase
from jaxserve.scheduler.costs import PreemptionCosts
from jaxserve.scheduler.plan import StepPlan, StepResult

Pending = Any
"""What `dispatch` returns and `collect` takes: a step under way."""


@dataclasses.dataclass(frozen=True)
class RunnerInfo:
    """What a runner turned out to be; the meaning of the fields is that of `EngineReady`.

    num_pages counts the null page. num_host_pages: pages of host memory for swapped sequences. preemption_costs:
    measured at warm-up; None where nothing can be swapped.
    """

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    page_size: int
    num_pages: int
    num_parameters: int
    architecture: str
    dtype: str
    platform: str
    attention: str
    num_executables: int
    compile_seconds: float
    kv_cache: str
    bundle: str | None = None
    num_cached_executables: int = 0
    phases: tuple[Phase, ...] = ()
    memory: tuple[tuple[str, int], ...] = ()
    num_host_pages: int = 0
    preemption_costs: PreemptionCosts | None = None


class Runner(Protocol):
    """Carries out steps in the order of dispatch."""

    @property
    def info(self) -> RunnerInfo: ...

    @property
    def num_compilations(self) -> int:
        """Programs that the backend has compiled so far, whoever asked for them."""
        ...

    @property
    def compile_misses(self) -> int:
        """Steps that asked for a program outside the compiled set."""
        ...

    def dispatch(self, plan: StepPlan) -> Pending:
        """Starts a step and returns without waiting for it. Rows may refer to ids of steps not collected yet."""
        ...

    def done(self, pending: Pending) -> bool:
        """Whether the device has finished a step; never waits. A step whose results have gone to the next is done."""
        ...

    def collect(self, pending: Pending) -> StepResult:
        """Waits for a step and returns its sampled ids: the one place where the host waits for the device."""
        ...
