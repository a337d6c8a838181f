"""The order in which the suite measures, and the time that each part is given: its plan, as data.

The most decisive comes first: what nothing else can tell, what large decisions hang on, and what is needed to judge the
rest. A part's cases are in such an order too, so a part that is cut short has measured what counts most.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the suite, run in a process of its own.

    name: of the module NAME_part under benchmarks/gpu.
    budget: seconds from its first case on, after which it begins no further one.
    case_seconds: what its longest case takes; no case begins for which less of the command's time is left.
    """

    name: str
    title: str
    budget: float
    case_seconds: float


PARTS = (
    Part("environment", "Machine and ceilings", 20, 4),
    Part("products", "Matrix products of a step", 50, 5),
    Part("step", "Decode step of Llama-3.1-8B", 80, 12),
    Part("host", "The host's part of an engine's step", 60, 20),
    Part("bundle", "Bundle compiled without a device", 45, 12),
    Part("decode", "Decode attention", 40, 4),
    Part("prefill", "Prefill attention", 35, 5),
    Part("cascade", "Decode attention of rows that share a prefix", 18, 6),
    Part("values", "Kernel values against float64", 60, 5),
    Part("write", "KV write", 15, 2),
    Part("peers_jax", "Peers in jax", 30, 6),
    Part("peers_torch", "Peers in torch", 12, 2),
)
"""In this order, each within its budget; what is left of the command's time then goes, in the same order, to parts
that had no time for all of their cases. Seconds are those of an H200."""

TUNING = (PARTS[0], Part("tune", "Tuning", 500, 5))
