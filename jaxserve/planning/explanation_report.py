"""Formats an explanation of a configuration as text and as JSON."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jaxserve.planning.explanation import Explanation
from jaxserve.planning.memory_plan import MARGIN_BYTES, pages_in_use

_MEANINGS = {
    "beyond gpu_memory_utilization": "left to the driver and to others",
    "weights": "",
    "state": "slots, hidden states, masks, penalty rows, what the host sends",
    "temporaries": "of the largest program",
    "code": "of all programs",
    "margin": "for what the compiler does not see",
    "pages": "",
    "unused": "",
}

_UNITS = {
    "sample": "rows",
    "pooling": "rows",
    "score": "rows",
    "table_write": "entries",
    "option_write": "slots",
    "mask_write": "masks",
    "penalty_write": "token ids",
    "swap_in": "pages",
    "swap_out": "pages",
    "page_copy": "pages",
}


def to_text(explanation: Explanation) -> str:
    """Formats the explanation as several paragraphs, with a table whose total is the device's memory."""
    paragraphs = [_model, _programs, _memory, _concurrency, _start, _decode]
    if explanation.gap is not None:
        paragraphs.append(_gap)
    return "\n\n".join("\n".join(paragraph(explanation)) for paragraph in paragraphs)


def _model(explanation: Explanation) -> Iterator[str]:
    shapes, target = explanation.shapes, explanation.target
    yield (
        f"{shapes.model.architecture}, {explanation.num_parameters / 1e6:,.2f}M parameters in {shapes.dtype}, "
        f"contexts of up to {shapes.max_model_len:,} tokens"
    )
    if shapes.model.quantization is not None:
        yield f"matrices: {shapes.model.quantization.text}"
    yield f"target {target.name}: {target.device_kind}, {_size(target.device_memory_bytes)} of memory"
    yield f"attention {shapes.attention}; keys and values in {shapes.pool_dtype}"
    routers = collections.Counter(layer.mlp.router for layer in shapes.model.layer_specs if layer.mlp.router)
    for router, count in routers.items():
        yield f"{count} layers have {router.num_experts} experts, of which a token goes through {router.per_token}"
    groups = shapes.groups
    if groups.windows != (None,):
        names = ["all positions" if window is None else f"a window of {window:,}" for window in groups.windows]
        counts = [f"{names.count(name)} with {name}" for name in dict.fromkeys(names)]
        yield (
            f"layers are of {len(names)} groups of {groups.size}, {' and '.join(counts)}; "
            f"{groups.padding} of their {groups.size * len(names)} places are padding"
        )


def _programs(explanation: Explanation) -> Iterator[str]:
    yield f"{sum(map(len, explanation.programs.values()))} programs, the closed set:"
    for kind, sizes in explanation.programs.items():
        unit = _UNITS.get(kind, "tokens")
        yield f"  {kind} of {', '.join(map(str, sizes))} {unit}"


def _memory(explanation: Explanation) -> Iterator[str]:
    plan, shapes = explanation.plan, explanation.shapes
    parts = plan.parts()
    meanings = _MEANINGS | {
        "swapped pages": _swapped(explanation),
        "pages": f"{plan.num_pages:,} pages of {plan.page:,} bytes, {shapes.page_size} tokens each",
        "unused": _unused(explanation),
    }
    if explanation.estimated:
        meanings["temporaries"] = "an ESTIMATE, from above, of the largest program's"
    yield f"memory of one device, gpu_memory_utilization {explanation.cache.gpu_memory_utilization:g}:"
    rows = [(name, f"{size:,}", _size(size), meanings[name]) for name, size in parts.items()]
    total = sum(parts.values())
    rows.append(("total", f"{total:,}", _size(total), "the device's memory"))
    yield from _table(("", "bytes", "", ""), rows, text_columns=(0, 3))
    if explanation.estimated:
        yield f"temporaries are an estimate: {explanation.estimated}"


def _swapped(explanation: Explanation) -> str:
    shapes, plan = explanation.shapes, explanation.plan
    if plan.device.host:
        return f"{shapes.num_host_pages:,} pages of swapped sequences and of the prefix cache"
    return f"on their way to and from {shapes.num_host_pages:,} pages of host memory"


def _unused(explanation: Explanation) -> str:
    plan = explanation.plan
    if plan.margin < MARGIN_BYTES:
        return f"and {MARGIN_BYTES - plan.margin:,} bytes of the margin are in use"
    if plan.parts()["unused"] < plan.page:
        return "less than a page"
    if explanation.cache.num_pages is not None or explanation.cache.kv_cache_memory_bytes is not None:
        return "the configuration sets the size of the pool"
    if plan.num_pages == pages_in_use(explanation.shapes):
        return "max_num_seqs sequences of max_model_len have no use for it"
    return f"attention {explanation.shapes.attention} takes no larger pool"


def _concurrency(explanation: Explanation) -> Iterator[str]:
    slots = explanation.shapes.num_slots
    fit = f"{explanation.pool_tokens:,} tokens fit into the pages"
    if explanation.shapes.groups.windows != (None,):
        fit = f"a request of {explanation.pool_tokens:,} tokens fits into the pages"
    yield f"{fit}. Greatest concurrency (max_num_seqs {slots}):"
    for one in explanation.concurrency:
        name = " (max_model_len)" if one.length == explanation.shapes.max_model_len else ""
        yield f"  {one.requests:,.1f} requests of {one.length:,} tokens{name}"
        if one.requests < 1:
            yield f"  a request of {one.length:,} tokens does not fit: lower max_model_len"


def _start(explanation: Explanation) -> Iterator[str]:
    start = explanation.start
    yield f"expected start: {start.seconds:.0f} s, the longer of"
    weights = _size(start.load_bytes)
    yield f"  loading {weights} of weights at {start.load_rate / 1e9:g} GB/s (stated): {start.load_seconds:.0f} s"
    yield f"  compiling on {start.workers} cores: {start.compile_seconds:.0f} s ({start.compile_source})"
    yield "  From a bundle or a filled compilation cache compiling takes next to nothing."


def _decode(explanation: Explanation) -> Iterator[str]:
    target = explanation.target
    if not target.memory_bandwidth:
        yield f"no bound of a decode step: target {target.name} states no memory bandwidth"
        return
    rate = target.peak_flops.get(explanation.shapes.dtype, 0.0)
    yield (
        f"bound of a decode step, at {target.memory_bandwidth / 1e12:g} TB/s and {rate / 1e12:g} TFLOP/s "
        f"({explanation.shapes.dtype}):"
    )
    rows = [
        (
            str(step.batch),
            f"{step.context:,}",
            f"{step.bytes / 1e9:.2f}",
            f"{step.flops / 1e9:,.0f}",
            f"{step.seconds * 1e3:.2f}",
            step.bound,
            f"{step.tokens_per_second:,.0f}",
        )
        for step in explanation.decode_steps
    ]
    yield from _table(("batch", "context", "GB", "GFLOP", "ms", "limited by", "tokens/s"), rows, text_columns=(5,))


def _gap(explanation: Explanation) -> Iterator[str]:
    gap = explanation.gap
    assert gap is not None
    if gap.unknown:
        yield f"max_decode_gap {gap.bound * 1e3:g} ms: its cost is unknown, {gap.unknown}"
        return
    yield (
        f"max_decode_gap {gap.bound * 1e3:g} ms, promised where decodes alone take up to "
        f"{gap.promised_seconds * 1e3:.3g} ms; prompt tokens beside decodes ({gap.cost_name}):"
    )
    rows = [
        (
            str(cost.rows),
            f"{cost.context:,}",
            f"{cost.decode_seconds * 1e3:.2f}",
            f"{cost.tokens:,}" if cost.kept else f"({cost.tokens:,})",
            f"{cost.seconds * 1e3:.2f}",
            f"{cost.rate:,.0f}",
            f"{cost.free_tokens:,}",
            f"{cost.free_seconds * 1e3:.2f}",
            f"{cost.free_rate:,.0f}",
            f"{100 * cost.rate / cost.free_rate:.0f}" if cost.free_tokens else "",
        )
        for cost in gap.costs
    ]
    head = ("rows", "context", "alone ms", "tokens/step", "ms", "tokens/s", "without: tokens", "ms", "tokens/s", "%")
    yield from _table(head, rows, text_columns=())
    if not all(cost.kept for cost in gap.costs):
        yield "  (in parentheses: the smallest chunk, with which prompts progress, exceeds the bound)"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int]) -> Iterator[str]:
    """Formats columns of equal width, numbers right-aligned, text left-aligned."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = [
            cell.ljust(width) if column in text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def _size(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size} B"


def to_json(explanation: Explanation) -> dict[str, Any]:
    """Converts the explanation to values for `json.dump`; sizes in bytes, times in seconds."""
    shapes, target, plan, start = explanation.shapes, explanation.target, explanation.plan, explanation.start
    return {
        "target": {
            "name": target.name,
            "device_kind": target.device_kind,
            "device_memory_bytes": target.device_memory_bytes,
            "memory_bandwidth": target.memory_bandwidth,
            "peak_flops": target.peak_flops.get(shapes.dtype, 0.0),
        },
        "model": {
            "architecture": shapes.model.architecture,
            "num_parameters": explanation.num_parameters,
            "dtype": shapes.dtype,
            "quantization": shapes.model.quantization.text if shapes.model.quantization else None,
            "max_model_len": shapes.max_model_len,
        },
        "attention": shapes.attention,
        "kv_cache_dtype": shapes.pool_dtype,
        "programs": {kind: list(sizes) for kind, sizes in explanation.programs.items()},
        "num_programs": sum(map(len, explanation.programs.values())),
        "memory": {
            "gpu_memory_utilization": explanation.cache.gpu_memory_utilization,
            "limit_bytes": plan.device.limit,
            "parts": plan.parts(),
            "total_bytes": sum(plan.parts().values()),
            "temporaries_estimated": explanation.estimated,
            "page_bytes": plan.page,
            "page_size": shapes.page_size,
            "num_pages": plan.num_pages,
            "pool_tokens": explanation.pool_tokens,
            "groups": {
                "layers": shapes.groups.size,
                "windows": list(shapes.groups.windows),
                "padding": shapes.groups.padding,
            },
        },
        "concurrency": [dataclasses.asdict(one) for one in explanation.concurrency],
        "start": {
            **dataclasses.asdict(start),
            "load_seconds": start.load_seconds,
            "seconds": start.seconds,
        },
        "decode_steps": [
            {**dataclasses.asdict(step), "tokens_per_second": step.tokens_per_second}
            for step in explanation.decode_steps
        ],
        "max_decode_gap": None if explanation.gap is None else dataclasses.asdict(explanation.gap),
    }
