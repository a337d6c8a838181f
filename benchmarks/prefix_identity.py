"""Tokens are those without a prefix cache: `python -m benchmarks.prefix_identity --config tiny.gin`.

Random conversations (benchmarks/conversations.py) of several tenants and salts, with every option that a request can
have, are served without the cache over a pool that holds everything, and with it over one that overflows, where
preempted requests are computed again or swapped, and reclaimed pages are lost or move to host memory, of which there is
a sixth as much, and from there to disk: by the shipped model, and by one whose layers have a sliding window. Before,
all pages hold NaN, which would reach the tokens of whoever reads what nobody wrote.

All steps are computed by programs of one size, so that every number must be equal to the bit: tokens, texts, reasons,
ids, ranks and values of log-probabilities, embeddings of one token. Means are summed chunk by chunk, and a hit begins
with another chunk: they must be equal to 1e-4. Scheduler and pool are checked after every step; no request may find
what another tenant or salt has computed, or anything where it opts out; nothing may be compiled. Hits, evictions,
swaps, recomputations, and pages back from host memory and from disk must all occur. Exit status 1 where any of it does
not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.conversations import Conversations, Turn, answer_text, draw_turns, most_tokens, unexplained_hits
from benchmarks.identity import pool_of, task_prompts
from benchmarks.option_identity import (
    ENOUGH_HOST_PAGES,
    checked_engine,
    differences,
    draw_requests,
    engine_counts,
    small_pool,
)
from benchmarks.random_checkpoint import write_checkpoint
from jaxserve.config import gin_config
from jaxserve.config.settings import EngineConfig
from jaxserve.frontend.offline import FinishedRequest
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.runner.model_runner import ModelRunner

TOKENS, ROWS = 64, 16
"""Tokens and rows of every step, padding included."""

LONGEST_REQUESTS = 3
"""Requests of the greatest length that the small pool holds."""

WINDOW_SHARE = 0.3
"""Share of it that is left where windows let go of most pages of a request."""

PARAMS = 500
"""Different sampling parameters that requests are drawn from; each request has a seed of its own."""

WINDOW = 40
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "sliding_window": WINDOW,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
"""config.json of the model with a window, but for its vocabulary, which is that of the shipped model's tokenizer."""


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to serve the conversations. needed: counts that must be above zero."""

    name: str
    config: EngineConfig
    needed: tuple[str, ...] = ()


def ways(config: EngineConfig, longest: int, directory: str) -> list[Way]:
    """The ways, of which the first is the reference. longest: tokens of a request at most. directory: for pages on
    disk, empty."""
    scheduler = dataclasses.replace(config.scheduler, max_num_seqs=ROWS, max_num_batched_tokens=TOKENS)
    config = dataclasses.replace(config, scheduler=scheduler, token_buckets=(TOKENS,), row_buckets=(ROWS,))
    large = dataclasses.replace(config.cache, num_pages=pool_of(config, 2 * ROWS, longest), enable_prefix_caching=False)
    small = pool_of(config, LONGEST_REQUESTS, longest)
    if None not in resolve_shapes(config, "cpu").groups.windows:
        small = int(small * WINDOW_SHARE)
    swapped = small_pool(config, small, "swap")
    few = changed_cache(swapped, swap_space=swapped.cache.swap_space * small / 6 / ENOUGH_HOST_PAGES)
    recompute = dataclasses.replace(few.scheduler.preemption, preemption_mode="recompute")
    again = dataclasses.replace(few, scheduler=dataclasses.replace(few.scheduler, preemption=recompute))
    tier = ("hits", "evicted", "host_hits", "host_evicted")
    return [
        Way("without cache", dataclasses.replace(config, cache=large)),
        Way("with cache, computed again", small_pool(config, small, "recompute"), ("hits", "evicted", "recomputed")),
        Way("with cache, swapped", changed_cache(swapped, enable_host_caching=False), ("hits", "evicted", "swapped")),
        Way("with host tier, computed again", again, (*tier, "recomputed")),
        Way("with host tier, swapped", few, (*tier, "swapped")),
        Way("with disk tier", changed_cache(few, disk_cache_dir=directory), (*tier, "disk_written", "disk_read")),
    ]


def changed_cache(config: EngineConfig, **fields: Any) -> EngineConfig:
    """Returns a configuration with other settings of the cache."""
    return dataclasses.replace(config, cache=dataclasses.replace(config.cache, **fields))


def poison(runner: ModelRunner) -> None:
    """Fills all pages with ones: NaN in every floating-point dtype, also where its bits are held as integers."""
    arrays = runner._arrays
    arrays.pools = [
        jnp.array(np.full(pool.nbytes, 255, np.uint8).view(pool.dtype).reshape(pool.shape)) for pool in arrays.pools
    ]


def run(way: Way, turns: Sequence[Turn], seed: int) -> tuple[dict[str, FinishedRequest], dict[str, Any]]:
    """Serves the conversations in one way; what ended, by the name of its turn, and what the engine says of it."""
    with checked_engine(way.config) as (llm, core):
        assert isinstance(core.runner, ModelRunner)
        poison(core.runner)
        before, begin = core.stats(), time.perf_counter()
        conversations = Conversations(llm.front_end, llm._client, turns, seed)
        conversations.run()
        seconds, after = time.perf_counter() - begin, core.stats()
        counts = {
            "pages": core.runner.info.num_pages - 1,
            **dataclasses.asdict(core.scheduler.prefix_counts),
            "evicted": core.scheduler.pool.evictions["capacity"],
            "host_pages": core.runner.info.num_host_pages,
            "stored_on_host": core.scheduler.pool.host.num_stored,
            "host_evicted": sum(core.scheduler.pool.host.evictions.values()),
            **{f"disk_{event}": after.disk.get(event, 0) for event in ("written", "read", "refused")},
            **{f"host_{kind}": count for kind, count in after.host_cache_choices.items()},
            "computed_tokens": after.computed_tokens - before.computed_tokens,
            **engine_counts(core, before, after),
            "unexplained_hits": unexplained_hits(turns, conversations.finished.__getitem__, way.config.cache.page_size),
        }
        return conversations.finished, {"way": way.name, "seconds": seconds} | counts


def compare(
    turns: Sequence[Turn], expected: Mapping[str, FinishedRequest], found: Mapping[str, FinishedRequest]
) -> dict[str, Any]:
    """Which answers differ, and how many of each kind are equal to the bit."""
    kept = [turn for turn in turns if turn.abort_after is None]
    first, second = ([answer_text(answers[turn.name]) for turn in kept] for answers in (expected, found))
    different, gap = differences(first, second)
    equal = Counter(turn.kind for turn, one, other in zip(kept, first, second, strict=True) if one == other)
    names = [kept[number].name for number in different]
    for turn in turns:
        if turn.twin is not None:
            ids = found[turn.name].samples[0].token_ids
            if ids != expected[turn.twin].samples[0].token_ids[: len(ids)]:
                names.append(turn.name)
    return {
        "requests": len(turns),
        "identical": len(turns) - len(names),
        "different": names,
        "to_the_bit": {kind: f"{equal[kind]}/{count}" for kind, count in Counter(one.kind for one in kept).items()},
        "bits_differ": sum(count - equal[kind] for kind, count in Counter(one.kind for one in kept).items()
                           if not kind.endswith("MEAN")),
        "logprob_difference": gap,
    }  # fmt: skip


def trouble_of(way: Way, result: Mapping[str, Any]) -> str:
    """Returns in one line what does not hold of a way, or ""."""
    if result["different"]:
        return f"{way.name}: {len(result['different'])} answers differ"
    if result["bits_differ"]:
        return f"{way.name}: {result['bits_differ']} answers have other bits"
    if result["unexplained_hits"]:
        return f"{way.name}: hits that nothing explains: {result['unexplained_hits'][:5]}"
    if result["compiled"] or result["pages_left"]:
        return f"{way.name}: something was compiled, or pages are left"
    missing = [name for name in way.needed if not result[name]]
    return f"{way.name}: none {', '.join(missing)}" if missing else ""


def check(model: str, config: EngineConfig, options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Serves one model's conversations in every way; the results, and what does not hold."""
    texts = task_prompts(config if config.tokenizer is None else _of_tokenizer(config), 200, options.seed)
    assert texts is not None
    params = [one.params for one in draw_requests(PARAMS, 1, resolve_shapes(config, "cpu").model.vocab_size, 0)]
    turns = draw_turns(options.conversations, texts, params, options.seed)
    results: list[dict[str, Any]] = []
    expected: dict[str, FinishedRequest] = {}
    trouble = ""
    with tempfile.TemporaryDirectory() as directory:
        found_by_way = ((way, *run(way, turns, options.seed)) for way in ways(config, most_tokens(turns), directory))
        for way, found, counts in found_by_way:
            expected = expected or found
            result = {"model": model, **counts, **compare(turns, expected, found)}
            results.append(result)
            print(
                f"{model}, {way.name}: {result['identical']}/{result['requests']} in {counts['seconds']:.0f} s",
                flush=True,
            )
            for name in result["different"][:3]:
                print(f"  {name}\n  {answer_text(expected[name])[:300]}\n  {answer_text(found[name])[:300]}")
            result["different"] = result["different"][:20]
            trouble = trouble or trouble_of(way, result)
    return results, f"{model}, {trouble}" if trouble else ""


def _of_tokenizer(config: EngineConfig) -> EngineConfig:
    return dataclasses.replace(config, model=config.tokenizer)


def main() -> int:
    """Prints the table and writes the result; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--models", default="default,window", help="of default and window, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    options, server, _ = gin_config.load_from_command_line(parser)
    config = server.engine
    if task_prompts(config, 1, 0) is None:
        parser.error("--config must name a configuration of the shipped model, such as tiny.gin")
    results: list[dict[str, Any]] = []
    trouble = ""
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder) / "window"
        vocab_size = resolve_shapes(config, "cpu").model.vocab_size
        write_checkpoint(directory, MISTRAL | {"vocab_size": vocab_size})
        models = {
            "default": config,
            "window": dataclasses.replace(config, model=str(directory), tokenizer=config.tokenizer or config.model),
        }
        for model in options.models.split(","):
            found, wrong = check(model, models[model], options)
            results += found
            trouble = trouble or wrong
    settings = vars(options) | {"config": pathlib.PurePath(options.config).name, "token_bucket": TOKENS, "rows": ROWS}
    path = report.write(f"prefix_identity_jax{report.versions()['jax']}", settings, results)
    print(report.describe())
    header = (
        "identical",
        "requests",
        "hits",
        "hit_tokens",
        "query_tokens",
        "evicted",
        "host_hits",
        "host_hit_tokens",
        "disk_read",
        "recomputed",
        "swapped",
        "steps",
    )
    rows = [(f"{row['model']}, {row['way']}", *(row[name] for name in header), row["compiled"]) for row in results]
    print(report.table(("", *header, "compiled"), rows))
    for row in results[1:]:
        print(f"{row['model']}, {row['way']}: to the bit {row['to_the_bit']}, at most {row['logprob_difference']:.1e}")
    print(f"written: {path}")
    return report.fail(trouble) if trouble else 0


if __name__ == "__main__":
    raise SystemExit(main())
