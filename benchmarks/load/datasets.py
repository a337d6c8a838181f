"""The requests of a serving benchmark: random, from a trace, with repeated prefixes, or tasks of the default model."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.work import FIRST_ORDINARY_ID, Work, random_work
from jaxserve.models.tiny.tasks import KINDS, MAX_SIZE, generate_split
from jaxserve.simulator.trace_files import BLOCK, TraceRow
from jaxserve.simulator.traces import Trace

TASK_MAX_TOKENS = 400
"""More than any right answer of the default model's tasks has."""


@dataclasses.dataclass(frozen=True)
class LoadRequest:
    """One request. prompt: a text or token ids. max_tokens: exactly so many where ignore_eos, else at most.

    arrival: seconds after the first request of its trace; None where an arrival process decides. kind, answer: of a
    task, with its one right answer.
    after: index of the request whose answer this one continues: it is sent `pause` seconds after that one has ended,
    and its prompt is that one's, the answer, and `prompt`. None for a request that waits for no other one.
    """

    prompt: str | Sequence[int]
    max_tokens: int
    ignore_eos: bool = True
    arrival: float | None = None
    kind: str = ""
    answer: str | None = None
    after: int | None = None
    pause: float = 0.0


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt of a task and its one right answer."""

    kind: str
    prompt: str
    answer: str


def random_requests(
    count: int, inputs: tuple[int, int], outputs: tuple[int, int], vocab_size: int, seed: int, repeat: int = 0
) -> list[LoadRequest]:
    """Random ids, lengths uniform within the bounds; another `repeat` has the same lengths and other ids."""
    work = random_work(count, inputs, outputs, vocab_size, seed, repeat)
    return [LoadRequest(prompt, tokens) for prompt, tokens in zip(work.prompts, work.new_tokens, strict=True)]


def prefix_requests(
    count: int, prefixes: int, prefix_len: int, suffix_len: int, output_len: int, vocab_size: int, seed: int
) -> list[LoadRequest]:
    """Prompts of one of `prefixes` random prefixes, each equally often, and a suffix of their own, in random order."""
    if not 1 <= prefixes <= count:
        raise ValueError(f"num_prefixes is {prefixes}; it must be from 1 to num_prompts {count}")
    rng = np.random.default_rng(seed)
    heads = [rng.integers(FIRST_ORDINARY_ID, vocab_size, prefix_len).tolist() for _ in range(prefixes)]
    order = rng.permutation(np.arange(count) % prefixes)
    tails = rng.integers(FIRST_ORDINARY_ID, vocab_size, (count, suffix_len)).tolist()
    return [LoadRequest(heads[head] + tail, output_len) for head, tail in zip(order, tails, strict=True)]


def held_out(per_kind: int, seed: int, scale: float) -> list[Example]:
    """`per_kind` examples of each kind of task, sizes uniform up to `scale` times the largest trained, in random order.

    No prompt is taken twice while 100 draws find a new one: there are only three held-out sums of single digits.
    """
    rng = random.Random(seed)
    examples = []
    for kind in KINDS:
        largest = max(1, round(MAX_SIZE[kind] * scale))
        seen: set[str] = set()
        for _ in range(per_kind):
            prompt = answer = ""
            for _ in range(100):
                prompt, answer = generate_split(kind, rng, rng.randint(1, largest), held_out=True)
                if prompt not in seen:
                    break
            seen.add(prompt)
            examples.append(Example(kind, prompt, answer))
    rng.shuffle(examples)
    return examples


def task_requests(count: int, seed: int) -> list[LoadRequest]:
    """Held-out tasks of the default model, kinds in equal shares and mixed."""
    examples = held_out(-(-count // len(KINDS)), seed, 1.0)[:count]
    return [
        LoadRequest(example.prompt, TASK_MAX_TOKENS, ignore_eos=False, kind=example.kind, answer=example.answer)
        for example in examples
    ]


def trace_requests(
    rows: Iterable[TraceRow], count: int, max_model_len: int, vocab_size: int, seed: int
) -> tuple[list[LoadRequest], int]:
    """The first `count` requests of a trace to arrive that fit the model, with random ids, and how many did not fit.

    Equal blocks have equal ids, so that a prefix cache finds what it would have found.
    """
    requests: list[LoadRequest] = []
    skipped = 0
    for row in sorted(rows, key=lambda row: row.arrival):
        if len(requests) == count:
            break
        if row.prompt_tokens + row.output_tokens > max_model_len:
            skipped += 1
            continue
        ids = _ids(row, len(requests), vocab_size, seed)
        requests.append(LoadRequest(ids, row.output_tokens, arrival=row.arrival))
    return requests, skipped


def conversation_requests(
    trace: Trace, max_model_len: int, vocab_size: int, seed: int
) -> tuple[list[LoadRequest], int]:
    """The turns of sessions that fit the model, with random ids, and how many did not fit.

    Equal content has equal ids. Each turn but the first of a session continues what the server answered before.
    """
    kept = trace.select(trace.prompt_tokens + trace.output_tokens <= max_model_len)
    requests = []
    for index, content in enumerate(kept.prompts):
        repeated = kept.repeated(index)
        requests.append(
            LoadRequest(
                content.after(repeated).drawn_ids(vocab_size, seed, FIRST_ORDINARY_ID),
                int(kept.output_tokens[index]),
                arrival=float(kept.arrivals[index]),
                after=int(kept.parents[index]) if repeated else None,
                pause=float(kept.pauses[index]),
            )
        )
    return requests, len(trace) - len(kept)


def as_work(requests: Sequence[LoadRequest]) -> Work:
    """The same requests for an offline engine, there at once. Raises ValueError where some wait for others."""
    if any(request.after is not None for request in requests):
        raise ValueError("an offline engine gets all requests at once; sessions have turns that wait: leave one out")
    return Work(
        [request.prompt for request in requests],
        [request.max_tokens for request in requests],
        ignore_eos=all(request.ignore_eos for request in requests),
    )


def _ids(row: TraceRow, number: int, vocab_size: int, seed: int) -> list[int]:
    if not row.blocks:
        return np.random.default_rng([seed, number]).integers(FIRST_ORDINARY_ID, vocab_size, row.prompt_tokens).tolist()
    blocks = [
        np.random.default_rng([seed, block]).integers(FIRST_ORDINARY_ID, vocab_size, BLOCK) for block in row.blocks
    ]
    return np.concatenate(blocks)[: row.prompt_tokens].tolist()
