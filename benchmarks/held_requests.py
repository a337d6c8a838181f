"""How many requests the pages of a device hold, for models whose layers alternate between windows and all positions.

    python -m benchmarks.held_requests [--target h200] [--length 32768]

Two parts. First the memory plan of the target for the shapes of Gemma 3 12B and gpt-oss-20b (layer kinds, heads,
windows; no weights are loaded): requests of `--length` tokens that fit with groups of layers, and with one page table
for all layers, which keeps every page of every layer. Nothing is compiled: temporaries are the estimate of
`jaxserve.explain`, from above. gpt-oss-20b's weights are those that its model card states (arXiv 2508.10925: 12.8 GiB,
MXFP4 experts), since a dense MLP stands for its experts here; all others are counted.

Then an engine in this process with a small model whose layers alternate, random weights, and requests that grow far
beyond the window: pages in use of each group, with groups and with one group for all layers, at the same bytes.

Writes JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import report
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.engine.messages import AddRequest
from jaxserve.models.config import ModelConfig
from jaxserve.models.layer_groups import layer_groups
from jaxserve.models.layer_specs import LayerSpec, MLPSpec, SelfAttentionSpec
from jaxserve.planning.explanation import explain
from jaxserve.programs.target_devices import load_target
from jaxserve.request import EngineRequest

GIB = 1024**3


def layers(windows: Sequence[int | None], wide: int, **attention: Any) -> tuple[LayerSpec, ...]:
    """Layers of these windows."""
    return tuple(LayerSpec(SelfAttentionSpec(sliding_window=one, **attention), MLPSpec(wide)) for one in windows)


GEMMA = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=262144,
    hidden_size=3840,
    intermediate_size=15360,
    num_hidden_layers=48,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=256,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
    dtype="bfloat16",
    sliding_window=1024,
    layers=layers(([1024] * 5 + [None]) * 8, 15360, qk_norm=True),
)
GPT_OSS = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=4 * 2880,  # of the four experts that a token is sent to
    num_hidden_layers=24,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    dtype="bfloat16",
    sliding_window=128,
    layers=layers([128, None] * 12, 4 * 2880, sinks=True),
)
MODELS = {"Gemma 3 12B": (GEMMA, None), "gpt-oss-20b": (GPT_OSS, int(12.8 * GIB))}
"""Shapes, and bytes of the weights where they are not counted."""

SMALL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
    sliding_window=64,
    layers=layers([64, 64, None] * 2, 128),
)


@dataclasses.dataclass(frozen=True)
class Held:
    """What the pages of a plan hold. page_bytes, pages: with groups. alone: requests with one table for all layers."""

    model: str
    groups: str
    padding: int
    page_bytes: int
    pages: int
    pages_a_request: int
    requests: float
    alone: float


def held(name: str, target: str, length: int) -> Held:
    """Plans one model on a target."""
    model, weights = MODELS[name]
    config = EngineConfig(
        architecture=model,
        load_format="dummy",
        max_model_len=length,
        scheduler=SchedulerConfig(max_num_seqs=1024, max_num_batched_tokens=8192),
    )
    explanation = explain(config, load_target(target), compiles=False)
    shapes, plan = explanation.shapes, explanation.plan
    if weights is not None:
        plan = dataclasses.replace(plan, weights=weights)
    groups, size = shapes.groups, shapes.page_size
    pages, whole = plan.room, -(-length // size)
    names = ["full" if window is None else str(window) for window in groups.windows]
    told = ", ".join(f"{names.count(one)} x {one}" for one in dict.fromkeys(names))
    with_groups = groups.pages(length, size)
    layer = plan.page // groups.size
    return Held(
        model=name,
        groups=f"{groups.size} layers: {told}",
        padding=groups.padding,
        page_bytes=plan.page,
        pages=pages - 1,
        pages_a_request=with_groups,
        requests=(pages - 1) / with_groups,
        alone=(pages * plan.page // (layer * model.num_hidden_layers) - 1) / whole,
    )


def in_use(model: ModelConfig, num_pages: int) -> dict[str, Any]:
    """Pages in use of each group while twelve requests of 480 tokens run on a small pool, step by step."""
    config = EngineConfig(
        architecture=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=512,
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=256),
        cache=CacheConfig(num_pages=num_pages, enable_prefix_caching=False),
        token_buckets=(16, 256),
        row_buckets=(16,),
    )
    engine = InlineEngine(config)
    core, rng = engine.core, np.random.default_rng(0)
    for number in range(12):
        prompt = tuple(rng.integers(0, model.vocab_size, 200).tolist())
        engine.send(AddRequest(EngineRequest(f"r{number}", prompt, max_tokens=280)))
    found: list[tuple[int, list[int]]] = []
    while core.scheduler.unfinished or not found:
        engine.receive()
        found.append((core.scheduler.num_running, core.scheduler.num_pages_by_group))
    most = max(found, key=lambda one: sum(one[1]))
    return {
        "windows": list(core.scheduler.page_groups.windows),
        "num_pages": num_pages,
        "layers_a_page": layer_groups(model.layer_kinds, config.cache.page_size, 512).size,
        "steps": len(found),
        "preemptions": core.scheduler.num_preemptions,
        "most_running": max(running for running, _ in found),
        "mean_running": sum(running for running, _ in found) / len(found),
        "most_pages": {"running": most[0], "by_group": most[1]},
    }


def main() -> None:
    """Prints both tables and writes them."""
    parser = argparse.ArgumentParser(prog="benchmarks.held_requests", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="h200")
    parser.add_argument("--length", type=int, default=32768)
    parsed = parser.parse_args()
    rows = [held(name, parsed.target, parsed.length) for name in MODELS]
    print(f"requests of {parsed.length:,} tokens on one {parsed.target}")
    for row in rows:
        print(
            f"  {row.model}: groups of {row.groups}, {row.padding} places of padding; {row.pages:,} pages of "
            f"{row.page_bytes:,} bytes, {row.pages_a_request:,} a request: {row.requests:.1f} requests; with one table "
            f"for all layers {row.alone:.1f}: {row.requests / row.alone:.2f} times as many"
        )
    # Without windows all layers are alike: every page has all six layers, and none is released.
    whole = dataclasses.replace(SMALL, layers=layers([None] * 6, 128), sliding_window=None)
    engines = {"groups": in_use(SMALL, 241), "one table": in_use(whole, 81)}
    for name, one in engines.items():
        print(f"  engine, {name}: {one}")
    results = {"requests": [dataclasses.asdict(row) for row in rows], "engine": engines}
    print(f"wrote {report.write('held_requests', vars(parsed), results)}")


if __name__ == "__main__":
    main()
