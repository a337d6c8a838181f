"""Tokens do not depend on scheduling: `python -m benchmarks.identity` shows it on the shipped model (or --config NAME).

The same prompts run alone (one at a time), batched, in chunks of 16 tokens, and over a pool so small that requests are
preempted; greedy and seeded sampling each. Random requests must compile nothing, and cancels must leave the pool whole.

With `--preemption` requests that are greedy and seeded in turn run over a pool that holds them all, and over one that
overflows: there preempted sequences are computed again, swapped to host memory, or swapped as long as a few host pages
are free; each kind must happen. Exit status 1 where any claim does not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import random
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import report
from jaxserve.config import gin_config
from jaxserve.config.settings import EngineConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.engine.messages import AbortRequest, AddRequest, EngineFailed, EngineOutput, EngineStats, outputs
from jaxserve.frontend.tokenizer import load_tokenizer
from jaxserve.models.tiny.tasks import KINDS, MAX_SIZE, generate_split
from jaxserve.planning.decode_roofline import token_bytes
from jaxserve.planning.resolve import resolve_model, resolve_shapes
from jaxserve.request import EngineRequest, FinishReason

CHUNK = 16
MOST_NEW_TOKENS = 48
LONGEST_REQUESTS = 8
"""Sequences of the greatest length that a pool holds which overflows."""

ENOUGH_HOST_PAGES = 8192
FEW_HOST_PAGES = 24
Tokens = dict[str, tuple[int, ...]]


def task_prompts(config: EngineConfig, count: int, seed: int) -> list[tuple[int, ...]] | None:
    """Held-out tasks of every kind in turn, as token ids; None where the model is not the shipped one."""
    if config.skip_tokenizer_init or not (config.model or "").replace("\\", "/").endswith("models/tiny/checkpoint"):
        return None
    tokenizer = load_tokenizer(config)
    assert tokenizer is not None
    rng = random.Random(seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    return [
        tuple(tokenizer.encode(generate_split(kind, rng, rng.randint(1, MAX_SIZE[kind]), held_out=True)[0]))
        for kind in kinds
    ]


def random_prompts(vocab_size: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of 8 to 256 random ids."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(vocab_size) for _ in range(rng.randint(8, 256))) for _ in range(count)]


def make_requests(prompts: Sequence[tuple[int, ...]], name: str, *, sampled: bool, seed: int) -> list[EngineRequest]:
    """One request a prompt, of 16 to 48 new tokens that no stop id ends; the parameters of sampling vary."""
    rng = random.Random(seed)
    requests = []
    for number, prompt in enumerate(prompts):
        request = EngineRequest(f"{name}-{number}", prompt, rng.randint(16, MOST_NEW_TOKENS), seed=rng.randrange(2**63))
        if sampled:
            request = dataclasses.replace(
                request,
                temperature=rng.choice((0.7, 1.0, 1.5)),
                top_k=rng.choice((0, 5, 40)),
                top_p=rng.choice((0.8, 0.95, 1.0)),
                min_p=rng.choice((0.0, 0.05)),
            )
        requests.append(request)
    return requests


def collect(engine: InlineEngine, tokens: dict[str, list[int]]) -> tuple[list[EngineOutput], EngineStats | None]:
    """One call of `receive`: appends new ids to `tokens`; returns the final outputs and the last statistics."""
    finished, stats = [], None
    for message in engine.receive():
        if isinstance(message, EngineStats):
            stats = message
        elif isinstance(message, EngineFailed):
            raise RuntimeError(message.error)
        for output in outputs(message):
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is FinishReason.ERROR:
                raise RuntimeError(f"{output.request_id}: {output.error}")
            if output.finish_reason is not None:
                finished.append(output)
    return finished, stats


def run(engine: InlineEngine, requests: Sequence[EngineRequest], *, alone: bool = False) -> Tokens:
    """The tokens of every request; `alone` sends one when the one before has ended."""
    tokens: dict[str, list[int]] = {}
    for group in [[request] for request in requests] if alone else [requests]:
        unfinished = {request.request_id for request in group}
        for request in group:
            engine.send(AddRequest(request))
        while unfinished:
            finished, _ = collect(engine, tokens)
            unfinished -= {output.request_id for output in finished}
    while engine.core.busy:  # the step in flight, whose ids no one waits for any more
        collect(engine, tokens)
    engine.core.check_integrity()
    for request in requests:
        if not request.stop_token_ids and len(tokens[request.request_id]) != request.max_tokens:
            raise RuntimeError(f"{request.request_id} ended before its {request.max_tokens} tokens")
    return {name: tuple(ids) for name, ids in tokens.items()}


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run the same requests. alone: one at a time."""

    name: str
    config: EngineConfig
    alone: bool = False


def pool_of(config: EngineConfig, count: int, tokens: int) -> int:
    """Pages, the null page included, that `count` sequences of so many tokens fill."""
    return count * -(-tokens // config.cache.page_size) + 1


def schedules(config: EngineConfig, requests: Sequence[EngineRequest]) -> list[Way]:
    """Ways to schedule requests over one kind of pool; the first is the reference."""
    chunked = dataclasses.replace(config.scheduler, long_prefill_token_threshold=CHUNK)
    longest = max(len(request.prompt_token_ids) for request in requests) + MOST_NEW_TOKENS
    tight = dataclasses.replace(config.cache, num_pages=pool_of(config, 3, longest))
    return [
        Way("alone", config, alone=True),
        Way("batched", config),
        Way(f"chunks of {CHUNK}", dataclasses.replace(config, scheduler=chunked)),
        Way("small pool", dataclasses.replace(config, cache=tight)),
    ]


def preemptions(config: EngineConfig, requests: Sequence[EngineRequest]) -> list[Way]:
    """Pools that overflow, by the way in which preempted sequences come back, after one that holds everything."""
    longest = max(len(request.prompt_token_ids) + request.max_tokens for request in requests)
    small = pool_of(config, LONGEST_REQUESTS, longest)
    page_bytes = token_bytes(resolve_shapes(config, "cpu")) * config.cache.page_size

    def way(name: str, pages: int, mode: str, host_pages: int) -> Way:
        swap_space = (host_pages + 0.5) * page_bytes / 2**30 if host_pages else 0.0
        cache = dataclasses.replace(config.cache, num_pages=pages, swap_space=swap_space)
        preemption = dataclasses.replace(config.scheduler.preemption, preemption_mode=mode)
        scheduler = dataclasses.replace(config.scheduler, preemption=preemption)
        return Way(name, dataclasses.replace(config, cache=cache, scheduler=scheduler))

    return [
        way("large pool", LONGEST_REQUESTS * small, "recompute", 0),
        way("recompute", small, "recompute", 0),
        way("swap", small, "swap", ENOUGH_HOST_PAGES),
        way("swap, few host pages", small, "swap", FEW_HOST_PAGES),
    ]


def compare(ways: Sequence[Way], sets: dict[str, list[EngineRequest]]) -> list[dict[str, Any]]:
    """Runs each set of requests in every way; what it gave beside the first way."""
    reference: dict[str, Tokens] = {}
    results = []
    engine, current = None, None
    for way in ways:
        if engine is None or way.config != current:
            if engine is not None:
                engine.close()
            engine, current = InlineEngine(way.config), way.config
        info, scheduler = engine.core.runner.info, engine.core.scheduler
        for sampling, requests in sets.items():
            before, kinds, start = engine.core.stats(), dict(scheduler.num_preemptions_by_kind), time.perf_counter()
            got = run(engine, requests, alone=way.alone)
            seconds, after = time.perf_counter() - start, engine.core.stats()
            expected = reference.setdefault(sampling, got)
            tokens = sum(map(len, got.values()))
            results.append(
                {
                    "way": way.name,
                    "sampling": sampling,
                    "identical": sum(got[one] == expected[one] for one in expected),
                    "requests": len(expected),
                    "tokens": tokens,
                    "steps": after.num_steps - before.num_steps,
                    "preemptions": after.num_preemptions - before.num_preemptions,
                    "recomputed": scheduler.num_preemptions_by_kind["recompute"] - kinds["recompute"],
                    "swapped": scheduler.num_preemptions_by_kind["swap"] - kinds["swap"],
                    "pages": info.num_pages - 1,
                    "host_pages": info.num_host_pages,
                    "computed_tokens": after.computed_tokens - before.computed_tokens,
                    "seconds": seconds,
                    "output_tokens_per_second": tokens / seconds,
                }
            )
            print(f"{way.name}, {sampling}: {results[-1]['identical']}/{len(expected)}", flush=True)
    assert engine is not None
    engine.close()
    return results


def random_requests(engine: InlineEngine, name: str, count: int, seed: int) -> list[EngineRequest]:
    """Requests of any length that fits and any sampling parameters."""
    rng = random.Random(seed)
    ready = engine.ready
    longest = min(ready.limits.max_model_len, 512)
    requests = []
    for number in range(count):
        prompt = tuple(rng.randrange(ready.limits.vocab_size) for _ in range(rng.randint(1, longest - 40)))
        stop = tuple(rng.randrange(ready.limits.vocab_size) for _ in range(rng.choice((0, 0, 3))))
        requests.append(
            EngineRequest(
                f"{name}-{number}",
                prompt,
                rng.randint(1, 40),
                temperature=rng.choice((0.0, 1.0)),
                top_k=rng.choice((0, 20)),
                top_p=rng.choice((0.9, 1.0)),
                seed=number,
                min_tokens=rng.choice((0, 4)) if stop else 0,
                stop_token_ids=stop,
            )
        )
    return [dataclasses.replace(one, max_tokens=max(one.max_tokens, one.min_tokens)) for one in requests]


def check_compilations(engine: InlineEngine, count: int, seed: int) -> dict[str, Any]:
    """Runs random requests in waves; compilations and executables before and after."""
    before = engine.core.stats()
    rng = random.Random(seed)
    left = random_requests(engine, "random", count, seed)
    while left:
        wave, left = left[: (size := rng.randint(1, 100))], left[size:]
        run(engine, wave)
    after = engine.core.stats()
    names = ("num_compilations", "num_executables", "compile_misses")
    return {
        "requests": count,
        "before": {name: getattr(before, name) for name in names},
        "after": {name: getattr(after, name) for name in names},
        "unchanged": all(getattr(before, name) == getattr(after, name) for name in names),
    }


def check_cancels(engine: InlineEngine, count: int, seed: int) -> dict[str, Any]:
    """Cancels requests at random moments of their lives; the pool must follow within one step.

    After the one step that may follow a cancel, `check_integrity` asserts that the pages in use are exactly those of
    the requests still alive, and the cancelled request must have had its final reply.
    """
    rng = random.Random(seed)
    requests = random_requests(engine, "cancel", count, seed + 1)
    waiting, alive = list(requests), []
    cancelled = finished_first = late = 0
    tokens: dict[str, list[int]] = {}
    while waiting or alive:
        while waiting and len(alive) < 48 and rng.random() < 0.7:
            request = dataclasses.replace(waiting.pop(), stop_token_ids=(), min_tokens=0, max_tokens=200)
            engine.send(AddRequest(request))
            alive.append(request.request_id)
        victim = alive.pop(rng.randrange(len(alive))) if alive and rng.random() < 0.6 else None
        if victim is not None:
            engine.send(AbortRequest(victim))
        finished, _ = collect(engine, tokens)
        engine.core.check_integrity()
        reasons = {output.request_id: output.finish_reason for output in finished}
        if victim is not None:
            cancelled += reasons.get(victim) is FinishReason.ABORT
            finished_first += reasons.get(victim) is FinishReason.LENGTH
            late += victim not in reasons
        alive = [name for name in alive if name not in reasons]
        finished_first += sum(name != victim for name in reasons)
    while engine.core.busy:
        collect(engine, tokens)
    stats, pages = engine.core.stats(), engine.ready.info.usable_pages
    return {
        "requests": count,
        "cancelled": cancelled,
        "finished_first": finished_first,
        "replies_later_than_one_step": late,
        "pages_used_at_the_end": stats.pages_used,
        "pages_free_or_cached_at_the_end": stats.pages_free + stats.pages_cached,
        "pages": pages,
        "whole": late == 0 and stats.pages_used == 0 and stats.pages_free + stats.pages_cached == pages,
    }


def check_schedules(
    config: EngineConfig, prompts: list[tuple[int, ...]], options: argparse.Namespace
) -> tuple[Any, list[dict[str, Any]], str]:
    """All claims but that on preemption; results, their rows, and what does not hold."""
    engine = InlineEngine(config)
    compiled = check_compilations(engine, options.random_requests, options.seed)
    cancels = check_cancels(engine, options.cancels, options.seed)
    engine.close()
    del engine
    sets = {
        name: make_requests(prompts, "request", sampled=name == "seeded", seed=options.seed)
        for name in ("greedy", "seeded")
    }
    rows = compare(schedules(config, sets["greedy"]), sets)
    print(f"random requests after warm-up: {compiled}\ncancels: {cancels}")
    preempted = min(row["preemptions"] for row in rows if row["way"] == "small pool")
    trouble = ""
    if not compiled["unchanged"] or not cancels["whole"]:
        trouble = "something was compiled, or the pool is not whole"
    elif preempted < options.min_preemptions:
        trouble = f"only {preempted} preemptions; at least {options.min_preemptions} are wanted"
    return {"identity": rows, "compilations": compiled, "cancels": cancels}, rows, trouble


def check_preemptions(
    config: EngineConfig, prompts: list[tuple[int, ...]], options: argparse.Namespace
) -> tuple[Any, list[dict[str, Any]], str]:
    """The claim on preemption, with requests greedy and seeded in turn; as `check_schedules` returns it."""
    pairs = [make_requests(prompts, "request", sampled=sampled, seed=options.seed) for sampled in (False, True)]
    mixed = [pair[number % 2] for number, pair in enumerate(zip(*pairs, strict=True))]
    rows = compare(preemptions(config, mixed), {"greedy and seeded in turn": mixed})
    large, recompute, swap, both = ((row["recomputed"], row["swapped"]) for row in rows)
    wanted = not any(large) and recompute[0] and swap[1] and all(both)
    trouble = "" if wanted else f"a kind of preemption is missing, or the large pool overflowed: {rows}"
    return rows, rows, trouble


def main() -> int:
    """Prints the tables and writes the result; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preemption", action="store_true", help="the ways in which preempted requests come back")
    parser.add_argument("--model", help="a checkpoint directory in place of the configuration's")
    parser.add_argument("--prompts", type=int, help="default: 200; with --preemption 2,000")
    parser.add_argument("--random-requests", type=int, default=500)
    parser.add_argument("--cancels", type=int, default=200)
    parser.add_argument("--min-preemptions", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options, server, _ = gin_config.load_from_command_line(parser)
    options.prompts = options.prompts or (2000 if options.preemption else 200)
    config = server.engine
    if options.model is not None:
        config = dataclasses.replace(config, model=options.model, tokenizer=None, architecture=None)
    prompts = task_prompts(config, options.prompts, options.seed)
    source = "held-out tasks" if prompts else "random ids"
    vocab_size = resolve_model(config, planning=True).vocab_size
    prompts = prompts or random_prompts(vocab_size, options.prompts, options.seed)
    check = check_preemptions if options.preemption else check_schedules
    results, rows, trouble = check(config, prompts, options)
    own = {"model": "given" if options.model else "the configuration's", "prompts_from": source}
    settings = vars(options) | own | {"config": pathlib.PurePath(options.config).name}
    name = f"{'preemption_' * options.preemption}identity_jax{report.versions()['jax']}"
    path = report.write(name, settings, results)
    print(f"{report.describe()}\n{options.prompts} prompts: {source}")
    header = ("tokens", "steps", "recomputed", "swapped", "pages", "host_pages", "computed_tokens", "seconds")
    cells = [
        (row["way"], row["sampling"], f"{row['identical']}/{row['requests']}", *(row[name] for name in header))
        for row in rows
    ]
    print(report.table(("", "sampling", "identical", *header), cells))
    print(f"written: {path}")
    if any(row["identical"] != row["requests"] for row in rows):
        return report.fail("NOT identical")
    return report.fail(trouble) if trouble else 0


if __name__ == "__main__":
    raise SystemExit(main())
