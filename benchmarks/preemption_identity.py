"""Tokens do not depend on how a preempted request comes back: `python -m benchmarks.preemption_identity`.

The same requests, greedy and seeded in turn, run over a pool that holds them all, and over one that overflows: there
preempted sequences are computed again, swapped to host memory, or swapped as long as a few host pages are free. Exit
status 1 where tokens differ or a kind of preemption did not happen.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time
from typing import Any

from benchmarks import report
from benchmarks.identity import Tokens, make_requests, random_prompts, run, task_prompts
from jaxserve.config import gin_config
from jaxserve.config.settings import EngineConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.planning.decode_roofline import token_bytes
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.request import EngineRequest

LONGEST_REQUESTS = 8
"""Sequences of the greatest length that the overflowing pool holds."""

ENOUGH_HOST_PAGES = 8192
FEW_HOST_PAGES = 24


def make_mixed(prompts: list[tuple[int, ...]], seed: int) -> list[EngineRequest]:
    """One request a prompt, greedy and seeded in turn."""
    greedy, sampled = (make_requests(prompts, "request", sampled=flag, seed=seed) for flag in (False, True))
    return [pair[number % 2] for number, pair in enumerate(zip(greedy, sampled, strict=True))]


def overflowing(config: EngineConfig, requests: list[EngineRequest]) -> int:
    """Pages, with the null page, that `LONGEST_REQUESTS` of the longest requests fill."""
    longest = max(len(request.prompt_token_ids) + request.max_tokens for request in requests)
    return LONGEST_REQUESTS * -(-longest // config.cache.page_size) + 1


def with_preemption(config: EngineConfig, num_pages: int, mode: str, host_pages: int) -> EngineConfig:
    """The configuration over pools of these sizes, with preempted sequences brought back so."""
    page_bytes = token_bytes(resolve_shapes(config, "cpu")) * config.cache.page_size
    swap_space = (host_pages + 0.5) * page_bytes / 2**30 if host_pages else 0.0
    preemption = dataclasses.replace(config.scheduler.preemption, preemption_mode=mode)
    return dataclasses.replace(
        config,
        cache=dataclasses.replace(config.cache, num_pages=num_pages, swap_space=swap_space),
        scheduler=dataclasses.replace(config.scheduler, preemption=preemption),
    )


def measure(name: str, config: EngineConfig, requests: list[EngineRequest]) -> tuple[Tokens, dict[str, Any]]:
    """Runs all requests on a new engine: their tokens, and what happened."""
    engine = InlineEngine(config)
    info = engine.core.runner.info
    start = time.perf_counter()
    tokens = run(engine, requests)
    seconds = time.perf_counter() - start
    stats, kinds = engine.core.stats(), engine.core.scheduler.num_preemptions_by_kind
    engine.close()
    count = sum(map(len, tokens.values()))
    return tokens, {
        "way": name,
        "requests": len(requests),
        "tokens": count,
        "steps": stats.num_steps,
        "recomputed": kinds["recompute"],
        "swapped": kinds["swap"],
        "pages": info.num_pages - 1,
        "host_pages": info.num_host_pages,
        "computed_tokens": stats.computed_tokens,
        "seconds": seconds,
        "output_tokens_per_second": count / seconds,
    }


def main() -> int:
    """Prints the table and writes the result; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options, server, _ = gin_config.load_from_command_line(parser)
    config = server.engine
    prompts = task_prompts(config, options.requests, options.seed)
    source = "held-out tasks" if prompts else "random ids"
    if prompts is None:
        assert config.architecture is not None, (
            "without the shipped model the configuration says how many ids there are"
        )
        prompts = random_prompts(config.architecture.vocab_size, options.requests, options.seed)
    requests = make_mixed(prompts, options.seed)
    small = overflowing(config, requests)
    ways = {
        "large pool": with_preemption(config, LONGEST_REQUESTS * small, "recompute", 0),
        "recompute": with_preemption(config, small, "recompute", 0),
        "swap": with_preemption(config, small, "swap", ENOUGH_HOST_PAGES),
        "swap, few host pages": with_preemption(config, small, "swap", FEW_HOST_PAGES),
    }
    reference: Tokens | None = None
    rows = []
    for name, way in ways.items():
        tokens, row = measure(name, way, requests)
        reference = reference or tokens
        row["identical"] = sum(tokens[one] == reference[one] for one in reference)
        rows.append(row)
        print(f"{name}: {row['identical']}/{row['requests']}", flush=True)
    settings = vars(options) | {"prompts_from": source, "config": pathlib.PurePath(options.config).name}
    path = report.write(f"preemption_identity_jax{report.versions()['jax']}", settings, rows)
    header = ("way", "identical", "tokens", "steps", "recomputed", "swapped", "pages", "host_pages", "computed_tokens")
    print(f"{report.describe()}\n{options.requests} requests: {source}, greedy and seeded in turn")
    print(report.table((*header, "seconds"), [[row[name] for name in (*header, "seconds")] for row in rows]))
    print(f"written: {path}")
    large, recompute, swap, both = ({"recompute": row["recomputed"], "swap": row["swapped"]} for row in rows)
    if any(row["identical"] != row["requests"] for row in rows):
        return report.fail("NOT identical")
    if any(large.values()) or not recompute["recompute"] or not swap["swap"] or not all(both.values()):
        return report.fail(f"a kind of preemption is missing, or the large pool overflowed: {rows}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
