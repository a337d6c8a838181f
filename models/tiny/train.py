"""Trains the default model: `python -m jaxserve.models.tiny.train --out DIR`.

Training is made of legs. A leg resumes from the last checkpoint in DIR, and may change row length, batch, learning
rate and task shares; SIGTERM ends it with a checkpoint. The learning rate warms up, stays, and falls linearly to zero
over the last `--decay-steps` steps of a leg. Difficulty follows skill: a task's largest size grows when held-out
examples up to that size are solved.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import queue
import random
import signal
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from jaxserve.models.tiny.data import Batch, Mixer, held_out_batches
from jaxserve.models.tiny.graft import freeze_mask, graft_look_back
from jaxserve.models.tiny.tasks import KINDS, MAX_SIZE
from jaxserve.models.tiny.training_step import initial_params, make_optimizer, predict_step, train_step

FIRST_CAPS = {"copy": 12, "reverse": 6, "sort": 6, "add": 3, "count": 6, "json": 2, "lookup": 8}
GROW_AT = 0.85
"""Held-out exact match from which a task's sizes grow by half."""


@dataclasses.dataclass
class Progress:
    """What a checkpoint holds besides arrays. caps: largest size by kind; tokens and seconds count all legs."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    caps: dict[str, int] = dataclasses.field(default_factory=lambda: dict(FIRST_CAPS))
    accuracy: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def learning_rate(step: int, peak: float, warmup: int, end: int, decay: int) -> float:
    """Linear warm-up over `warmup` steps, then `peak`, then linear to zero over the `decay` steps before `end`."""
    rate = peak * min(1.0, (step + 1) / warmup)
    return rate * max(0.0, min(1.0, (end - step) / decay)) if decay else rate


def task_shares(accuracy: dict[str, float], caps: dict[str, int], boost: dict[str, float]) -> dict[str, float]:
    """Share of the tokens of each kind: what is not yet solved gets more, what is solved keeps a fifth."""
    shares = {}
    for kind in KINDS:
        unsolved = 1 - accuracy[kind] + (0.2 if caps[kind] < MAX_SIZE[kind] else 0.0)
        shares[kind] = boost.get(kind, 1.0) * (0.2 + min(1.0, 3 * unsolved))
    return shares


def background(mixer: Mixer, rows: int) -> Generator[Batch, None, None]:
    """Batches of the mixer, two of them made ahead in a thread."""
    ready: queue.Queue[Batch] = queue.Queue(maxsize=2)
    closed = threading.Event()

    def fill() -> None:
        while not closed.is_set():
            ready.put(mixer.batch(rows))

    threading.Thread(target=fill, daemon=True).start()
    try:
        while True:
            yield ready.get()
    finally:
        closed.set()
        while not ready.empty():  # lets a waiting producer see that it is done
            ready.get()


def score(params: Any, graph: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """Exact match by kind: the share of examples whose every answer token and <eos> is the arg max."""
    right, total = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for batch in batches:
        predicted = np.asarray(predict_step(params, batch.tokens, batch.positions, batch.segments, graph=graph))
        wrong = (predicted != batch.targets) & (batch.weights > 0)
        for row, kinds in enumerate(batch.kinds):
            failed = set(batch.segments[row][wrong[row]].tolist())
            for segment, kind in enumerate(kinds, start=1):
                total[kind] += 1
                right[kind] += segment not in failed
    return {kind: right[kind] / max(total[kind], 1) for kind in KINDS}


def grow(progress: Progress, accuracy: dict[str, float]) -> None:
    """Raises the caps of tasks that are solved up to them."""
    progress.accuracy = accuracy
    for kind in KINDS:
        if accuracy[kind] >= GROW_AT:
            progress.caps[kind] = min(MAX_SIZE[kind], math.ceil(progress.caps[kind] * 1.5))


def checkpoints(out: pathlib.Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    return ocp.CheckpointManager((out / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, progress: Progress, params: Any, state: Any) -> None:
    if manager.latest_step() == progress.step:
        return
    arrays = {"params": jax.tree.leaves(params), "state": jax.tree.leaves(state)}
    manager.save(
        progress.step,
        args=ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(dataclasses.asdict(progress))
        ),
    )


def restore(manager: ocp.CheckpointManager, params: Any, state: Any) -> tuple[Progress, Any, Any]:
    """The newest checkpoint in the structure of `params` and `state`, or those and a fresh Progress."""
    if manager.latest_step() is None:
        return Progress(), params, state
    target = {"params": jax.tree.leaves(params), "state": jax.tree.leaves(state)}
    found = manager.restore(
        manager.latest_step(),
        args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()),
    )
    params = jax.tree.unflatten(jax.tree.structure(params), found["arrays"]["params"])
    state = jax.tree.unflatten(jax.tree.structure(state), found["arrays"]["state"])
    return Progress(**found["progress"]), params, state


def train(options: argparse.Namespace) -> None:
    """One leg, from the newest checkpoint to `options.steps` steps in all (or SIGTERM)."""
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    graph, params = initial_params(options.seed)
    optimizer = make_optimizer(options.optimizer)
    manager = checkpoints(out)
    progress, params, state = restore(manager, params, optimizer.init(params))
    mask = freeze_mask(params, options.graft)
    boost = {kind: float(value) for kind, _, value in (text.partition("=") for text in options.boost)}
    stop = threading.Event()
    leg_started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    bar = tqdm(total=options.steps, initial=progress.step, unit="step", mininterval=10)
    while progress.step < options.steps and not stop.is_set():
        if options.graft is not None:  # again and again, because embeddings move
            params, fit = graft_look_back(graph, params, options.graft)
            tqdm.write(f"look-back fit {fit.min():.2f} to {fit.max():.2f}")
        shares = task_shares(progress.accuracy, progress.caps, boost)
        rng = random.Random(f"train-{options.seed}-{progress.step}")
        batches = background(Mixer(rng, shares, progress.caps, options.length), options.rows)
        started, losses, rate = time.monotonic(), [], 0.0
        for batch in batches:
            rate = learning_rate(progress.step, options.rate, options.warmup, options.steps, options.decay_steps)
            if options.minutes:
                left = 1 - (time.monotonic() - leg_started) / (60 * options.minutes)
                rate *= max(left, 0.0)
                if left <= 0:
                    stop.set()
            params, state, loss = train_step(
                params, state, batch.arrays(), np.float32(rate), mask, graph=graph, optimizer=optimizer
            )
            losses.append(loss)
            progress.step += 1
            progress.tokens += int((batch.segments > 0).sum())
            bar.update()
            if progress.step % options.every == 0 or progress.step >= options.steps or stop.is_set():
                break
        batches.close()
        mean_loss = float(np.mean(jax.device_get(losses)))
        progress.seconds += time.monotonic() - started
        held_out = held_out_batches(0, progress.caps, options.held_out, options.rows, options.length)
        accuracy = score(params, graph, held_out)
        record = {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            "rate": rate,
            "loss": round(mean_loss, 5),
            "accuracy": {kind: round(value, 4) for kind, value in accuracy.items()},
            "caps": dict(progress.caps),
        }
        progress.history.append(record)
        grow(progress, accuracy)
        with (out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        scores = " ".join(f"{kind} {value:.2f}@{record['caps'][kind]}" for kind, value in accuracy.items())
        tqdm.write(f"step {progress.step} loss {mean_loss:.4f} rate {rate:.5f} {scores}")
        save(manager, progress, params, state)
    manager.wait_until_finished()
    manager.close()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains the default model")
    parser.add_argument("--out", required=True, help="folder of checkpoints and log")
    parser.add_argument("--steps", type=int, default=20_000, help="steps in all, over every leg")
    parser.add_argument("--decay-steps", type=int, default=0, help="last steps, over which the rate falls to zero")
    parser.add_argument("--minutes", type=float, default=0, help="end then, the rate falling linearly all the way")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=16, help="rows in a batch")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps of warm-up")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--every", type=int, default=250, help="steps between evaluations, each with a checkpoint")
    parser.add_argument("--held-out", type=int, default=64, help="examples of each kind in an evaluation")
    parser.add_argument("--boost", nargs="*", default=[], metavar="KIND=FACTOR", help="multiplies a kind's share")
    parser.add_argument("--graft", type=int, metavar="HEAD", help="make this key-value head of layer 0 look back")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(parse())
