"""A token's output has the same bits alone, batched, chunked anywhere, and in any bucket."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.budgets import budget
from tests.kernels.packing import Memory, Shape, Work, bits, for_cpu, for_cpu_float32

LENGTHS = [150, 3, 129, 64, 301, 17, 128]
BUCKETS = [(512, 8), (64, 17), (1, 1), (10, 5), (32, 40)]
FEWER_BUCKETS = BUCKETS[:3]  # each is a program to compile
SHAPES = [
    Shape(2, 2, 40, rows=8, max_len=301),
    Shape(4, 3, 64, dtype="bfloat16", max_len=301),
    Shape(2, 2, 32, sliding_window=50, soft_cap=10.0, max_len=301),
    Shape(2, 3, 64, dtype="bfloat16", pool_dtype="float8_e4m3fn", sinks=True, max_len=301),
    for_cpu(4, 3, 64, max_len=301),
    for_cpu(2, 8, 32, page_size=64, sliding_window=49, sinks=True, max_len=301),
    for_cpu_float32(2, 2, 32, max_len=301),
    for_cpu_float32(
        2, 7, 64, page_size=64, sliding_window=49, sinks=True, soft_cap=20.0, dtype="bfloat16", max_len=301
    ),
]


def _whole(memory: Memory) -> list[np.ndarray]:
    """Each sequence computed alone and in one piece."""
    return [memory.attend([Work(i, 0, n)], tokens=512, rows=8)[0] for i, n in enumerate(LENGTHS)]


def _assert_same(memory: Memory, whole: list[np.ndarray], items: list[Work], tokens: int, rows: int) -> None:
    for item, out in zip(items, memory.attend(items, tokens=tokens, rows=rows), strict=False):
        wanted = whole[item.sequence][item.start : item.stop]
        np.testing.assert_array_equal(bits(out), bits(wanted), err_msg=f"{item} in {items}, bucket {tokens, rows}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_packing_in_any_bucket(shape: Shape):
    memory = Memory(shape, LENGTHS, 5)
    whole = _whole(memory)
    buckets = BUCKETS if shape == SHAPES[0] else FEWER_BUCKETS

    @budget(10 * len(buckets))
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        tokens, rows = data.draw(st.sampled_from(buckets))
        items, left = [], tokens
        for sequence in data.draw(st.permutations(range(len(LENGTHS))))[:rows]:
            start = data.draw(st.integers(0, LENGTHS[sequence] - 1))
            count = data.draw(st.one_of(st.just(1), st.integers(1, LENGTHS[sequence])))
            stop = min(start + count, start + left, LENGTHS[sequence])
            if stop > start:
                items.append(Work(sequence, start, stop))
                left -= stop - start
        _assert_same(memory, whole, items, tokens, rows)

    check()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_split_of_a_prompt(shape: Shape):
    memory = Memory(shape, LENGTHS, 6)
    whole = _whole(memory)
    for split in range(1, LENGTHS[0], 3):
        _assert_same(memory, whole, [Work(0, 0, split), Work(2, split % 100, 129)], 512, 8)
        _assert_same(memory, whole, [Work(4, split, split + 1), Work(0, split, LENGTHS[0])], 512, 8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding_repeats_prefill(shape: Shape):
    memory = Memory(shape, LENGTHS, 8)
    whole = _whole(memory)
    for position in range(0, max(LENGTHS), 7):
        items = [Work(i, min(position, n - 1), min(position, n - 1) + 1) for i, n in enumerate(LENGTHS)]
        _assert_same(memory, whole, items, 64, 17)
