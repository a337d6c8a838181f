"""The matrix products of a decode step of Llama-3.1-8B, in bfloat16 and in fp8: where a step's time would go without
anything else.

Compiled as the engine compiles them. An fp8 product is timed alone, and with what quantized weights need around it: a
scale of each row and one of each column on the sum in float32, rounded once.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import device
from benchmarks.gpu import llama_shape as llama
from benchmarks.gpu.record import AbsentError, Record, Settings
from jaxserve.models.config import ModelConfig

MOST_CALLS = 8
WAYS = ("float8_e4m3fn", "bfloat16", "float8_e4m3fn scaled")


def run(settings: Settings, record: Record) -> None:
    """One case a number of rows and way, every matrix of the model in it."""
    device.prepare(settings, record)
    ceiling, rate = device.copy_bandwidth(settings), device.matmul_rate(settings)
    record.summary |= {"copy_bytes_per_s": ceiling, "bf16_flop_per_s": rate}
    model = llama.LLAMA_8B if settings.gpu else llama.TINY
    for rows in (64, 256, 16, 512, 2048, 8) if settings.gpu else (8,):
        for way in WAYS:
            record.case(f"{rows} rows, {way}", lambda rows=rows, way=way: measure(model, rows, way), rows=rows, way=way)


def matrices(model: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """(inputs, outputs, how often a step has it) of each matrix."""
    layers, width = model.num_hidden_layers, model.hidden_size
    queries = model.num_attention_heads * model.head_dim
    return {
        "qkv": (width, queries + 2 * model.num_key_value_heads * model.head_dim, layers),
        "o": (queries, width, layers),
        "gate_up": (width, 2 * model.intermediate_size, layers),
        "down": (model.intermediate_size, width, layers),
        "lm_head": (width, model.vocab_size, 1),
    }


def measure(model: ModelConfig, rows: int, way: str) -> dict[str, Any]:
    """Microseconds, operations and bytes a second of each matrix, and the milliseconds of a step's products."""
    kind, scaled = jnp.dtype(way.split()[0]), way.endswith("scaled")
    found, step, flops = {}, 0.0, 0
    for name, (inputs, outputs, count) in matrices(model).items():
        try:
            seconds = one_product(rows, inputs, outputs, kind, scaled)
        except jax.errors.JaxRuntimeError as error:
            if kind.itemsize > 1:
                raise
            raise AbsentError(f"{way} products do not run here: {str(error)[:200]}") from error
        moved = kind.itemsize * (rows * inputs + inputs * outputs) + 2 * rows * outputs
        found[name] = {
            "microseconds": seconds * 1e6,
            "tflop_per_s": 2 * rows * inputs * outputs / seconds / 1e12,
            "gb_per_s": moved / seconds / 1e9,
        }
        step += count * seconds
        flops += count * 2 * rows * inputs * outputs
    return {"products": found, "step_ms": step * 1e3, "tflop_per_s": flops / step / 1e12}


def one_product(rows: int, inputs: int, outputs: int, kind: Any, scaled: bool) -> float:
    """Seconds of [rows, inputs] times a matrix [outputs, inputs]; each call has a matrix of its own."""
    calls = max(1, min(MOST_CALLS, math.ceil(4 * device.CACHE_BYTES / (inputs * outputs * kind.itemsize))))
    x = device.random_array(jax.random.key(1), (rows, inputs), kind)
    weights = [device.random_array(jax.random.key(2 + call), (outputs, inputs), kind) for call in range(calls)]
    scales = jnp.full((rows, 1), 0.5, jnp.float32), jnp.full((1, outputs), 0.25, jnp.float32)
    contracted = (((1,), (1,)), ((), ()))

    def all_calls(x: jax.Array, weights: list[jax.Array], scales: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
        if not scaled:
            return [jax.lax.dot_general(x, w, contracted, preferred_element_type=jnp.bfloat16) for w in weights]
        sums = [jax.lax.dot_general(x, w, contracted, preferred_element_type=jnp.float32) for w in weights]
        return [(each * scales[0] * scales[1]).astype(jnp.bfloat16) for each in sums]

    program = device.compile_program(all_calls, x, weights, scales)
    most = device.most_launches(calls * rows * outputs * 2)
    return device.time_function(program, [(x, weights, scales)], calls, rounds=5, most=most).seconds
