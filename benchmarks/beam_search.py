"""What a beam search costs beside plain sampling of as many tokens: `python -m benchmarks.beam_search`.

For each prompt a search of `--width` beams and `--output` tokens runs beside one request of `--width` samples of
`--output` tokens each, in turns, warm, on an engine in this process; ends are ignored, so that both compute as many
output tokens. Beams are requests for one token each, whose prompts are computed anew where no cached page serves them:
so the prompt tokens that the engine computes are counted, beside seconds, steps and pages. Where the engine caches
prefixes, it is measured with and without. Every repeat has prompts of its own. Writes JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.work import FIRST_ORDINARY_ID, SHAPES
from jaxserve.beam_search_api import BeamSearchParams
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.llm import LLM
from jaxserve.models.config import ModelConfig
from jaxserve.sampling_params import SamplingParams
from jaxserve.telemetry.recorder import Event, StepRecorded

PAGE_SIZE = 16
CACHING = "enable_prefix_caching"
"""The setting that turns the prefix cache on and off."""


@dataclasses.dataclass
class Taken:
    """What one run took. prompt_tokens: of prompts, computed by the engine; output_tokens: returned. pages: at most."""

    seconds: float = 0.0
    prompt_tokens: int = 0
    decode_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    pages: int = 0


def configurations(model: str, width: int, longest: int) -> Iterator[tuple[str, EngineConfig]]:
    """Engines by name: with room for all beams, and a prefix cache where there is one, on and off."""
    if model == "default":
        known = EngineConfig(
            model=str(report.ROOT / "models" / "tiny" / "checkpoint"), dtype="float32", skip_tokenizer_init=True
        )
    else:
        known = EngineConfig(
            architecture=ModelConfig.from_hf(SHAPES[model]), load_format="dummy", skip_tokenizer_init=True
        )
    pages = 2 * width * -(-longest // PAGE_SIZE) + 1
    scheduler = SchedulerConfig(max_num_seqs=width, max_num_batched_tokens=512)
    cache = CacheConfig(page_size=PAGE_SIZE, num_pages=pages)
    if CACHING not in {field.name for field in dataclasses.fields(CacheConfig)}:
        yield "no prefix cache", dataclasses.replace(known, scheduler=scheduler, cache=cache)
        return
    for name, on in (("prefix cache", True), ("no prefix cache", False)):
        chosen = dataclasses.replace(cache, **{CACHING: on})
        yield name, dataclasses.replace(known, scheduler=scheduler, cache=chosen)


def run(engine: InlineEngine, call: Callable[[], int]) -> Taken:
    """Runs a call, which returns its output tokens, and counts what the engine does for it."""
    taken = Taken()

    def record(event: Event) -> None:
        if isinstance(event, StepRecorded):
            taken.steps += 1
            taken.prompt_tokens += event.prefill_tokens
            taken.decode_tokens += event.decode_tokens
            taken.pages = max(taken.pages, event.pages_used)

    unsubscribe = engine.core.recorder.subscribe(record)
    begin = time.perf_counter()
    taken.output_tokens = call()
    taken.seconds = time.perf_counter() - begin
    unsubscribe()
    engine.core.check_integrity()
    return taken


def ways(llm: LLM, width: int, output: int) -> dict[str, Callable[[list[int]], int]]:
    """What is compared, by name: each takes a prompt and returns the number of its output tokens."""
    search = BeamSearchParams(width, output, ignore_eos=True)
    sampled = SamplingParams(n=width, temperature=1.0, seed=1, max_tokens=output, ignore_eos=True)

    def searched(ids: list[int]) -> int:
        (found,) = llm.beam_search({"prompt_token_ids": ids}, search)
        return sum(len(one.logprobs) for one in found.sequences)

    def drawn(ids: list[int]) -> int:
        (found,) = llm.generate({"prompt_token_ids": ids}, sampled, use_tqdm=False)
        return sum(len(one.token_ids) for one in found.outputs)

    return {"beam search": searched, "sampling": drawn}


def measure(model: str, width: int, prompts: list[int], output: int, repeats: int) -> list[dict[str, Any]]:
    """Measures both ways on every engine: medians of the seconds; the counts are those of the last repeat."""
    found: list[dict[str, Any]] = []
    for name, config in configurations(model, width, max(prompts) + output):
        engine = InlineEngine(config)
        random = np.random.default_rng(0)
        compared = ways(LLM(client=engine), width, output)
        for prompt in prompts:
            runs: dict[str, list[Taken]] = {way: [] for way in compared}
            for number in range(repeats + 1):
                for way, call in compared.items():
                    drawn = random.integers(FIRST_ORDINARY_ID, engine.ready.limits.vocab_size, prompt)
                    taken = run(engine, lambda call=call, ids=[int(one) for one in drawn]: call(ids))
                    if taken.output_tokens != width * output:
                        raise AssertionError(f"{way} gave {taken.output_tokens} tokens for {width} x {output}")
                    runs[way] += [taken] * (number > 0)
            plain = statistics.median(one.seconds for one in runs["sampling"])
            for way, kept in runs.items():
                row = dataclasses.asdict(kept[-1]) | {"seconds": statistics.median(one.seconds for one in kept)}
                row["times"] = row["seconds"] / plain
                row["runs"] = [dataclasses.asdict(one) for one in kept]
                found.append({"model": model, "engine": name, "prompt": prompt, "way": way, **row})
        engine.close()
    return found


def main() -> int:
    """Prints the table and writes the results; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="default", help="default, 153m or 1b, separated by commas")
    parser.add_argument("--width", type=int, default=4, help="beams, and samples")
    parser.add_argument("--prompts", default="32,1000", help="tokens of the prompts, separated by commas")
    parser.add_argument("--output", type=int, default=64, help="tokens of each output")
    parser.add_argument("--repeats", type=int, default=3, help="of each way, after one that does not count")
    options = parser.parse_args()
    prompts = [int(one) for one in options.prompts.split(",")]
    work = options.width, prompts, options.output, options.repeats
    rows = [row for model in options.models.split(",") for row in measure(model, *work)]
    path = report.write(f"beam_search_jax{report.versions()['jax']}", vars(options), rows)
    print(report.describe())
    header = (
        "model",
        "engine",
        "prompt",
        "way",
        "prompt_tokens",
        "output_tokens",
        "steps",
        "pages",
        "seconds",
        "times",
    )
    print(report.table(header, [[row[name] for name in header] for row in rows]))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
