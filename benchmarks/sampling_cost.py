"""What sampling options cost a decode step: `python -m benchmarks.sampling_cost`.

64 rows decode at a vocabulary of 128,256 tokens: greedy, drawn at random, with each option in all rows, and with all of
them in half of the rows. Ways take turns, so that a machine that changes its speed changes it for all. A ratio is that
of a way's median step to greedy steps, and to plain random ones, in the same round.

`python -m benchmarks.before_after --workloads 153m,128k` says what the options cost steps in which no row has any,
beside a checkout from before there were any.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.decode_steps import PROGRAMS, ROWS, Stepper
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.work import SHAPES
from jaxserve import SamplingParams
from jaxserve.config.settings import EngineConfig

_OPTIONS: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 40},
    "top_k and top_p": {"top_k": 40, "top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.9},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "logit_bias": {"logit_bias": dict.fromkeys(range(3, 300), 1.0)},
    "allowed_token_ids": {"allowed_token_ids": list(range(3, 500))},
    "logprobs": {"logprobs": 5},
}


def ways() -> dict[str, list[SamplingParams]]:
    """The parameters of the rows, by the name of the way."""

    def rows(**options: Any) -> list[SamplingParams]:
        return [SamplingParams(seed=number, ignore_eos=True, **options) for number in range(ROWS)]

    plain = rows(temperature=1.0)
    together = {name: value for part in _OPTIONS.values() for name, value in part.items()}
    found = {"greedy": rows(temperature=0.0), "random": plain}
    found |= {name: rows(temperature=1.0, **options) for name, options in _OPTIONS.items()}
    return found | {
        "all in every second row": [
            mine if number % 2 else other
            for number, (mine, other) in enumerate(zip(rows(temperature=1.0, **together), plain, strict=True))
        ]
    }


def measure(model: pathlib.Path, rounds: int, steps: int) -> dict[str, Any]:
    """Median milliseconds of a step in each way and round."""
    config = EngineConfig.from_options(
        model=str(model), skip_tokenizer_init=True, max_model_len=1024, num_pages=ROWS * 1024 // 16 + 1, **PROGRAMS
    )
    stepper = Stepper(config)
    found: dict[str, list[float]] = {name: [] for name in ways()}
    for number in range(rounds + 1):
        for name, rows in ways().items():
            seconds = statistics.median(stepper.round(rows, steps).steps)
            if number:  # the first round warms up
                found[name].append(1e3 * seconds)
    return {
        name: {
            "step_ms": times,
            "to_greedy": statistics.median(one / other for one, other in zip(times, found["greedy"], strict=True)),
            "to_random": statistics.median(one / other for one, other in zip(times, found["random"], strict=True)),
        }
        for name, times in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="128k", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="in each round of each way")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / "model"
        write_checkpoint(model, SHAPES[options.model])
        results = measure(model, options.rounds, options.steps)
    path = report.write(f"sampling_cost_jax{report.versions()['jax']}", vars(options), results)
    print(report.describe())
    cells = [
        (name, statistics.median(row["step_ms"]), row["to_greedy"], row["to_random"]) for name, row in results.items()
    ]
    print(report.table(("64 rows", "step ms", "to greedy", "to random"), cells))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
