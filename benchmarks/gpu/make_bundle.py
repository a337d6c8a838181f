"""Compiles a small model's programs for a target, without it: `python -m benchmarks.gpu.make_bundle DIR TARGET`.

Two layers of Llama-3.1-8B's width with a smaller vocabulary; the target `cpu` gets a tiny model. What
`python -m jaxserve.compile` does for a configuration, without gin, so that the suite can do it on any GPU machine.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys

from benchmarks.gpu import llama
from jaxserve.pallas_kernels.paged_attention import choose
from jaxserve.programs.aot.bundle import BundleWriter
from jaxserve.programs.compiler import compile_program, fresh_compilations
from jaxserve.programs.step_programs import Shapes, program_keys
from jaxserve.programs.target_devices import load_target, target_mesh, use_cpu_only
from jaxserve.scheduler.buckets import Buckets


def shapes_for(platform: str) -> Shapes:
    """The shapes of the bundle on a platform."""
    gpu = platform == "gpu"
    wide = dataclasses.replace(llama.LLAMA_8B, num_hidden_layers=2, vocab_size=32000)
    model = wide if gpu else llama.TINY
    sizes = (8, 64) if gpu else (8,)
    return Shapes(
        model=model,
        dtype=model.dtype,
        buckets=Buckets(sizes, sizes),
        num_slots=sizes[-1],
        max_model_len=8192 if gpu else 256,
        page_size=llama.PAGE_SIZE if gpu else 16,
        num_pages=1024 if gpu else 64,
        attention=choose(platform),
    )


def main(directory: str, name: str) -> int:
    """Writes the bundle."""
    use_cpu_only()
    target = load_target(name)
    mesh = target_mesh(target)
    shapes = shapes_for(target.platform)
    writer = BundleWriter(pathlib.Path(directory), shapes, mesh, target)
    with fresh_compilations():
        for key in program_keys(shapes):
            size = writer.add(key, compile_program(key, shapes, mesh))
            print(f"{key.kind} {key.size}: {size} bytes", flush=True)
    writer.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
