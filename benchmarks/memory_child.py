"""What a process needs at most: run by `benchmarks.memory` in a process of its own; prints one line of JSON.

python -m benchmarks.memory_child load DIRECTORY DTYPE
python -m benchmarks.memory_child engine OPTIONS REQUESTS
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.work import FIRST_ORDINARY_ID
from jaxserve.config.settings import EngineConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.engine.messages import AddRequest, EngineFailed, EngineOutput
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import checkpoint
from jaxserve.models.params import make_mesh
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs.step_programs import products_of
from jaxserve.request import EngineRequest

_STATUS = pathlib.Path("/proc/self/status")
_FORGET_PEAK = "5"  # proc_pid_clear_refs(5): the peak becomes what is resident now


def resident() -> dict[str, int]:
    """Bytes of this process that are resident now, and at most so far (VmRSS and VmHWM)."""
    text = _STATUS.read_text(encoding="utf-8")
    found = {name: re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE) for name in ("VmRSS", "VmHWM")}
    return {name: int(match[1]) * 1024 for name, match in found.items() if match is not None}


def forget_peak() -> None:
    """Makes what is resident now the peak."""
    pathlib.Path("/proc/self/clear_refs").write_text(_FORGET_PEAK, encoding="utf-8")


def _with_libraries() -> int:
    """Bytes that are resident of interpreter and libraries, what the compiler's own code takes included."""
    device = make_mesh().devices.flat[0]
    square = jax.device_put(np.ones((64, 64), np.float32), device)
    jax.block_until_ready(jax.jit(lambda x: jnp.sort(x @ x, axis=-1))(square))
    before = resident()["VmRSS"]
    forget_peak()
    return before


def load(directory: str, dtype: str) -> dict[str, Any]:
    """Loads a checkpoint; before: what is resident of interpreter, libraries and the device's client."""
    config, mesh = ModelConfig.from_directory(directory), make_mesh()
    before = _with_libraries()
    params = checkpoint.load(directory, config, dtype, mesh)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"weights": weights, "before": before, "peak": resident()["VmHWM"]}


def engine(options: dict[str, Any], requests: int) -> dict[str, Any]:
    """Starts an engine and runs requests that fill every slot and most of the pool."""
    config, mesh = EngineConfig.from_options(**options), make_mesh()
    products_of(resolve_shapes(config, mesh.devices.flat[0].platform), mesh).prepare()  # kernels and their compiler
    before = _with_libraries()
    client = InlineEngine(config)
    started = resident()
    forget_peak()
    steps = _run(client, requests)
    return {
        "before": before,
        "start_peak": started["VmHWM"],
        "ready": started["VmRSS"],
        "load_peak": resident()["VmHWM"],
        "plan": dict(client.ready.info.memory),
        "pool_tokens": client.ready.limits.pool_tokens,
        "cached": client.ready.info.num_cached_executables,
        "steps": steps,
    }


def _run(client: InlineEngine, requests: int) -> int:
    """Runs requests to their ends, each with its share of the pool, greedy and sampled alike; returns the steps."""
    ready = client.ready
    share = min(ready.limits.pool_tokens // ready.max_num_seqs, ready.limits.max_model_len) - 1
    rng = np.random.default_rng(0)
    for number in range(requests):
        outputs = max(1, share // 8)
        prompt = rng.integers(FIRST_ORDINARY_ID, ready.limits.vocab_size, share - outputs)
        client.send(
            AddRequest(
                EngineRequest(
                    f"r{number}",
                    tuple(prompt.tolist()),
                    outputs,
                    temperature=float(number % 2),
                    top_k=40 * (number % 3),
                    top_p=0.9 if number % 4 else 1.0,
                )
            )
        )
    left = requests
    while left:
        for message in client.receive():
            if isinstance(message, EngineFailed):
                raise RuntimeError(message.error)
            if isinstance(message, EngineOutput):
                if message.error:
                    raise RuntimeError(message.error)
                left -= message.finish_reason is not None
    return client.core.stats().num_steps


def main(arguments: list[str]) -> int:
    what, first, second = arguments
    result = load(first, second) if what == "load" else engine(json.loads(first), int(second))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
