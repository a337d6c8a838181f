"""The runner that computes: weights, pages and slots on the devices, and the compiled programs over them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxserve.config.failpoints import Failpoints, InjectedFaultError
from jaxserve.config.settings import EngineConfig
from jaxserve.programs.compiler import CompilationCounter, CompileMissError, ProgramSet
from jaxserve.programs.step_programs import ProgramKey, Shapes, program_keys
from jaxserve.programs.swap_programs import swap_blocks, swap_in_vector
from jaxserve.runner.packing import ForwardPacker, SamplePacker
from jaxserve.runner.protocol import StepNotStartedError
from jaxserve.runner.startup import Startup
from jaxserve.runner.step_cost_model import step_costs
from jaxserve.runner.swap_timing import measure, swap_plans
from jaxserve.scheduler.plan import NO_DECODES, StepPlan, StepResult, Swap
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.telemetry.startup_spans import Phases

_COUNTER = CompilationCounter()  # one listener a process: jax keeps listeners for good


@dataclasses.dataclass(frozen=True)
class PendingStep:
    """A dispatched step.

    hidden: what its forward program made, until the next step takes it. ids: its sampled ids on the device, int32 [row
    bucket], the first `count` of them real; None where no row samples.
    """

    hidden: jax.Array
    ids: jax.Array | None
    count: int


class _Call(NamedTuple):
    """A program and the packed step that it is called with."""

    program: Callable[..., Any]
    vector: np.ndarray


def annotate(name: str) -> contextlib.AbstractContextManager[object]:
    """Names what the host does inside the `with`, where jax's profiler is on."""
    return jax.profiler.TraceAnnotation(name)


class ModelRunner:
    """Runner over a model: carries out steps over what `Startup` has made."""

    def __init__(
        self, config: EngineConfig, *, progress: bool = False, phases: Phases | None = None, server: bool = False
    ):
        """Starts.

        Args:
            config: the engine's settings.
            progress: shows how far compiling is.
            phases: of this process so far; those of this start are added.
            server: the engine is a server's; `EngineConfig.ready_when` "auto" depends on it.
        """
        phases = Phases() if phases is None else phases
        startup = Startup(config, progress=progress, phases=phases, server=server)
        made = startup.make()
        self._failpoints = Failpoints(config.failpoints)
        self._shapes, self._programs, self._weights = made.shapes, made.programs, made.weights
        self._arrays, self._host_pages = made.arrays, made.host_pages
        self._copies = made.mesh.devices.flat[0].platform != "cpu"  # there the host reads the device's own memory
        self._forward_packers, self._sample_packers = packers(self._shapes)
        self.compile_misses = 0
        with phases.phase("warm-up"):
            self._warm_up()
            costs = self._measure_costs() if self._shapes.num_host_pages else None
        startup.log_allocator()
        self.info = startup.info(made, costs)
        self.step_costs = step_costs(self._shapes, made.mesh)
        startup.finish(made)

    @property
    def num_compilations(self) -> int:
        return _COUNTER.count

    @property
    def programs(self) -> ProgramSet:
        return self._programs

    @property
    def num_executables(self) -> int:
        return len(self._programs.executables)

    def fitted(self, plan: StepPlan) -> StepPlan:
        if not self._programs.missing:
            return plan
        tokens = self._programs.standing_in(self._shapes.forward_key(plan)).size
        rows = self._programs.standing_in(ProgramKey("sample", plan.row_bucket)).size if plan.row_bucket else 0
        return dataclasses.replace(plan, token_bucket=tokens, row_bucket=rows)

    def dispatch(self, plan: StepPlan) -> PendingStep:
        arrays, begun, swapped = self._arrays, False, False  # begun: what was enqueued must not be enqueued again
        try:
            with annotate("Execute"):
                forward, sample = self._prepare(plan)
                begun = bool(plan.swaps)
                for swap in plan.swaps:
                    self._swap(swap)
                swapped, begun = begun, False
                self._fail_at("enqueue", plan)
                self._forward(forward)
                self._fail_at("execute", plan, lose=True)
            if sample is None:
                return PendingStep(arrays.hidden, None, 0)
            with annotate("Sample"):
                ids = self._sample(sample)
                begun = True
                if self._copies:
                    ids.copy_to_host_async()
            return PendingStep(arrays.hidden, ids, plan.num_sampled)
        except Exception as error:
            # Computing the same tokens a second time writes the same keys and values; copying pages twice does not.
            if begun or not self._arrays.intact:
                raise
            raise StepNotStartedError(f"{type(error).__name__}: {error}", swapped=swapped) from error

    def done(self, pending: PendingStep) -> bool:
        if pending.ids is not None:
            return pending.ids.is_deleted() or _is_ready(pending.ids)
        return pending.hidden.is_deleted() or _is_ready(pending.hidden)

    def collect(self, pending: PendingStep) -> StepResult:
        self._fail_at("collect", None, lose=True)
        if pending.ids is None:
            return StepResult(())
        return StepResult(np.asarray(pending.ids)[: pending.count])

    def reset(self) -> None:
        self._arrays.delete()
        self._host_pages.forget_transit()
        self._arrays.make()

    def _prepare(self, plan: StepPlan) -> tuple[_Call, _Call | None]:
        """Packs a step and finds all of its programs, so that what can fail on the host does so before any of them."""
        self._fail_at("pack", plan)
        for swap in plan.swaps:
            for size in swap_blocks(len(swap.copies)):
                self._program(ProgramKey("swap_out" if swap.slot is None else "swap_in", size))
        forward = self._forward_call(self._shapes.forward_key(plan), plan)
        return forward, self._sample_call(plan.row_bucket, plan) if plan.row_bucket else None

    def _forward_call(self, key: ProgramKey, plan: StepPlan) -> _Call:
        key = self._programs.standing_in(key)
        return _Call(self._program(key), self._forward_packers[key.size].pack(plan))

    def _sample_call(self, rows: int, plan: StepPlan) -> _Call:
        key = self._programs.standing_in(ProgramKey("sample", rows))
        return _Call(self._program(key), self._sample_packers[key.size].pack(plan))

    def _forward(self, call: _Call) -> None:
        arrays = self._arrays
        arrays.pools, arrays.slots, arrays.hidden = call.program(
            self._weights, arrays.pools, arrays.slots, arrays.hidden, call.vector
        )

    def _sample(self, call: _Call) -> jax.Array:
        arrays = self._arrays
        arrays.slots, ids = call.program(self._weights.params, arrays.slots, arrays.hidden, call.vector)
        return ids

    def _fail_at(self, point: str, plan: StepPlan | None, *, lose: bool = False) -> None:
        """Passes a failpoint. lose: as after a program that fails in execution, its donated arguments are gone."""
        if not self._failpoints:
            return
        try:
            self._failpoints.hit(point, () if plan is None else plan.request_ids)
        except InjectedFaultError:
            if lose:
                self._arrays.delete()
            raise

    def _swap(self, swap: Swap) -> None:
        """Starts the programs that copy a sequence's pages; each reads what the one before it left."""
        arrays, begin = self._arrays, 0
        for size in swap_blocks(len(swap.copies)):
            block = swap.copies[begin : begin + size]
            sources, destinations = [copy.source for copy in block], [copy.destination for copy in block]
            self._host_pages.wait_for_room(size)
            if swap.slot is None:
                pages = self._program(ProgramKey("swap_out", size))(arrays.pools, np.array(sources, np.int32))
                self._host_pages.store(destinations, pages)
            else:
                program = self._program(ProgramKey("swap_in", size))
                pages, vector = self._host_pages.take(sources), swap_in_vector(destinations, swap.slot, begin)
                arrays.pools, arrays.slots, placed = program(arrays.pools, arrays.slots, pages, vector)
                self._host_pages.taken(size, placed)
            begin += size

    def _program(self, key: ProgramKey) -> Callable[..., Any]:
        try:
            return self._programs.get(key)
        except CompileMissError:
            self.compile_misses += 1
            raise

    def _warm_up(self) -> None:
        """Runs every program that is there once on padding alone, so that the first request finds them loaded."""
        nothing = StepPlan(-1, NO_DECODES, (), token_bucket=0, row_bucket=0, num_tokens=0, num_sampled=0)
        for key in program_keys(self._shapes):
            if key in self._programs.missing:
                continue
            if key.kind == "sample":
                self._sample(self._sample_call(key.size, nothing)).block_until_ready()
            elif key.kind in ("forward", "decode"):
                self._forward(self._forward_call(key, nothing))
        for size in self._shapes.swap_sizes:
            for swap in swap_plans(size, null=True):
                self._swap(swap)

    def _measure_costs(self) -> PreemptionCosts:
        """What a preemption costs here; nothing may run yet."""

        def compute(plan: StepPlan) -> None:
            self._forward(self._forward_call(self._shapes.forward_key(plan), plan))
            jax.block_until_ready(self._arrays.hidden)

        def swap(swap: Swap) -> None:
            self._swap(swap)
            self._host_pages.wait()
            jax.block_until_ready(self._arrays.pools)

        jax.block_until_ready(self._arrays.pools)
        return measure(self._shapes, compute, swap)


def _is_ready(array: Any) -> bool:
    """Whether an array is computed; jax's own type stubs do not have the method."""
    return array.is_ready()


def packers(shapes: Shapes) -> tuple[dict[int, ForwardPacker], dict[int, SamplePacker]]:
    """What packs the steps of each forward program, by token bucket, and of each sample program, by row bucket."""
    buckets, num_slots = shapes.buckets, shapes.num_slots
    forward = {size: ForwardPacker(size, buckets.rows_of(size), shapes.page_size, num_slots) for size in buckets.tokens}
    return forward, {size: SamplePacker(size, num_slots) for size in buckets.rows}
