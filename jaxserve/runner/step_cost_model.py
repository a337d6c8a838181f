"""Predicts step times on the runner's device from the rates of the device and the shape of the model."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

from jax.sharding import Mesh

from jaxserve.config.targets import LOCAL, Target, known_targets, load_target
from jaxserve.planning.roofline import RooflineCosts
from jaxserve.planning.step_cost_models import FittedCosts
from jaxserve.programs.step_programs import Shapes
from jaxserve.runner.protocol import StepCosts
from jaxserve.scheduler.step_shape import StepShape

_SLOW_BANDWIDTH = 1e10
_SLOW_FLOPS = 2e11
"""Rates of a device without a target, bytes/s and operations/s: those of a slow machine's two CPU cores."""


def step_costs(shapes: Shapes, mesh: Mesh, measured: FittedCosts | None = None) -> StepCosts:
    """Returns the predictor for the steps of `shapes` on the devices of `mesh`.

    measured: costs of the steps that were measured at warm-up, if they were; the largest step is predicted to take no
    less than without them, since they say little about contexts far beyond those measured.
    """
    costs = RooflineCosts(
        shapes.model,
        _target(mesh.devices.flat[0], shapes.dtype),
        dtype=shapes.dtype,
        pool_dtype=shapes.pool_dtype,
        page_size=shapes.page_size,
        max_model_len=shapes.max_model_len,
    )
    largest = largest_step(shapes)
    if measured is None:
        return StepCosts(costs.seconds, costs.seconds(largest))
    return StepCosts(measured.seconds, max(costs.seconds(largest), measured.seconds(largest)))


def largest_step(shapes: Shapes) -> StepShape:
    """Returns a step that no step of `shapes` exceeds: the largest buckets full of prompts' tokens at the end of the
    longest contexts, beside as many decodes of such contexts as the pages hold."""
    tokens, rows = shapes.buckets.tokens[-1], shapes.buckets.rows[-1]
    held = rows * shapes.max_model_len
    if shapes.groups.windows == (None,):  # pages that windows have left hold no position any more
        held = min(held, (shapes.num_pages - 1) * shapes.page_size)
    return StepShape(
        token_bucket=tokens,
        row_bucket=rows,
        decode_rows=rows,
        decode_context=float(held),
        prefill_tokens=tokens,
        prefill_pairs=float(tokens) * shapes.max_model_len,
        prefill_context=float(held),
        longest=float(shapes.max_model_len),
        swapped_pages=min(shapes.num_host_pages, shapes.num_pages - 1),
    )


def _target(device: Any, dtype: str) -> Target:
    """Returns the target that describes a jax device; a slow one when none does, or none that knows the dtype's
    rate."""
    for name in known_targets():
        target = load_target(name)
        if target.device_kind == device.device_kind and target.memory_bandwidth and target.peak_flops.get(dtype):
            return target
    rates = types.MappingProxyType({dtype: _SLOW_FLOPS})
    return dataclasses.replace(load_target(LOCAL), memory_bandwidth=_SLOW_BANDWIDTH, peak_flops=rates)
