"""What 16 samples of one prompt take beside 16 separate requests: pages, prompt tokens and time.

    python -m benchmarks.parallel_samples [--models default,153m] [--samples 16] [--prompt 1000] [--output 128]

Each way runs on an engine in this process, warm, in turns: `samples` is one request with n samples, `separate` n
requests with the seeds seed + i. Both ways run with a slot for each sample, and on `--slots` slots, where samples wait
for those before them; the latter also with a pool so small that samples are preempted. The tokens of all ways must be
equal. Writes JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.work import FIRST_ORDINARY_ID, SHAPES
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.engine.messages import AddRequest, ToEngine, outputs
from jaxserve.models.config import ModelConfig
from jaxserve.request import EngineRequest
from jaxserve.telemetry.recorder import Event, StepRecorded

PAGE_SIZE = 16
SEED = 7


@dataclasses.dataclass
class Taken:
    """What one run took. first_token_ms: until every sample has its first token."""

    pages: int = 0
    prefill_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    first_token_ms: float = 0.0
    total_ms: float = 0.0


def configuration(model: str, slots: int, num_pages: int) -> EngineConfig:
    """An engine with so many slots and pages."""
    if model == "default":
        known = EngineConfig(model=str(report.ROOT / "models" / "tiny" / "checkpoint"), dtype="float32")
    else:
        known = EngineConfig(
            architecture=ModelConfig.from_hf(SHAPES[model]), load_format="dummy", skip_tokenizer_init=True
        )
    scheduler = SchedulerConfig(max_num_seqs=slots, max_num_batched_tokens=512)
    cache = CacheConfig(page_size=PAGE_SIZE, num_pages=num_pages)
    return dataclasses.replace(known, scheduler=scheduler, cache=cache)


def requests_of(number: int, prompt: tuple[int, ...], samples: int, output: int) -> list[EngineRequest]:
    """Requests with the seeds SEED + i, which need all of their output tokens."""
    first = EngineRequest(f"{number}", prompt, max_tokens=output, temperature=1.0, seed=SEED)
    return [first, *[first.sample(index, f"{number}/{index}") for index in range(1, samples)]]


def run(engine: InlineEngine, requests: list[EngineRequest], *, together: bool) -> tuple[Taken, list[list[int]]]:
    """Runs the requests to their end, as samples of one or each on its own."""
    taken, core = Taken(), engine.core

    def record(event: Event) -> None:
        if isinstance(event, StepRecorded):
            taken.steps += 1
            taken.prefill_tokens += event.prefill_tokens
            taken.pages = max(taken.pages, event.pages_used)

    before = core.scheduler.num_preemptions
    unsubscribe = core.recorder.subscribe(record)
    messages: list[ToEngine] = [AddRequest(one) for one in requests]
    if together:
        messages = [AddRequest(requests[0], tuple(one.request_id for one in requests[1:]))]
    tokens: dict[str, list[int]] = {one.request_id: [] for one in requests}
    begin = time.perf_counter()
    for message in messages:
        engine.send(message)
    left = len(requests)
    while left:
        for output in (one for message in engine.receive() for one in outputs(message)):
            tokens[output.request_id] += output.token_ids
            left -= output.finish_reason is not None
        if not taken.first_token_ms and all(tokens.values()):
            taken.first_token_ms = 1e3 * (time.perf_counter() - begin)
    taken.total_ms = 1e3 * (time.perf_counter() - begin)
    unsubscribe()
    taken.preemptions = core.scheduler.num_preemptions - before
    core.check_integrity()
    return taken, list(tokens.values())


def measure(model: str, samples: int, prompt: int, output: int, slots: int, repeats: int) -> list[dict[str, Any]]:
    """Measures both ways on every engine: medians of the times; the counts are the same in every repeat."""
    per_sample = -(-(prompt + output) // PAGE_SIZE)
    found: list[dict[str, Any]] = []
    expected: list[list[int]] = []
    ids: tuple[int, ...] = ()
    for name, places, num_pages in (
        ("a slot for each", samples, samples * per_sample + 1),
        (f"{slots} slots", slots, samples * per_sample + 1),
        (f"{slots} slots, few pages", slots, per_sample + slots * (per_sample - prompt // PAGE_SIZE) // 2 + 1),
    ):
        engine = InlineEngine(configuration(model, places, num_pages))
        vocabulary = engine.ready.limits.vocab_size
        if not ids:
            drawn = np.random.default_rng(0).integers(FIRST_ORDINARY_ID, vocabulary, prompt)
            ids = tuple(int(one) for one in drawn)
        runs: dict[str, list[Taken]] = {"samples": [], "separate": []}
        for number in range(repeats + 1):
            for way, kept in runs.items():
                taken, tokens = run(engine, requests_of(number, ids, samples, output), together=way == "samples")
                if expected and tokens != expected:
                    raise AssertionError(f"{model}, {name}, {way}: tokens differ from those of the first run")
                expected = tokens
                kept += [taken] * (number > 0)
        engine.close()
        for way, kept in runs.items():
            row = dataclasses.asdict(kept[0])
            for field in ("first_token_ms", "total_ms"):
                row[field] = statistics.median(getattr(one, field) for one in kept)
            row["runs"] = [dataclasses.asdict(one) for one in kept]
            found.append({"model": model, "engine": name, "way": way, **row})
    return found


def main() -> int:
    """Prints the table and writes the results; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="default,153m", help="default, 153m or 1b, separated by commas")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of the prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens of each sample")
    parser.add_argument("--slots", type=int, default=4, help="of the engines that have fewer than samples")
    parser.add_argument("--repeats", type=int, default=3, help="of each way, after one that does not count")
    options = parser.parse_args()
    work = options.samples, options.prompt, options.output, options.slots, options.repeats
    rows = [row for model in options.models.split(",") for row in measure(model, *work)]
    path = report.write(f"parallel_samples_jax{report.versions()['jax']}", vars(options) | {"seed": SEED}, rows)
    print(report.describe())
    header = ("model", "engine", "way", "pages", "prefill_tokens", "steps", "preemptions", "first_token_ms", "total_ms")
    print(report.table(header, [[row[name] for name in header] for row in rows]))
    print(f"tokens of all ways are equal; written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
