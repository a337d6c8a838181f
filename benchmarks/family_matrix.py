"""How far every family is from transformers, shape by shape: `python -m benchmarks.family_matrix [NAME ...]`.

Random float32 weights. Logits are those of a prompt of 45 tokens and 64 greedy ones, through pages; tokens are those of
four prompts through the engine: the first one alone, computed as a whole; all of them in chunks of 16; and all of them
with so few pages that they preempt each other. Names are families, or shapes such as gemma2.1. Needs torch. Prints a
table for docs/models.md; the exit status is 1 where a difference is above 1e-4 or a token differs. With
`--references=DIRECTORY` what transformers computed is kept there and used again.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import importlib
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import checkpoint
from jaxserve.models.registry import ARCHITECTURES
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from tests.models import generate
from tests.models.family_shapes import FAMILIES, NEW_TOKENS, prompts, shape_names
from tests.runner.drive import Run, drive

ROOT = pathlib.Path(__file__).parents[1]
LENGTHS = (45, 35, 33, 40)
TOLERANCE = 1e-4
STEP_TOKENS, CHUNK_TOKENS, PAGE_SIZE, MAX_LEN = 64, 16, 16, 128


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was found for one shape: the largest difference of a logit, and how many tokens of how many are equal."""

    name: str
    difference: float
    equal: int
    tokens: int
    preemptions: int

    @property
    def passed(self) -> bool:
        """Whether it is what transformers computes."""
        return self.difference <= TOLERANCE and self.equal == self.tokens and self.preemptions > 0


def write_references(folder: pathlib.Path, names: list[str]) -> None:
    """Has transformers compute the shapes, in a process of its own."""
    command = [sys.executable, "-m", "tests.models.make_family_references", str(folder), *names]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def compare(directory: pathlib.Path, name: str) -> Comparison:
    """Compares one shape with what `write_references` wrote."""
    with np.load(directory / "reference.npz") as file:
        reference = dict(file)
    model = ModelConfig.from_directory(directory)
    saved = ModelConfig.from_directory(directory / "saved")
    assert dataclasses.replace(saved, dtype=model.dtype) == model, f"{name}: transformers' config.json means another"
    weights = checkpoint.load(directory, model, "float32", params.make_mesh())
    tokens, logits = generate.paged_greedy(model, weights, prompts(name)[0], NEW_TOKENS)
    difference = float(np.abs(logits - reference["logits0"]).max())
    config = EngineConfig(
        model=str(directory),
        dtype="float32",
        skip_tokenizer_init=True,
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=STEP_TOKENS),
        cache=CacheConfig(num_pages=97, page_size=PAGE_SIZE),
        token_buckets=(STEP_TOKENS,),
        row_buckets=(8,),
        max_model_len=MAX_LEN,
    )
    runner = ModelRunner(config)
    requests = [
        EngineRequest(f"r{number}", tuple(prompt.tolist()), max_tokens=NEW_TOKENS)
        for number, prompt in enumerate(prompts(name, LENGTHS))
    ]
    expected = [reference[f"tokens{number}"][length:] for number, length in enumerate(LENGTHS)]
    preempted = preempting(runner, config, requests)
    runs = [
        drive(runner, config, requests[:1]).tokens,
        drive(runner, config, requests, max_num_batched_tokens=CHUNK_TOKENS).tokens,
        preempted.tokens,
        [tokens[LENGTHS[0] :].tolist()],
    ]
    pairs = [pair for run in runs for pair in zip(run, expected, strict=False)]
    equal = sum(int(np.cumprod(np.array(made) == wanted).sum()) for made, wanted in pairs)
    return Comparison(name, difference, equal, len(pairs) * NEW_TOKENS, preempted.num_preemptions)


def preempting(runner: ModelRunner, config: EngineConfig, requests: list[EngineRequest]) -> Run:
    """Runs the requests with as many pages as make them preempt each other; windows need few of them."""
    alone = runner._shapes.groups.most_pages(1, MAX_LEN, PAGE_SIZE, CHUNK_TOKENS)

    def run(pages: int) -> Run:
        return drive(runner, config, requests, num_pages=pages, max_num_batched_tokens=CHUNK_TOKENS)

    pages = 2 * alone + 1
    found = run(pages)
    while not found.num_preemptions and pages > alone + 1:
        pages -= 1
        found = run(pages)
    return found


def table(found: list[Comparison]) -> str:
    """The table of docs/models.md: a line for each family."""
    of_family: dict[str, list[Comparison]] = collections.defaultdict(list)
    for one in found:
        of_family[one.name.partition(".")[0]].append(one)
    lines = [
        "| family | shapes | largest logit difference | equal tokens | lines of its file |",
        "|---|---|---|---|---|",
    ]
    for name, ones in of_family.items():
        equal, tokens = sum(one.equal for one in ones), sum(one.tokens for one in ones)
        difference = max(one.difference for one in ones)
        architecture, of_file = FAMILIES[name][0], file_lines(FAMILIES[name][0])
        lines.append(f"| `{architecture}` | {len(ones)} | {difference:.1e} | {equal:,} of {tokens:,} | {of_file} |")
    return "\n".join(lines)


def file_lines(architecture: str) -> int:
    """Lines of the file of a family."""
    module = importlib.import_module(ARCHITECTURES[architecture].layers.__module__)
    assert module.__file__ is not None
    return len(pathlib.Path(module.__file__).read_text(encoding="utf-8").splitlines())


def main(arguments: list[str]) -> int:
    """Prints what is found; returns the exit status."""
    folders = [argument.partition("=")[2] for argument in arguments if argument.startswith("--references=")]
    arguments = [argument for argument in arguments if not argument.startswith("--")]
    known = shape_names()
    names = [name for name in known if not arguments or name in arguments or name.partition(".")[0] in arguments]
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = folders[0] if folders else temporary
        # Programs that are the same for several shapes are compiled once.
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(folder) / "compiled"))
        missing = [name for name in names if not (pathlib.Path(folder) / name / "reference.npz").exists()]
        if missing:
            write_references(pathlib.Path(folder), missing)
        for name in names:
            found.append(compare(pathlib.Path(folder) / name, name))
            print(found[-1], file=sys.stderr, flush=True)
    print(f"{datetime.date.today().isoformat()}\n\n{table(found)}")
    return 0 if all(one.passed for one in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
