"""Seven tasks with exactly one right answer each, generated from a random number generator alone.

`generate(kind, rng, size)` gives one (prompt, answer) pair. A sixteenth of all prompts, chosen by a stable hash of the
prompt's first line, is held out: training never draws from it and evaluation draws from nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import string
from collections.abc import Callable

from jaxserve.models.tiny.words import ACCENTED, CITIES, EMOJI, FIELDS, KEY_WORDS, NAMES

HELD_OUT_SHARE = 16
"""One prompt in so many is held out."""

LETTERS = string.ascii_lowercase
PRINTABLE = string.ascii_letters + string.digits + string.punctuation


def copy_text(rng: random.Random, size: int) -> str:
    """`size` UTF-8 bytes of one random style: letters, words, digits, printable ASCII, or text with emoji.

    Ten digits repeat too much for long copies of them to be found again by what came before: they stop at 40.
    """
    style = rng.random()
    if style < 0.3:
        return "".join(rng.choices(LETTERS, k=size))
    if style < 0.55:
        return pseudo_words(rng, size)
    if style < 0.65 and size <= 40:
        return "".join(rng.choices(string.digits, k=size))
    if style < 0.8:
        return "".join(rng.choices(PRINTABLE, k=size))
    pieces, left = [], size
    rare = EMOJI if rng.random() < 0.7 else ACCENTED
    while left:
        piece = rng.choice(rare) if rng.random() < 0.3 else rng.choice(LETTERS)
        width = len(piece.encode())
        if width > left:
            piece, width = rng.choice(LETTERS), 1
        pieces.append(piece)
        left -= width
    return "".join(pieces)


def pseudo_words(rng: random.Random, size: int) -> str:
    """`size` characters of made-up words of 1 to 8 letters with single spaces between them, none at either end."""
    text = " ".join("".join(rng.choices(LETTERS, k=rng.randint(1, 8))) for _ in range(size // 2 + 1))[:size]
    return text if not text.endswith(" ") else text[:-1] + rng.choice(LETTERS)


def make_copy(rng: random.Random, size: int) -> tuple[str, str]:
    text = copy_text(rng, size)
    return f"copy: {text}\n", text


def make_reverse(rng: random.Random, size: int) -> tuple[str, str]:
    text = "".join(rng.choices(LETTERS, k=size))
    return f"reverse: {text}\n", text[::-1]


def make_sort(rng: random.Random, size: int) -> tuple[str, str]:
    text = "".join(rng.choices(LETTERS, k=size))
    return f"sort: {text}\n", "".join(sorted(text))


def make_add(rng: random.Random, size: int) -> tuple[str, str]:
    """Two numbers of at most `size` digits: both of that many, any two below 10 ** size, or of any two lengths."""
    style = rng.random()
    if style < 0.4 and size > 1:
        left, right = (rng.randrange(10 ** (size - 1), 10**size) for _ in range(2))
    elif style < 0.6:
        left, right = (rng.randrange(10**size) for _ in range(2))
    else:
        left, right = (rng.randrange(10 ** rng.randint(1, size)) for _ in range(2))
    return f"add: {left}+{right}\n", str(left + right)


def make_count(rng: random.Random, size: int) -> tuple[str, str]:
    """`size` consecutive numbers below 1,000; small starts are as likely as large ones."""
    first = rng.randint(0, rng.choice((20, 100, 1000 - size)))
    return f"count: {first} to {first + size - 1}\n", " ".join(str(first + i) for i in range(size))


def make_json(rng: random.Random, size: int) -> tuple[str, str]:
    """`size` fields with distinct keys; whole numbers stay numbers, all else is a string."""
    record: dict[str, str | int] = {}
    for key in rng.sample(FIELDS, size):
        style = rng.random()
        if style < 0.4:
            record[key] = rng.randrange(10 ** rng.randint(1, 4))
        elif style < 0.7:
            record[key] = "".join(rng.choices(LETTERS, k=rng.randint(1, 8)))
        else:
            record[key] = rng.choice(NAMES if rng.random() < 0.5 else CITIES)
    fields = ", ".join(f"{key}: {value}" for key, value in record.items())
    return f"json: {fields}\n", json.dumps(record)


def make_lookup(rng: random.Random, size: int) -> tuple[str, str]:
    prompt, answers = lookup_run(rng, size, 1)
    return prompt, answers[0][1]


def lookup_run(
    rng: random.Random, size: int, queries: int, *, in_order: bool = False
) -> tuple[str, list[tuple[str, str]]]:
    """A table of `size` pairs and the first of `queries` keys asked for.

    Returns (prompt up to the first key, [(key with its space, value), ...]). Asking for more keys in one go is how
    training gets many lessons out of one table. Keys are drawn with replacement: were each asked once, the values not
    yet said would give the answer away. Asked `in_order` of the table from a random place on, they are easier.
    """
    keys = rng.sample(KEY_WORDS, size)
    table = {f" {key}": f"={rng.randrange(100):02d}" for key in keys}
    if in_order:
        first = rng.randrange(size)
        order = [*table][first:] + [*table][:first]
        asked = [(key, table[key]) for key in itertools.islice(itertools.cycle(order), queries)]
    else:
        asked = [(key, table[key]) for key in rng.choices(list(table), k=queries)]
    return f"lookup:{''.join(key + value for key, value in table.items())}\n?{asked[0][0]}", asked


GENERATORS: dict[str, Callable[[random.Random, int], tuple[str, str]]] = {
    "copy": make_copy,
    "reverse": make_reverse,
    "sort": make_sort,
    "add": make_add,
    "count": make_count,
    "json": make_json,
    "lookup": make_lookup,
}
KINDS: tuple[str, ...] = tuple(GENERATORS)

MAX_SIZE: dict[str, int] = {"copy": 160, "reverse": 24, "sort": 16, "add": 3, "count": 25, "json": 6, "lookup": 120}
"""Largest size trained: bytes copied, letters reversed or sorted, digits added, numbers counted, fields, pairs."""


def generate(kind: str, rng: random.Random, size: int) -> tuple[str, str]:
    """One (prompt, answer) of `kind` with difficulty `size` (1 to MAX_SIZE[kind]; see there for its unit)."""
    if kind not in GENERATORS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if not 1 <= size <= MAX_SIZE[kind]:
        raise ValueError(f"size is {size}; for {kind} it must be 1 to {MAX_SIZE[kind]}")
    return GENERATORS[kind](rng, size)


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the evaluation split, by its first line (for lookup: by its table)."""
    first_line = prompt.partition("\n")[0]
    digest = hashlib.blake2b(first_line.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_SHARE == 0


def generate_split(kind: str, rng: random.Random, size: int, held_out: bool) -> tuple[str, str]:
    """`generate`, drawn again until the prompt is in the wanted split; the smallest sizes may take a larger one."""
    for attempt in range(10_000):
        prompt, answer = generate(kind, rng, min(size + attempt // 200, MAX_SIZE[kind]))
        if is_held_out(prompt) == held_out:
            return prompt, answer
    raise RuntimeError(f"no {kind} prompt of size {size} found with held_out={held_out}")
