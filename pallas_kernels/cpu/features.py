"""What the processor can do."""

from __future__ import annotations

import functools
import pathlib


def has(feature: str) -> bool:
    """Whether the processor has an instruction set, by Linux's name of it ("avx512_bf16"); False elsewhere."""
    return feature in _features()


@functools.cache
def _features() -> frozenset[str]:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    return frozenset(next((values.split() for name, _, values in lines if name.strip() == "flags"), ()))
