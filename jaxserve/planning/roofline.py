"""Computes step costs from a device's peak rates and a model's shape, without a device or weights.

A step's parts run one after another and each takes the longer of its two bounds:

    matrices      weights read once; token_bucket tokens through the layers, padding computed
    head          output matrix and logits of row_bucket rows
    decode        keys and values of every position of the decoding rows
    prefill       attention of the chunks: pairs of tokens, or the positions that they read

at the shares of the peak rates in `Efficiency`. A report of `jaxserve.compile` replaces the counts of matrices and head
by what the compiled programs move and compute.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from jaxserve.config.checks import between
from jaxserve.config.targets import Target
from jaxserve.models.config import ModelConfig
from jaxserve.models.layer_groups import layer_groups
from jaxserve.planning.model_cost import ITEM_BYTES, ModelCost
from jaxserve.planning.step_cost_models import HostCosts
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.scheduler.step_shape import StepShape


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Holds the fractions of a device's peak rates that the programs reach.

    The defaults are those of this engine's steps with Llama-3.1-8B on an H200, within 15 % of most
    (benchmarks/results/gpu_engine_h200_jax0.11.2.json): the first three were fitted to them, the fourth is the kernel's
    own.

    Attributes:
        memory: of the bandwidth, weights and logits; a copy reaches 0.88.
        compute: of the matrix rate, in whole steps; a single bfloat16 product of 8,192 x 8,192 reaches 0.70.
        decode_attention: of the bandwidth.
        prefill_attention: of the matrix rate; 317 of 989.5 TFLOP/s.
        launch_seconds: of a step, beyond its programs' work.
        link_bytes: bytes/s between device and host memory.
    """

    memory: float = 0.68
    compute: float = 0.63
    decode_attention: float = 0.71
    prefill_attention: float = 0.32
    launch_seconds: float = 3e-4
    link_bytes: float = 4e10

    def __post_init__(self) -> None:
        for name in ("memory", "compute", "decode_attention", "prefill_attention"):
            between(name, getattr(self, name), 0.01, 1.0)
        between("launch_seconds", self.launch_seconds, 0.0)
        between("link_bytes", self.link_bytes, 1.0)


class RooflineCosts:
    """Implements `CostModel` for a model on a target."""

    def __init__(
        self,
        model: ModelConfig,
        target: Target,
        *,
        dtype: str,
        pool_dtype: str,
        page_size: int,
        max_model_len: int | None = None,
        efficiency: Efficiency = Efficiency(),
        host: HostCosts = HostCosts(),
        report: pathlib.Path | None = None,
    ):
        """Initializes the costs. max_model_len: tokens of the longest sequence, on which groups of layers depend; None
        for the model's context. report: report.json of `jaxserve.compile` for this target and model.

        Raises ValueError where the target states no rates, or the report is another target's.
        """
        if not target.memory_bandwidth or not target.peak_flops.get(dtype):
            raise ValueError(
                f"target {target.name} has no memory bandwidth, or no peak rate of {dtype}; a roofline needs both: "
                "choose another target, or give measured costs"
            )
        self.host = host
        self.cost = ModelCost.of(model, dtype, pool_dtype)
        self._vocab_size = model.vocab_size
        self._bandwidth = target.memory_bandwidth * efficiency.memory
        self._flops = target.peak_flops[dtype] * efficiency.compute
        self._launch = efficiency.launch_seconds
        token_seconds = self.cost.token_bytes / (target.memory_bandwidth * efficiency.decode_attention)
        self._position_seconds = token_seconds
        self._pair_seconds = self.cost.attention_flops / (target.peak_flops[dtype] * efficiency.prefill_attention)
        groups = layer_groups(model.layer_kinds, page_size, max_model_len or model.context_length)
        layer_bytes = page_size * self.cost.token_bytes / model.num_hidden_layers
        self._copy_seconds = groups.size * layer_bytes / efficiency.link_bytes
        self._programs = _read_report(report, target, self.cost, dtype) if report is not None else {}
        self._fixed: dict[tuple[int, int], float] = {}
        source = "roofline" if report is None else "roofline of the compiled programs"
        self.name = f"{source}, {model.architecture} in {dtype} on {target.device_kind}"
        per_token = 2 * self.cost.multiplied / self._flops
        self.preemption = PreemptionCosts(per_token, 2 * self._copy_seconds)

    def seconds(self, shape: StepShape) -> float:
        """Returns the seconds of one step."""
        seconds = self._of_buckets(shape)
        if shape.prefill_tokens:
            pairs, chunks = self.cost.seen(shape.prefill_pairs, shape.prefill_tokens), shape.prefill_context
            if self.cost.windows:  # as if there were one chunk, with the window in front of its first token
                chunks = min(chunks, shape.prefill_tokens + self.cost.seen(chunks, 1))
            seconds += max(self._pair_seconds * pairs, self._position_seconds * chunks)
        if shape.swapped_pages:
            seconds += self._copy_seconds * shape.swapped_pages
        return float(seconds + self._position_seconds * self.cost.seen(shape.decode_context, shape.decode_rows))

    def stretch_seconds(self, shape: StepShape, steps: int) -> np.ndarray:
        """Returns the seconds of a decode-only step and those after it, float64 [steps]."""
        context = shape.decode_context + shape.decode_rows * np.arange(steps)
        if self.cost.windows:
            context = np.array([self.cost.seen(float(one), shape.decode_rows) for one in context])
        return self._of_buckets(shape) + self._position_seconds * context

    def _of_buckets(self, shape: StepShape) -> float:
        decode_only = not shape.prefill_tokens
        key = (shape.token_bucket if decode_only else -shape.token_bucket), shape.row_bucket
        seconds = self._fixed.get(key)
        if seconds is None:
            kind = "decode" if decode_only else "forward"
            seconds = self._launch + self._longer(kind, shape.token_bucket)
            seconds += self._longer("sample", shape.row_bucket) if shape.row_bucket else 0.0
            self._fixed[key] = seconds
        return seconds

    def _longer(self, kind: str, size: int) -> float:
        moved, flops = self._programs.get((kind, size)) or self._counted(kind, size)
        return max(moved / self._bandwidth, flops / self._flops)

    def _counted(self, kind: str, size: int) -> tuple[float, float]:
        """Returns the bytes and operations of a program, without attention."""
        cost = self.cost
        if kind == "sample":
            logits = 2 * 4 * size * self._vocab_size  # float32, written and read once
            return cost.head_bytes + logits, 2.0 * cost.head * size
        rows = size * cost.embedding_row
        moved = cost.layer_bytes(size) + (cost.norms + rows) * cost.item_bytes + size * cost.token_bytes
        return moved, 2.0 * cost.multiplied * size


def _read_report(
    path: pathlib.Path, target: Target, cost: ModelCost, dtype: str
) -> dict[tuple[str, int], tuple[float, float]]:
    """Reads bytes and operations by kind and size of program, without those of attention, which the step's rows
    determine.

    The report counts a decode program with a full bucket of rows of one context, a forward program with one prompt.
    """
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        name, steps = told["target"]["name"], told["decode_steps"]
        context = min((step["context"] for step in steps), default=0)
        programs = {
            (program["kind"], program["size"]): (
                program["bytes_read"] + program["bytes_written"],
                sum(program["flops"].values()),
            )
            for program in told["programs"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"report {path} is not one of jaxserve.compile: {error!r}") from error
    if name != target.name:
        raise ValueError(f"report {path} is for the target {name}; the target is {target.name}")
    found = {}
    for (kind, size), (moved, flops) in programs.items():
        positions, pairs = 0, 0.0
        if kind == "decode":
            positions = pairs = size * context
        elif kind == "forward":
            positions, pairs = size, size * (size + 1) / 2
        found[kind, size] = (
            max(0.0, moved - positions * cost.token_bytes),
            max(0.0, flops - pairs * cost.attention_flops),
        )
    return found


def pool_pages(
    model: ModelConfig, target: Target, *, dtype: str, pool_dtype: str, page_size: int, **limits: Any
) -> int:
    """Estimates the pages, the null page included, that fit besides the weights, without compiling.

    limits: gpu_memory_utilization, max_num_batched_tokens, max_num_seqs, max_model_len. `jaxserve.explain` reports the
    compiler's own figure; for Llama-3.1-8B on an H200 they are less than 1 % apart. Raises ValueError where not even
    one sequence fits.
    """
    cost = ModelCost.of(model, dtype, pool_dtype)
    tokens, rows = limits["max_num_batched_tokens"], limits["max_num_seqs"]
    through = max(layer.mlp.router.per_token if layer.mlp.router else 1 for layer in model.layer_specs)
    widest = tokens * through * (2 * model.intermediate_size + 2 * model.hidden_size) * ITEM_BYTES[dtype]
    temporaries = widest + 2 * rows * model.vocab_size * 4 + _MARGIN_BYTES
    left = target.device_memory_bytes * limits["gpu_memory_utilization"] - cost.weight_bytes - temporaries
    groups = layer_groups(model.layer_kinds, page_size, limits["max_model_len"])
    page_bytes = page_size * cost.token_bytes // model.num_hidden_layers * groups.size
    most = groups.most_pages(rows, limits["max_model_len"], page_size, tokens) + 1
    pages = min(int(left // page_bytes), most)
    if pages < 2:
        raise ValueError(
            f"target {target.name} has {target.device_memory_bytes / 1e9:.1f} GB; {cost.weight_bytes / 1e9:.1f} GB of "
            "weights leave no room for pages: choose a larger device"
        )
    return pages


_MARGIN_BYTES = 512 * 1024 * 1024
"""Allowance for code, workspace and memory unknown to the compiler."""
