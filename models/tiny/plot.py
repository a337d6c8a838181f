"""Draws loss and exact match over training: `python -m jaxserve.models.tiny.plot --log LOG.jsonl --out FILE.png`."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

from jaxserve.models.tiny.tasks import KINDS


def read_log(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a run in order of steps; of a step recorded twice (a leg cut short), the later one."""
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def plot(records: list[dict[str, Any]], out: pathlib.Path) -> None:
    """Two panels over steps: training loss (log scale), and held-out exact match at the size trained at the time."""
    steps = [record["step"] for record in records]
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    upper.plot(steps, [record["loss"] for record in records], color="black", linewidth=1)
    upper.set_yscale("log")
    upper.set_ylabel("training loss (nats per answer token)")
    for kind in KINDS:
        lower.plot(steps, [record["accuracy"][kind] for record in records], label=kind, linewidth=1)
    lower.axhline(0.95, color="gray", linestyle=":", linewidth=1)
    lower.set_ylabel("held-out exact match\n(up to the size trained at the time)")
    lower.set_xlabel("step")
    lower.legend(loc="lower right", ncols=2)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draws loss and exact match over training")
    parser.add_argument("--log", required=True, help="log.jsonl of a training run")
    parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "training.png"))
    options = parser.parse_args(arguments)
    plot(read_log(pathlib.Path(options.log)), pathlib.Path(options.out))


if __name__ == "__main__":
    main()
