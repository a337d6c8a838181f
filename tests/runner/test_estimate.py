"""The bound of temporaries: worked examples, and against what the compiler for GPUs needs where it is installed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from jaxserve.config.settings import EngineConfig, SchedulerConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import make_mesh
from jaxserve.pallas_kernels.paged_attention.triton.backend import DEPRECATION
from jaxserve.planning.estimate import WORKSPACE_BYTES, temporary_bytes
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs.compiler import compile_program, program_memory
from jaxserve.programs.program_needs import largest_keys
from jaxserve.programs.step_programs import trace
from jaxserve.programs.target_devices import load_target, target_mesh

pytestmark = pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:DeprecationWarning")

N = 4096
ONE = 4 * N  # bytes of one float32 vector of N


def bound(function, *arguments, donate=()):
    """The estimate for a function of vectors, workspace aside, in vectors of N float32."""
    traced = jax.jit(function, donate_argnums=donate).trace(*arguments)
    return (temporary_bytes(traced) - WORKSPACE_BYTES) / ONE


@pytest.fixture
def x():
    return jax.ShapeDtypeStruct((N,), jnp.float32)


def test_a_result_lives_until_its_last_use(x):
    assert bound(lambda x: x, x) == 0
    assert bound(jnp.sin, x) == 1
    assert bound(lambda x: jnp.cos(jnp.sin(x)), x) == 2
    assert bound(lambda x: jnp.tan(jnp.cos(jnp.sin(x))), x) == 2, "the first result is gone when the third is made"

    def kept(x):
        first = jnp.sin(x)
        return jnp.tan(jnp.cos(first)) * first

    assert bound(kept, x) == 3


def test_calls_are_looked_into(x):
    inner = jax.jit(lambda x: jnp.cos(jnp.sin(x)))
    assert bound(lambda x: jnp.tan(inner(x)), x) == 2
    assert bound(lambda x: inner(x) + inner(jnp.exp(x)), x) == bound(
        lambda x: jnp.cos(jnp.sin(x)) + jnp.cos(jnp.sin(jnp.exp(x))), x
    )


def test_only_donated_arrays_are_updated_in_place(x):
    def update(x, start):
        return jax.lax.dynamic_update_slice(x, jnp.ones((2,)), (start,))

    start = jax.ShapeDtypeStruct((), jnp.int32)
    small = bound(update, x, start, donate=0)
    assert small < 0.1
    assert 1 <= bound(update, x, start) <= 1 + small
    assert bound(lambda x, start: update(update(x, start), start + 1), x, start, donate=0) < 0.1

    def copied(x, start):
        return update(x, start), jnp.sin(x)

    assert bound(copied, x, start, donate=0) >= 2, "the old content is needed after the update"


def test_loops_count_their_carry_once(x):
    def loop(x, steps):
        return jax.lax.fori_loop(0, steps, lambda _, x: jnp.cos(jnp.sin(x)), x)

    steps = jax.ShapeDtypeStruct((), jnp.int32)
    assert 2 <= bound(loop, x, steps) < 2.1, "the carry, and one value in the body"
    assert bound(lambda x: jax.lax.scan(lambda c, _: (jnp.cos(jnp.sin(c)), None), x, length=3)[0], x) >= 2


def test_the_greatest_branch_counts(x):
    def choose(x):
        return jax.lax.cond(x[0] > 0, lambda: jnp.tan(jnp.cos(jnp.sin(x))), lambda: x)

    assert 2 <= bound(choose, x) < 2.1


def test_kernels_need_their_results_alone(x):
    def kernel(x_ref, out_ref):
        out_ref[...] = jnp.sin(jnp.cos(x_ref[...]))

    def call(x, aliases):
        return pl.pallas_call(kernel, out_shape=x, input_output_aliases=aliases, interpret=True)(x)

    assert bound(lambda x: call(x, {}), x) == 1
    assert bound(lambda x: call(x, {0: 0}), x, donate=0) == 0


WIDE = ModelConfig("LlamaForCausalLM", 128256, 4096, 14336, 1, 32, 8, 128, 131072)


SMALL_BYTES = 1024 * 1024
"""What the estimate may have for a program that needs nothing: copies of what the host sends."""


def test_it_bounds_what_the_compiler_for_gpus_needs():
    mesh = target_mesh(load_target("h200"))
    limits = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=8192)
    config = EngineConfig(architecture=WIDE, load_format="dummy", dtype="bfloat16", scheduler=limits)
    shapes = resolve_shapes(config, "gpu")
    for key in largest_keys(shapes):
        needed = program_memory(compile_program(key, shapes, mesh)).extra
        estimated = temporary_bytes(trace(key, shapes, make_mesh(), "gpu"))
        assert needed <= estimated
        if key.kind != "pooling":  # passes over all hidden states, which are fused
            # The sampler compares with 15 thresholds at once, which the compiler fuses.
            assert estimated <= 4.5 * needed + WORKSPACE_BYTES + SMALL_BYTES
