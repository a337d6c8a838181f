"""What sampling options cost a decode step: `python -m benchmarks.sampling_cost`.

64 rows decode at a vocabulary of 128,256 tokens: greedy, drawn at random, with each option in all rows, and with all of
them in half of the rows. Ways take turns, so that a machine that changes its speed changes it for all. A ratio is that
of a way's median step to greedy steps, and to plain random ones, in the same round.

Then what the options cost steps in which no row has any: greedy steps with the sample program as it is, and with one
that does nothing but take the largest logit, by turns in one engine, at each of `--greedy-models`.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import report
from benchmarks.decode_steps import PROGRAMS, ROWS, Stepper
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.spread import spread, spread_text
from benchmarks.work import SHAPES
from jaxserve import SamplingParams
from jaxserve.config.settings import EngineConfig
from jaxserve.models.params import make_mesh
from jaxserve.programs.compiler import compiler_options
from jaxserve.programs.layout import sample_layout
from jaxserve.programs.logit_rows import all_finite, argmax
from jaxserve.programs.penalties import Penalties
from jaxserve.programs.slots import Slots
from jaxserve.programs.step_programs import (
    ProgramKey,
    Shapes,
    abstract_arguments,
    abstract_results,
    bind,
    donated_arguments,
    products_of,
)
from jaxserve.scheduler.plan import NOT_FINITE

_TURN = 4
"""Steps with one sample program before the other takes its turn."""

_BLOCKS = 122
"""Of so many steps, in one round of requests."""

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


def measure_greedy(model: pathlib.Path, turns: int) -> dict[str, Any]:
    """Median milliseconds of a greedy step with both sample programs, and the spread of their ratios.

    A turn is a few steps with each program. The first step after a change is left out: it waits for the program that
    was started before it.
    """
    config = EngineConfig.from_options(
        model=str(model), skip_tokenizer_init=True, max_model_len=1024, num_pages=ROWS * 1024 // 16 + 1, **PROGRAMS
    )
    stepper = Stepper(config)
    executables, key = stepper.runner.programs.executables, ProgramKey("sample", ROWS)
    programs = {"all options": executables[key], "greedy alone": greedy_program(stepper.runner._shapes)}

    def before_step(number: int) -> None:
        executables[key] = programs[which(number // _TURN)]

    def which(block: int) -> str:  # a, b, b, a, ...: a drift favors neither
        return list(programs)[(block + 1) // 2 % 2]

    found: dict[str, list[float]] = {name: [] for name in programs}
    while len(found["all options"]) < turns:
        steps = stepper.round(ways()["greedy"], _BLOCKS * _TURN, before_step).steps
        for block in range(2, _BLOCKS):  # the first two warm up
            found[which(block)].append(1e3 * statistics.median(steps[block * _TURN + 1 : (block + 1) * _TURN]))
    ratios = [one / other for one, other in zip(*found.values(), strict=True)]
    return {"step_ms": found, "ratio": spread(ratios)}


def greedy_program(shapes: Shapes) -> Callable[..., Any]:
    """Compiles a sample program that takes the largest logit of each row, whatever its parameters are."""
    key, mesh = ProgramKey("sample", ROWS), make_mesh()

    def sample_greedily(
        params: Any, slots: Slots, hidden: jax.Array, masks: jax.Array, penalties: Penalties, vector: jax.Array
    ) -> tuple[Slots, Penalties, jax.Array, jax.Array]:
        fields = sample_layout(ROWS).read(vector)
        logits = bind(shapes.model, params, products_of(shapes, mesh)).logits(hidden[fields["token"]])
        ids = jnp.where(all_finite(logits), argmax(logits), NOT_FINITE)
        last_token = slots.last_token.at[fields["slot"]].set(jnp.maximum(ids, 0), mode="drop")
        results = abstract_results(key, shapes, mesh)
        return (
            dataclasses.replace(slots, last_token=last_token),
            penalties,
            ids,
            jnp.zeros(results[-1].shape, jnp.int32),
        )

    program = jax.jit(sample_greedily, donate_argnums=donated_arguments(key))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = program.lower(*abstract_arguments(key, shapes, mesh))
    return lowered.compile(compiler_options(mesh.devices.flat[0].platform))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="128k", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="in each round of each way")
    parser.add_argument("--greedy-models", default=["153m", "128k"], nargs="*", choices=list(SHAPES))
    parser.add_argument("--greedy-turns", type=int, default=80, help="of both programs")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / "model"
        write_checkpoint(model, SHAPES[options.model])
        results = measure(model, options.rounds, options.steps) if options.rounds else {}
        greedy = {}
        for name in options.greedy_models:
            write_checkpoint(model := pathlib.Path(folder) / name, SHAPES[name])
            greedy[name] = measure_greedy(model, options.greedy_turns)
    path = report.write(
        f"sampling_cost_jax{report.versions()['jax']}", vars(options), {"ways": results, "greedy": greedy}
    )
    print(report.describe())
    cells = [
        (name, statistics.median(row["step_ms"]), row["to_greedy"], row["to_random"]) for name, row in results.items()
    ]
    print(report.table(("64 rows", "step ms", "to greedy", "to random"), cells))
    cells = [
        (name, *(statistics.median(times) for times in found["step_ms"].values()), spread_text(found["ratio"]))
        for name, found in greedy.items()
    ]
    print(report.table(("greedy steps", "all options, ms", "greedy alone, ms", "ratio"), cells))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
