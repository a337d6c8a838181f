"""torch's scaled-dot-product attention over the same shapes, with keys and values in one piece [B, K, S, D]."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.gpu import torch_device
from benchmarks.gpu.counts import kv_bytes
from benchmarks.gpu.peers import Shape, decode_shapes, prefill_shapes
from benchmarks.gpu.record import Record, Settings

PEER = "torch SDPA, not paged"


def run(settings: Settings, record: Record) -> None:
    """One case a shape; torch chooses the backend."""
    torch = torch_device.prepare(settings, record)
    for shape in prefill_shapes(settings) + decode_shapes(settings):
        record.case(
            f"{PEER}: {shape.label}",
            lambda shape=shape: measure(torch, settings, shape),
            **shape.fields(PEER),
        )


def measure(torch: Any, settings: Settings, shape: Shape) -> dict[str, Any]:
    """Time of one call; the calls take several sets of keys and values in turn."""
    heads = torch_device.heads_of(settings)
    random = functools.partial(torch_device.random, torch, settings)
    read = kv_bytes(heads, shape.batch * shape.context, 2)
    count = max(1, min(8, 4 * torch_device.CACHE_BYTES // read)) if settings.gpu else 1
    q = random(1, shape.batch, heads.query_heads, shape.new, heads.head_dim)
    size = (shape.batch, heads.kv_heads, shape.context, heads.head_dim)
    pairs = [(random(2 + 2 * n, *size), random(3 + 2 * n, *size)) for n in range(count)]
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=shape.kind == "prefill", enable_gqa=True
    )
    calls = [functools.partial(attend, q, k, v) for k, v in pairs]
    with torch.inference_mode():
        return torch_device.finish(settings, shape, torch_device.seconds_a_call(torch, settings, calls))
