"""Tokens depend on a request alone, whatever options it and others have: `python -m benchmarks.option_identity`.

Requests with random options, of every kind that a request can have, drawn by hypothesis, run alone (one at a time), in
batches with each other, in chunks of 16 prompt tokens, over a pool so small that they are preempted and computed again
or swapped, and by an engine in another process. Token ids, texts, finish reasons and log-probabilities with their ids
and ranks must be those of the requests alone, values on CPUs to the bit and on GPUs to 1e-4; nothing may be compiled
after start; and the accounts of scheduler and pool are checked after every step. Exit status 1 where any of it does not
hold.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import jax
from hypothesis import strategies as st

from benchmarks import report
from benchmarks.identity import CHUNK, ENOUGH_HOST_PAGES, pool_of, task_prompts
from jaxserve.config import gin_config
from jaxserve.config.settings import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import EngineStats, FromEngine
from jaxserve.llm import LLM
from jaxserve.outputs import RequestOutput
from jaxserve.planning.decode_roofline import token_bytes
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams

MOST_NEW_TOKENS = 24
LONGEST_REQUESTS = 2
"""Requests of the greatest length that the small pool holds."""

MOST_ERROR = {"cpu": 0.0, "gpu": 1e-4}
"""Difference of a log-probability that steps of other sizes may make, by platform: on a GPU these round otherwise."""

_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
_CONSTRAINTS = (
    StructuredOutputsParams(regex="[0-9]{1,6}(,[a-z]{1,4}){0,3}"),
    StructuredOutputsParams(choice=("yes", "no", "perhaps")),
    StructuredOutputsParams(json=_SCHEMA),
    StructuredOutputsParams(json_object=True),
    StructuredOutputsParams(grammar='start: "<" ("a" | "b" start)* ">"'),
)


@dataclasses.dataclass(frozen=True)
class Request:
    """One request. prompt: number among the prompts."""

    prompt: int
    params: SamplingParams


@st.composite
def requests(draw: st.DrawFn, prompts: int, vocab_size: int) -> Request:
    """Draws a request that may have any option, more often few than many."""
    ids = st.integers(3, vocab_size - 1)
    fields: dict[str, st.SearchStrategy[Any]] = {
        "top_p": st.floats(0.05, 1.0),
        "top_k": st.integers(1, 50),
        "min_p": st.floats(0.0, 0.3),
        "typical_p": st.floats(0.1, 1.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "logit_bias": st.dictionaries(ids, st.floats(-100.0, 100.0), max_size=6),
        "allowed_token_ids": st.lists(ids, min_size=20, max_size=200, unique=True),
        "bad_words": st.lists(st.sampled_from(("1", "ab", "the", "2 3", "e")), max_size=3, unique=True),
        "stop": st.lists(st.sampled_from(("7", "an", ",", "00")), max_size=2, unique=True),
        "include_stop_str_in_output": st.booleans(),
        "stop_token_ids": st.lists(ids, max_size=4, unique=True),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "min_tokens": st.integers(0, 6),
        "logprobs": st.integers(0, 5),
        "prompt_logprobs": st.integers(0, 3),
        "truncate_prompt_tokens": st.integers(1, 30),
        "structured_outputs": st.sampled_from(_CONSTRAINTS),
    }
    names = draw(st.lists(st.sampled_from(sorted(fields)), max_size=6, unique=True))
    if {"structured_outputs", "allowed_token_ids"} <= set(names):  # together they may allow nothing
        names.remove("allowed_token_ids")
    values = {name: draw(fields[name]) for name in names}
    values["temperature"] = draw(st.sampled_from((0.0, 0.0, 0.7, 1.0, 1.5)))
    values["seed"] = draw(st.integers(-(2**63), 2**63 - 1))
    values["max_tokens"] = draw(st.integers(max(1, values.get("min_tokens", 0)), MOST_NEW_TOKENS))
    if values["temperature"]:
        values["n"] = draw(st.sampled_from((1, 1, 1, 2, 3)))
    return Request(draw(st.integers(0, prompts - 1)), SamplingParams(**values))


def draw_requests(count: int, prompts: int, vocab_size: int, seed: int) -> list[Request]:
    """Draws so many different requests."""
    drawn: dict[Request, None] = {}
    while len(drawn) < count:

        @hypothesis.seed(seed + len(drawn))
        @hypothesis.settings(
            max_examples=count,  # the first one drawn is always the same
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(requests(prompts, vocab_size))
        def take(request: Request) -> None:
            drawn[request] = None

        take()
    return list(drawn)[:count]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run the requests. size: how many are given to the engine at once; elsewhere: in another process."""

    name: str
    config: EngineConfig
    size: int = 64
    elsewhere: bool = False


def ways(config: EngineConfig, longest: int) -> list[Way]:
    """The ways, of which the first is the reference. longest: tokens of a request at most."""
    scheduler, small = config.scheduler, pool_of(config, LONGEST_REQUESTS, longest)
    chunks = dataclasses.replace(scheduler, long_prefill_token_threshold=CHUNK)
    return [
        Way("alone", config, size=1),
        Way("in batches", config),
        Way(f"chunks of {CHUNK}", dataclasses.replace(config, scheduler=chunks)),
        Way("preempted, computed again", small_pool(config, small, "recompute")),
        Way("preempted, swapped", small_pool(config, small, "swap")),
        Way("in another process", config, elsewhere=True),
    ]


def small_pool(config: EngineConfig, pages: int, mode: str) -> EngineConfig:
    """The configuration with so many pages, whose sequences are preempted in one way."""
    page_bytes = token_bytes(resolve_shapes(config, "cpu")) * config.cache.page_size
    space = (ENOUGH_HOST_PAGES + 0.5) * page_bytes / 2**30 if mode == "swap" else 0.0
    preemption = dataclasses.replace(config.scheduler.preemption, preemption_mode=mode)
    return dataclasses.replace(
        config,
        cache=dataclasses.replace(config.cache, num_pages=pages, swap_space=space),
        scheduler=dataclasses.replace(config.scheduler, preemption=preemption),
    )


def run(way: Way, prompts: Sequence[tuple[int, ...]], wanted: Sequence[Request]) -> dict[str, Any]:
    """Runs the requests in one way; their answers, and what the engine says of it."""
    with checked_engine(way.config) as (llm, core):
        before = core.stats()
        answers: list[str] = []
        start = time.perf_counter()
        for begin in range(0, len(wanted), way.size):
            group = wanted[begin : begin + way.size]
            given = [{"prompt_token_ids": prompts[one.prompt]} for one in group]
            found = llm.generate(given, [one.params for one in group], use_tqdm=False)
            answers += [json.dumps(_answer(output)) for output in found]
        seconds, after = time.perf_counter() - start, core.stats()
        return {"way": way.name, "answers": answers, "seconds": seconds} | engine_counts(core, before, after)


@contextlib.contextmanager
def checked_engine(config: EngineConfig) -> Iterator[tuple[LLM, EngineCore]]:
    """An engine whose accounts of scheduler and pool are checked after every step."""
    with LLM(config=config) as llm:
        core: EngineCore = llm._client.core  # type: ignore[attr-defined]
        step = core.step

        def checked() -> list[FromEngine]:
            messages = step()
            core.check_integrity()
            return messages

        core.step = checked
        yield llm, core


def engine_counts(core: EngineCore, before: EngineStats, after: EngineStats) -> dict[str, int]:
    """What an engine did between two looks at its statistics, of which the first was taken when it was new."""
    kinds = core.scheduler.num_preemptions_by_kind
    return {
        "steps": after.num_steps - before.num_steps,
        "tokens": after.generation_tokens - before.generation_tokens,
        "recomputed": kinds["recompute"],
        "swapped": kinds["swap"],
        "compiled": after.num_compilations - before.num_compilations + after.compile_misses,
        "programs": core.runner.info.num_executables,
        "pages_left": after.pages_used,
    }


def _answer(output: RequestOutput) -> dict[str, Any]:
    """Returns what must be equal, as JSON."""

    def position(found: Any) -> Any:
        return None if found is None else [[int(key), one.logprob, one.rank] for key, one in found.items()]

    return {
        "error": output.error,
        "prompt": None if output.prompt_logprobs is None else [position(one) for one in output.prompt_logprobs],
        "samples": [
            {
                "token_ids": list(one.token_ids),
                "text": one.text,
                "reason": one.finish_reason,
                "logprobs": None if one.logprobs is None else [position(each) for each in one.logprobs],
            }
            for one in output.outputs
        ],
    }


def differences(expected: Sequence[str], found: Sequence[str]) -> tuple[list[int], float]:
    """Returns the numbers of the requests whose answers differ, and the largest difference of a log-probability among
    the others."""
    different, largest, most = [], 0.0, MOST_ERROR[jax.default_backend()]
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        if one == other:
            continue
        first, second = json.loads(one), json.loads(other)
        values, others = _take_values(first), _take_values(second)
        gap = max((abs(a - b) for a, b in zip(values, others, strict=False)), default=0.0)
        if first == second and len(values) == len(others) and gap <= most:
            largest = max(largest, gap)
        else:
            different.append(number)
    return different, largest


def _take_values(answer: dict[str, Any]) -> list[float]:
    """Takes the values of log-probabilities out of an answer, whose ids and ranks stay."""
    positions = [*(answer["prompt"] or ()), *(one for each in answer["samples"] for one in each["logprobs"] or ())]
    return [entry.pop(1) for position in positions if position is not None for entry in position]


def main() -> int:
    """Prints the table and writes the result; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options, server, _ = gin_config.load_from_command_line(parser)
    config = server.engine
    prompts = task_prompts(config, options.prompts, options.seed)
    if prompts is None:
        parser.error("--config must name a configuration of the shipped model, such as tiny.gin")
    vocab_size = resolve_shapes(config, "cpu").model.vocab_size
    wanted = draw_requests(options.requests, len(prompts), vocab_size, options.seed)
    used = Counter(
        name
        for one in wanted
        for name, field in type(one.params).__dataclass_fields__.items()
        if getattr(one.params, name) != field.default
    )
    results: list[dict[str, Any]] = []
    expected: list[str] = []
    trouble = ""
    for way in ways(config, max(map(len, prompts)) + MOST_NEW_TOKENS):
        if way.elsewhere:
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                result = pool.submit(run, way, prompts, wanted).result()
        else:
            result = run(way, prompts, wanted)
        answers = result.pop("answers")
        expected = expected or answers
        different, gap = differences(expected, answers)
        result |= {"identical": len(wanted) - len(different), "different": different[:20], "logprob_difference": gap}
        results.append(result)
        print(f"{way.name}: {result['identical']}/{len(wanted)}", flush=True)
        for number in different[:2]:
            print(wanted[number], "\n ", expected[number][:200], "\n ", answers[number][:200])
        if different:
            trouble = trouble or f"{way.name}: answers differ"
        if result["compiled"] or result["pages_left"]:
            trouble = trouble or f"{way.name}: something was compiled, or pages are left"
    if not (results[3]["recomputed"] and results[4]["swapped"]):
        trouble = trouble or "a kind of preemption is missing"
    settings = vars(options) | {"options_used": dict(sorted(used.items()))}
    path = report.write(f"option_identity_jax{report.versions()['jax']}", settings, results)
    print(f"{report.describe()}\noptions used: {', '.join(f'{name} {count}' for name, count in sorted(used.items()))}")
    header = ("identical", "logprob_difference", "tokens", "steps", "recomputed", "swapped", "compiled", "programs")
    print(
        report.table(
            ("", *header, "seconds"), [(row["way"], *(row[one] for one in (*header, "seconds"))) for row in results]
        )
    )
    print(f"written: {path}")
    return report.fail(trouble) if trouble else 0


if __name__ == "__main__":
    raise SystemExit(main())
