"""Turns examples into training batches: several examples in a row, each with positions of its own."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping

import numpy as np

from jaxserve.models.tiny.tasks import KINDS, MAX_SIZE, generate_split, is_held_out, lookup_run
from jaxserve.models.tiny.tiny_tokenizer import BOS_ID, EOS_ID, encode_fast


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised example. ids starts with <bos>; weights[i] is the loss weight of predicting ids[i] (0: prompt)."""

    kind: str
    ids: list[int]
    weights: list[float]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows, all [rows, length]. targets[i] follows tokens[i]; segments are 1, 2, ... and 0 for padding.

    tokens, targets, positions, segments are int32, weights is float32. kinds[row][segment - 1] names each example.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    weights: np.ndarray
    kinds: list[list[str]]

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.tokens, self.targets, self.positions, self.segments, self.weights


def make_example(kind: str, rng: random.Random, size: int, held_out: bool) -> Example:
    """A prompt with its answer and <eos>; a long answer's weight is its length's square root, shared by its tokens."""
    prompt, answer = generate_split(kind, rng, size, held_out)
    asked, said = encode_fast(prompt), encode_fast(answer)
    ids = [BOS_ID, *asked, *said, EOS_ID]
    weight = 1 / math.sqrt(len(said) + 1)
    return Example(kind, ids, [0.0] * (1 + len(asked)) + [weight] * (len(said) + 1))


def make_lookup_lesson(rng: random.Random, size: int, queries: int) -> Example:
    """A training table of `size` pairs that asks for many keys in a row, with loss on each value.

    A third of the lessons ask in the table's order: copying is learned early, and recall grows out of it.
    """
    in_order = rng.random() < 1 / 3
    while True:
        prompt, asked = lookup_run(rng, size, queries, in_order=in_order)
        if not is_held_out(prompt):
            break
    ids = [BOS_ID, *encode_fast(prompt), *encode_fast(asked[0][1])]
    weights = [0.0] * (len(ids) - 1) + [0.3]
    for key, value in asked[1:]:
        ids += encode_fast(key + value)
        weights += [0.0, 0.3]
    return Example("lookup", [*ids, EOS_ID], [*weights, 0.1])


def largest_size(kind: str, length: int) -> int:
    """The largest size of `kind` whose examples surely fit a row of `length` tokens."""
    worst = {
        "copy": lambda size: 2 * size + 6,
        "reverse": lambda size: 2 * size + 6,
        "sort": lambda size: 2 * size + 6,
        "add": lambda size: 3 * size + 7,
        "count": lambda size: 4 * size + 16,
        "json": lambda size: 32 * size + 10,
        "lookup": lambda size: 2 * size + 8,
    }[kind]
    return max((size for size in range(1, MAX_SIZE[kind] + 1) if worst(size) <= length), default=1)


class Mixer:
    """Draws training examples so that each kind's share of the tokens follows `shares`.

    caps: the largest size drawn of each kind. Sizes are uniform up to the cap, half of the time up to a third of it.
    """

    def __init__(self, rng: random.Random, shares: Mapping[str, float], caps: Mapping[str, int], length: int):
        self.rng = rng
        self.shares = {kind: max(shares[kind], 1e-6) for kind in KINDS}
        self.caps = {kind: min(caps[kind], largest_size(kind, length)) for kind in KINDS}
        self.length = length
        self.spent = dict.fromkeys(KINDS, 0)
        self.waiting: list[Example] = []

    def draw(self) -> Example:
        kind = min(KINDS, key=lambda kind: self.spent[kind] / self.shares[kind])
        example = self._draw(kind)
        self.spent[kind] += len(example.ids)
        return example

    def _draw(self, kind: str) -> Example:
        rng, cap = self.rng, self.caps[kind]
        if kind == "add" and rng.random() < 0.4:  # two digits are a hundredth of the sums of three
            size = cap
        else:
            size = rng.randint(1, cap if rng.random() < 0.6 else -(-cap // 3))
        if kind == "lookup" and rng.random() < 0.9:
            size = max(size, min(2, cap))  # one pair leaves nothing to find
            queries = min(size + 4, (self.length - 2 * size - 6) // 2)
            return make_lookup_lesson(rng, size, max(queries, 1))
        return make_example(kind, rng, size, held_out=False)

    def batch(self, rows: int) -> Batch:
        """A batch of `rows` rows of `length` tokens, filled first fit; what finds no place waits for the next one."""
        bins: list[list[Example]] = [[] for _ in range(rows)]
        room = [self.length] * rows
        waiting, misses = [], 0
        source = iter(self.waiting)
        while misses < 12:
            example = next(source, None) or self.draw()
            needed = len(example.ids) - 1  # the last token is only a target
            row = next((row for row in range(rows) if room[row] >= needed), None)
            if row is None:
                waiting.append(example)
                misses += 1
            else:
                bins[row].append(example)
                room[row] -= needed
        self.waiting = [*waiting, *source]
        return pack(bins, self.length)


def pack(bins: list[list[Example]], length: int) -> Batch:
    """Lays the examples of each bin side by side in a row of `length` tokens."""
    shape = (len(bins), length)
    tokens, targets, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    for row, examples in enumerate(bins):
        start = 0
        for segment, example in enumerate(examples, start=1):
            end = start + len(example.ids) - 1
            tokens[row, start:end] = example.ids[:-1]
            targets[row, start:end] = example.ids[1:]
            positions[row, start:end] = np.arange(end - start)
            segments[row, start:end] = segment
            weights[row, start:end] = example.weights[1:]
            start = end
    return Batch(tokens, targets, positions, segments, weights, [[e.kind for e in examples] for examples in bins])


def held_out_batches(seed: int, caps: Mapping[str, int], per_kind: int, rows: int, length: int) -> list[Batch]:
    """`per_kind` distinct held-out examples of each kind, sizes uniform from 1 to the cap (and to what fits the row).

    Sizes that have few prompts (sums of single digits: a handful) therefore count little. Where even 100 draws find
    nothing new, an example is taken twice.
    """
    batches, bins, room = [], [], 0
    for kind in KINDS:
        rng = random.Random(f"held-out-{seed}-{kind}")
        cap = min(caps[kind], largest_size(kind, length))
        seen: set[tuple[int, ...]] = set()
        for _ in range(per_kind):
            example = make_example(kind, rng, rng.randint(1, cap), held_out=True)
            for _ in range(99):
                if tuple(example.ids) not in seen:
                    break
                example = make_example(kind, rng, rng.randint(1, cap), held_out=True)
            seen.add(tuple(example.ids))
            if not bins or room < len(example.ids) - 1:
                bins.append([])
                room = length
            bins[-1].append(example)
            room -= len(example.ids) - 1
    for start in range(0, len(bins), rows):
        chunk = bins[start : start + rows]
        batches.append(pack(chunk + [[]] * (rows - len(chunk)), length))
    return batches
