"""What an offline benchmark runs: prompts and lengths, and the workloads that peers were measured on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.random_checkpoint import LLAMA_1B, LLAMA_153M

FIRST_ORDINARY_ID = 3
"""Lower ids are the special tokens of the shapes in benchmarks/random_checkpoint.py."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Requests that are there at once.

    prompts: token ids, or a text, of each. new_tokens: how many each generates, exactly where ignore_eos, else at most.
    """

    prompts: Sequence[Sequence[int] | str]
    new_tokens: Sequence[int]
    ignore_eos: bool = True

    @property
    def input_tokens(self) -> int:
        """Tokens of all prompts, which must be ids."""
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def most_output_tokens(self) -> int:
        return sum(self.new_tokens)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model shape and random requests for it. inputs, outputs: the least and greatest length, both included.

    transformers_rounds: it takes minutes for what others do in seconds, so it runs fewer rounds; 0 leaves it out.
    """

    name: str
    model: str
    requests: int
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    transformers_rounds: int

    def work(self, seed: int, repeat: int) -> Work:
        """Lengths depend on `seed` alone, ids also on `repeat`: repeats cost the same, and no prefix cache helps."""
        return random_work(self.requests, self.inputs, self.outputs, SHAPES[self.model]["vocab_size"], seed, repeat)


SHAPES: dict[str, dict[str, Any]] = {
    "153m": LLAMA_153M,
    "1b": LLAMA_1B,
    "128k": LLAMA_153M | {"vocab_size": 128_256},
}
"""config.json of the models with random weights, by the name that the command lines take."""

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("153m", "153m", 64, (32, 512), (16, 256), transformers_rounds=1),
        Workload("1b", "1b", 16, (32, 512), (16, 256), transformers_rounds=0),
        Workload("single", "153m", 1, (128, 128), (128, 128), transformers_rounds=1),
        Workload("128k", "128k", 64, (16, 32), (32, 32), transformers_rounds=0),
    )
}


def random_work(
    requests: int, inputs: tuple[int, int], outputs: tuple[int, int], vocab_size: int, seed: int, repeat: int
) -> Work:
    """Random ids; lengths uniform within the bounds (both included) and the same for every `repeat` of a `seed`."""
    lengths = np.random.default_rng(seed)
    input_lengths = lengths.integers(inputs[0], inputs[1] + 1, requests)
    output_lengths = lengths.integers(outputs[0], outputs[1] + 1, requests)
    ids = np.random.default_rng([seed, repeat])
    prompts = [ids.integers(FIRST_ORDINARY_ID, vocab_size, size).tolist() for size in input_lengths]
    return Work(prompts, output_lengths.tolist())


def engine_options(bindings: Sequence[str], shape: str) -> dict[str, Any]:
    """Options of `LLM` from NAME=VALUE or MODEL:NAME=VALUE, VALUE being JSON; those for other models are left out.

    Raises ValueError for a binding that is neither.
    """
    found = {}
    for binding in bindings:
        name, equals, text = binding.partition("=")
        model, colon, option = name.rpartition(":")
        if not equals or (colon and model not in SHAPES):
            raise ValueError(
                f"--engine is {binding!r}; it must be NAME=VALUE, or MODEL:NAME=VALUE with MODEL one of {list(SHAPES)}"
            )
        if not colon or model == shape:
            try:
                found[option] = json.loads(text)
            except json.JSONDecodeError:
                raise ValueError(f"--engine {binding!r}: {text!r} is not JSON; quote a text: NAME='\"text\"'") from None
    return found
