"""Exact match of the shipped weights on held-out examples: `python -m jaxserve.models.tiny.evaluate`.

An example counts when the arg max is right at every answer token and at `<eos>`, given the right tokens before it:
that is when greedy decoding writes the right answer, and it takes one pass. Everything runs in float32.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence

from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.loading.checkpoint import load
from jaxserve.models.params import bind, make_mesh
from jaxserve.models.tiny.data import held_out_batches
from jaxserve.models.tiny.tasks import KINDS, MAX_SIZE
from jaxserve.models.tiny.train import score

CHECKPOINT = pathlib.Path(__file__).parent / "checkpoint"


def evaluate(directory: pathlib.Path, per_kind: int, seed: int, scale: float = 1.0) -> dict[str, float]:
    """Share of `per_kind` held-out examples of each kind solved, sizes uniform up to `scale` times MAX_SIZE.

    The seed picks the examples; training's own evaluations use seed 0.
    """
    config = ModelConfig.from_directory(directory)
    model = bind(config, load(directory, config, "float32", make_mesh()))
    graph, params = nnx.split(model, nnx.Param)
    caps = {kind: max(1, round(MAX_SIZE[kind] * scale)) for kind in KINDS}
    return score(params, graph, held_out_batches(seed, caps, per_kind, rows=8, length=512))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Exact match of the shipped weights on held-out examples")
    parser.add_argument("--model", default=str(CHECKPOINT), help="Hugging Face directory")
    parser.add_argument("--examples", type=int, default=512, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="largest size, as a share of the largest trained")
    options = parser.parse_args(arguments)
    print(json.dumps(evaluate(pathlib.Path(options.model), options.examples, options.seed, options.scale), indent=2))


if __name__ == "__main__":
    main()
