"""Counts the memory traffic of attention kernels, which depends on the rows' lengths: no program contains them."""

from __future__ import annotations

import dataclasses
from collections import Counter

from jaxserve.pallas_kernels.paged_attention.triton.tuning import DecodeConfig
from jaxserve.planning.reports.traffic import KernelTraffic, Traffic
from jaxserve.programs.aot.hlo import ArrayShape, Instruction, item_bits

_PARTIAL_BYTES = 4
_PAGE_NUMBER_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Describes the step whose traffic is counted.

    Attributes:
        rows: sequences that compute one token each, with `context` positions, that token's included.
        prompt: tokens of one prompt, computed from its start; 0 for none.
    """

    rows: int = 0
    context: int = 0
    prompt: int = 0

    @classmethod
    def of(cls, kind: str, size: int, context: int) -> Scenario:
        """Returns a program's typical use: a full bucket of decodes at `context`, or of one prompt."""
        match kind:
            case "decode":
                return cls(rows=size, context=context)
            case "forward":
                return cls(prompt=size)
            case _:
                return cls()


def kernel_traffic(scenario: Scenario, config: DecodeConfig) -> KernelTraffic:
    """Returns the traffic of the attention kernels in that step for `traffic.program_traffic`; None for other
    kernels.
    """

    def traffic(one: Instruction, operands: list[ArrayShape]) -> Traffic | None:
        match one.kernel:
            case "paged_attention_decode":
                return _decode(one, operands, scenario, config)
            case "paged_attention_combine":
                return _combine(one, scenario, config)
            case "paged_attention_prefill":
                return _prefill(one, operands, scenario)
            case _:
                return None

    return traffic


def chunks_of(context: int, config: DecodeConfig) -> int:
    """Returns the number of chunks that a row of `context` positions is cut into: see `chunk_lengths` of the kernels'
    plan.
    """
    length = config.chunk
    while context > length * config.splits:
        length *= 2
    return -(-context // length)


def _decode(one: Instruction, operands: list[ArrayShape], scenario: Scenario, config: DecodeConfig) -> Traffic:
    pool, query = _pool_and_query(operands)
    _, _, kv_heads, page_size, head_dim = pool.dims
    group_heads = query.dims[2]
    items = scenario.rows * chunks_of(scenario.context, config)
    row_bytes = query.bytes // query.dims[0]
    pages = scenario.rows * -(-scenario.context // page_size)
    read = scenario.rows * (scenario.context * _position_bytes(pool) + row_bytes) + pages * _PAGE_NUMBER_BYTES
    flops = 4 * scenario.rows * scenario.context * kv_heads * group_heads * head_dim
    return Traffic(read, items * _partials_of_item(kv_heads * group_heads, head_dim), Counter({query.dtype: flops}))


def _combine(one: Instruction, scenario: Scenario, config: DecodeConfig) -> Traffic:
    out = one.shapes[0]
    _, kv_heads, group_heads, head_dim = out.dims
    items = scenario.rows * chunks_of(scenario.context, config)
    return Traffic(
        items * _partials_of_item(kv_heads * group_heads, head_dim),
        min(out.bytes, scenario.rows * out.bytes // out.dims[0]),
    )


def _prefill(one: Instruction, operands: list[ArrayShape], scenario: Scenario) -> Traffic:
    pool, query = _pool_and_query(operands)
    _, kv_heads, group_heads, head_dim = query.dims
    read = query.bytes + scenario.prompt * _position_bytes(pool)
    flops = 2 * scenario.prompt * (scenario.prompt + 1) * kv_heads * group_heads * head_dim
    return Traffic(read, one.shapes[0].bytes, Counter({query.dtype: flops}))


def _pool_and_query(operands: list[ArrayShape]) -> tuple[ArrayShape, ArrayShape]:
    pool = next(shape for shape in operands if len(shape.dims) == 5)
    query = next(shape for shape in operands if len(shape.dims) == 4)
    return pool, query


def _position_bytes(pool: ArrayShape) -> int:
    """Returns the bytes of one position's keys and values in a layer."""
    _, _, kv_heads, _, head_dim = pool.dims
    return 2 * kv_heads * head_dim * item_bits(pool.dtype) // 8


def _partials_of_item(heads: int, head_dim: int) -> int:
    """Returns the bytes of a chunk's partial softmaxes: exponent, sum and weighted values of each query head."""
    return heads * (head_dim + 2) * _PARTIAL_BYTES
