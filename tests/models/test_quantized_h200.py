"""Products by quantized weights compiled for an H200: which product they get, and what is converted beside it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.models.layers.parameter import Parameter
from jaxserve.models.layers.quantized import Quantized, abstract, multiply
from jaxserve.models.quantization import Scheme
from jaxserve.programs.compiler import compiler_options, fresh_compilations
from jaxserve.programs.target_devices import load_target, target_mesh

N, K, ROWS = 4096, 2048, 64


@pytest.mark.parametrize(
    ("scheme", "product", "converted"),
    [
        (Scheme("fp8", activations="fp8"), "__cublas$lt$matmul$f8", 0),
        (Scheme("fp8"), "__cublas$lt$matmul", 2),
        (Scheme("int8", activations="int8"), "__cublas$lt$matmul", 2),
        (Scheme("int4", 128, zeros=True), "__cublas$lt$matmul", 2),
    ],
    ids=lambda value: value.text if isinstance(value, Scheme) else "",
)
def test_fp8_with_fp8_activations_alone_is_a_product_of_fp8(scheme: Scheme, product: str, converted: int) -> None:
    """As docs/quantization.md says; `converted` bytes a weight stand in temporaries."""
    mesh = target_mesh(load_target("h200"))
    partition = PartitionSpec(None, None)

    def sharding(part: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, part)

    weight: Quantized = abstract(Parameter((N, K), partition, (), scheme=scheme), partition, sharding)
    x = jax.ShapeDtypeStruct((ROWS, K), jnp.bfloat16, sharding=sharding(partition))
    with fresh_compilations(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(lambda x, weight: multiply(x, weight, jnp.bfloat16)).lower(x, weight)
        compiled = program.compile(compiler_options("gpu"))
    assert f'custom_call_target="{product}"' in (compiled.as_text() or "")
    memory = compiled.memory_analysis()
    assert memory is not None
    workspace = 40 * 2**20
    least = converted * N * K
    assert least <= memory.temp_size_in_bytes < least + workspace
