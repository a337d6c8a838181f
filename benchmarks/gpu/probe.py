"""Asks jax what its default device is: `python -m benchmarks.gpu.probe FILE`. A process of its own, for it may hang."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp


def main(path: str) -> int:
    """Writes platform, kind and version; for a CPU the reason, and whether there seems to be a GPU all the same."""
    found = jax.devices()[0]
    answer = {"platform": found.platform, "kind": found.device_kind, "jax": jax.__version__}
    if found.platform == "gpu":
        # One launch: a driver or library that does not fit fails here and not in every part.
        assert int(jax.jit(lambda x: x + 1)(jnp.int32(41))) == 42
    elif shutil.which("nvidia-smi"):
        answer["reason"] = "there is an nvidia-smi, but jax finds no GPU: is its CUDA plugin installed?"
        answer["gpu_expected"] = True
    else:
        answer["reason"] = "jax finds no GPU"
    pathlib.Path(path).write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
