"""What structured outputs guarantee and cost: `python -m benchmarks.structured_outputs`.

Guarantee: random schemas, regular expressions and grammars at a high temperature, on the shipped model and on random
weights with a vocabulary of 32,000 that is trained here; how many outputs end by their grammar within --max-tokens and
hold before an independent check.

Cost: decode steps of 64 rows at a vocabulary of 128,256, of which none, or 32, follow a grammar, in turn; the time of a
step, which is that of its rows without a grammar too; the time for masks in it; and the longest time for which a thread
that wakes up all the time did not get the interpreter lock.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import llguidance
import numpy as np
import tokenizers

from benchmarks import report
from benchmarks.decode_steps import PROGRAMS, ROWS, Round, Stepper
from benchmarks.grammar_cases import KINDS, GrammarCase, cases
from benchmarks.random_checkpoint import LLAMA_153M, write_checkpoint
from jaxserve import LLM, SamplingParams, StructuredOutputsParams
from jaxserve.config.settings import EngineConfig
from jaxserve.engine.constraints.vocabulary import load_vocabulary
from jaxserve.frontend.grammar_text import grammar_of
from jaxserve.outputs import RequestOutput

TEMPERATURE = 1.5
SMALL = LLAMA_153M | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDLESS = {
    "type": "array",
    "minItems": 100_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "größe": {"type": "integer", "minimum": 0, "maximum": 1000},
            "tags": {"type": "array", "items": {"enum": ["rot", "grün", "blau"]}, "maxItems": 3},
        },
        "required": ["name", "größe", "tags"],
        "additionalProperties": False,
    },
}
"""A schema whose output does not end within a measurement."""


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def train_tokenizer(directory: pathlib.Path, vocab_size: int, megabytes: float) -> int:
    """Trains a byte-level BPE on Python's own library, as far as it has that many tokens; returns how many it has."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(int(megabytes * 1e6)), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def _corpus(most: int) -> Iterator[str]:
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if most <= 0:
            return
        text = path.read_text(encoding="utf-8", errors="ignore")[:200_000]
        most -= len(text)
        yield text


def enlarge_tokenizer(directory: pathlib.Path, vocab_size: int) -> None:
    """Adds tokens to a trained tokenizer, joined from two of its own, until it has `vocab_size`."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    pieces, rng = [piece for piece in vocab if len(piece) < 6 and not piece.startswith("<")], np.random.default_rng(0)
    while len(vocab) < vocab_size:
        left, right = (pieces[number] for number in rng.integers(len(pieces), size=2))
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append([left, right])
    path.write_text(json.dumps(content), encoding="utf-8")


# ---- guarantee -------------------------------------------------------------------------------------------------------


def guarantee(model: str, drawn: Sequence[GrammarCase], options: argparse.Namespace) -> dict[str, Any]:
    """How many of the cases end by their grammar, and hold."""
    params = [
        SamplingParams(
            temperature=TEMPERATURE,
            seed=options.seed + number,
            max_tokens=options.max_tokens,
            structured_outputs=case.params,
        )
        for number, case in enumerate(drawn)
    ]
    pages = ROWS * (options.max_tokens + 32) // 16 + 1
    with LLM(model=model, num_pages=pages, max_model_len=options.max_tokens + 64, **PROGRAMS) as llm:
        begin = time.perf_counter()
        outputs = llm.generate([f"{case.kind}: " for case in drawn], params, use_tqdm=False)
        seconds = time.perf_counter() - begin
    counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in (*KINDS, "all")}
    wrong = []
    for case, output in zip(drawn, outputs, strict=True):
        for kind in (case.kind, "all"):
            counts[kind].update(_judged(case, output))
        one = output.outputs[0]
        if one.finish_reason == "error" or (one.finish_reason == "stop" and not case.holds(one.text)):
            wrong.append({"case": case.params.as_dict(), "text": one.text, "error": output.error})
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    forced, saved = forced_tokens(model, drawn, outputs)
    return {
        "forced_tokens": forced,
        "steps_that_chunks_would_save": saved,
        "counts": counts,
        "wrong": wrong,
        "seconds": seconds,
        "output_tokens": sum(lengths),
        "median_tokens": statistics.median(lengths),
    }


def forced_tokens(model: str, drawn: Sequence[GrammarCase], outputs: Sequence[RequestOutput]) -> tuple[int, int]:
    """How many output tokens had a mask of one token alone, and how many steps fewer there would have been had each run
    of them been computed at once: all but one of each run."""
    vocabulary, forced, saved = load_vocabulary(model), 0, 0
    mask = np.empty(vocabulary.words, np.uint32)
    for case, output in zip(drawn, outputs, strict=True):
        grammar = grammar_of(case.params, vocabulary.special, 100)
        matcher, run = llguidance.LLMatcher(vocabulary.tokenizer, grammar, log_level=0), 0
        for token_id in output.outputs[0].token_ids:
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            run = run + 1 if np.bitwise_count(mask).sum() == 1 else 0
            forced, saved = forced + (run > 0), saved + (run > 1)
            if not matcher.consume_token(token_id):
                break  # the token that ends the output
    return forced, saved


def _judged(case: GrammarCase, output: RequestOutput) -> Iterator[str]:
    one = output.outputs[0]
    yield "cases"
    yield one.finish_reason
    if one.finish_reason == "stop" and case.holds(one.text):
        yield "hold"


# ---- cost ------------------------------------------------------------------------------------------------------------


def _rows(constrained: int) -> list[SamplingParams]:
    """Parameters of 64 rows, of which every second one of the first follows a grammar."""
    structured = StructuredOutputsParams(json=ENDLESS)
    return [
        SamplingParams(
            temperature=TEMPERATURE,
            seed=number,
            ignore_eos=True,
            structured_outputs=structured if number % 2 and number // 2 < constrained else None,
        )
        for number in range(ROWS)
    ]


def cost(model: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Times of steps without and with 32 constrained rows, in turn."""
    pages = ROWS * 1024 // 16 + 1
    config = EngineConfig.from_options(model=str(model), max_model_len=1024, num_pages=pages, **PROGRAMS)
    stepper = Stepper(config)
    stepper.round(_rows(32), 8)
    rounds: dict[int, list[Round]] = {0: [], 32: []}
    for _ in range(options.rounds):
        for constrained in rounds:
            rounds[constrained].append(stepper.round(_rows(constrained), options.steps))
    ratios = [
        statistics.median(mine.steps) / statistics.median(plain.steps)
        for plain, mine in zip(rounds[0], rounds[32], strict=True)
    ]
    found: dict[str, Any] = {"ratios": ratios, "ratio": statistics.median(ratios)}
    for constrained, several in rounds.items():
        gaps = [gap for one in several for gap in one.gaps]
        found[str(constrained)] = {
            "step_ms": [1e3 * statistics.median(one.steps) for one in several],
            "mask_ms": [1e3 * one.masks[0] for one in several],
            "longest_gap_ms": 1e3 * max(gaps),
            "p99_gap_ms": 1e3 * float(np.percentile(gaps, 99)),
        }
    return found


# ---- the command -----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500, help="grammars for each model")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5, help="of steps without and with grammars, in turn")
    parser.add_argument("--steps", type=int, default=30, help="in each of them")
    parser.add_argument("--megabytes", type=float, default=8.0, help="of text that the vocabulary is trained on")
    parser.add_argument("--parts", nargs="+", default=["tiny", "bpe", "cost"], choices=["tiny", "bpe", "cost"])
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    drawn = cases(options.cases, options.seed)
    results: dict[str, Any] = {}
    print(report.describe(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if "tiny" in options.parts:
            results["tiny"] = guarantee(str(report.ROOT / "models" / "tiny" / "checkpoint"), drawn, options)
        if "bpe" in options.parts:
            small = pathlib.Path(folder) / "bpe"
            write_checkpoint(small, SMALL)
            print(f"{train_tokenizer(small, SMALL['vocab_size'], options.megabytes)} tokens trained", flush=True)
            results["bpe"] = guarantee(str(small), drawn, options)
        for name in ("tiny", "bpe"):
            if name in results:
                _show(name, results[name])
        if "cost" in options.parts:
            large = pathlib.Path(folder) / "large"
            write_checkpoint(large, LLAMA_153M | {"vocab_size": 128_256})
            train_tokenizer(large, 32_000, options.megabytes)
            enlarge_tokenizer(large, 128_000)
            results["cost"] = cost(large, options)
            _show_cost(results["cost"])
    print(report.write("structured_outputs", vars(options), results))
    few = [
        name
        for name in ("tiny", "bpe")
        if name in results and (results[name]["wrong"] or results[name]["counts"]["all"]["hold"] < 0.9 * options.cases)
    ]
    return report.fail(f"outputs do not follow their grammars: {', '.join(few)}") if few else 0


def _show(name: str, found: dict[str, Any]) -> None:
    header = ("grammars", "cases", "end by their grammar", "hold", "cut off", "errors")
    rows = [
        (kind, counts["cases"], counts["stop"], counts["hold"], counts["length"], counts["error"])
        for kind, counts in found["counts"].items()
    ]
    print(f"\n{name}: {found['output_tokens']} tokens in {found['seconds']:.1f} s, median {found['median_tokens']}")
    print(
        f"{found['forced_tokens']} tokens were forced; chunks of them would save "
        f"{found['steps_that_chunks_would_save']} of {found['output_tokens']} steps of single rows"
    )
    print(report.table(header, rows), flush=True)


def _show_cost(found: dict[str, Any]) -> None:
    header = ("constrained rows of 64", "ms/step", "ms for masks", "longest gap, ms", "p99 gap, ms")
    rows = [
        (
            name,
            statistics.median(one["step_ms"]),
            statistics.median(one["mask_ms"]),
            one["longest_gap_ms"],
            one["p99_gap_ms"],
        )
        for name, one in found.items()
        if name.isdigit()
    ]
    print("\n" + report.table(header, rows))
    print(f"ratio {found['ratio']:.3f} (rounds {', '.join(f'{ratio:.3f}' for ratio in found['ratios'])})", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
