"""FlashInfer over the same shapes and the same pages [pages, 2, K, P, D] ("HND"), where it is installed.

It may compile its kernels on first use, which takes a compiler and minutes; the part's time bounds that.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.gpu import torch_device
from benchmarks.gpu.counts import kv_bytes
from benchmarks.gpu.peers import Shape, decode_shapes, prefill_shapes
from benchmarks.gpu.record import AbsentError, Record, Settings

PEER = "FlashInfer"
POSITIONS = 524_288
WORKSPACE_BYTES = 512 * 2**20


def run(settings: Settings, record: Record) -> None:
    """One case a shape."""
    if not settings.gpu:
        torch_device.load("flashinfer")
        raise AbsentError("FlashInfer needs a GPU")
    torch = torch_device.prepare(settings, record)
    library = torch_device.load("flashinfer")
    record.summary |= {"flashinfer": getattr(library, "__version__", "unknown")}
    heads = torch_device.heads_of(settings)
    cache = torch_device.random(torch, settings, 0, POSITIONS // 64, 2, heads.kv_heads, 64, heads.head_dim)
    for shape in decode_shapes(settings) + prefill_shapes(settings):
        record.case(
            f"{PEER}: {shape.label}",
            lambda shape=shape: measure(torch, library, settings, shape, cache),
            **shape.fields(PEER),
        )


def measure(torch: Any, library: Any, settings: Settings, shape: Shape, cache: Any) -> dict[str, Any]:
    """Time of one call; planning, which a serving engine does once a step for all layers, is not in it."""
    heads = torch_device.heads_of(settings)
    read = kv_bytes(heads, shape.batch * shape.context, 2)
    count = max(1, min(8, 4 * torch_device.CACHE_BYTES // read))
    tokens = shape.batch * shape.new
    calls = []
    for number in range(count):
        table = page_lists(torch, shape, cache, settings.seed + number)
        q = torch_device.random(torch, settings, number, tokens, heads.query_heads, heads.head_dim)
        calls.append(functools.partial(planned(torch, library, shape, table, heads, cache).run, q, cache))
    return torch_device.finish(settings, shape, torch_device.seconds_a_call(torch, settings, calls))


def page_lists(torch: Any, shape: Shape, cache: Any, seed: int) -> dict[str, Any]:
    """FlashInfer's form of a page table: offsets of each row, its pages, and how full its last page is."""
    each = -(-shape.context // shape.page_size)
    order = np.random.default_rng(seed).permutation(cache.shape[0])
    chosen = order[np.arange(shape.batch * each) % order.size]
    last = shape.context - (each - 1) * shape.page_size

    def on_device(values: np.ndarray) -> Any:
        return torch.from_numpy(values.astype(np.int32)).to(cache.device)

    return {
        "indptr": on_device(np.arange(shape.batch + 1) * each),
        "indices": on_device(chosen),
        "last": on_device(np.full(shape.batch, last)),
        "queries": on_device(np.arange(shape.batch + 1) * shape.new),
    }


def planned(torch: Any, library: Any, shape: Shape, table: dict[str, Any], heads: Any, cache: Any) -> Any:
    """A wrapper that has planned this batch."""
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=cache.device)
    options = {"q_data_type": cache.dtype, "kv_data_type": cache.dtype}
    sizes = (heads.query_heads, heads.kv_heads, heads.head_dim, shape.page_size)
    if shape.kind == "decode":
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(table["indptr"], table["indices"], table["last"], *sizes, **options)
        return wrapper
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    wrapper.plan(table["queries"], table["indptr"], table["indices"], table["last"], *sizes, causal=True, **options)
    return wrapper
