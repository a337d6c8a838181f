"""Rows that share pages in the Triton kernels: which work items they share, and that no bit tells."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.pallas_kernels.paged_attention.pool import storage_dtype
from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec
from jaxserve.pallas_kernels.paged_attention.triton import kernel_plan as plan
from jaxserve.pallas_kernels.paged_attention.triton.attention import paged_attention
from jaxserve.pallas_kernels.paged_attention.triton.tuning import DecodeConfig, PrefillConfig
from tests.budgets import budget
from tests.kernels.packing import bits
from tests.kernels.shared_prefixes import Branch, SharedStep, Sizes, branches
from tests.kernels.triton_steps import ROUNDING

PREFILL = PrefillConfig(tile=32, block=16, num_warps=4, num_stages=2)


def _config(together: int, **changes: int) -> DecodeConfig:
    config = DecodeConfig(block=16, chunk=32, splits=4, programs=5, num_warps=4, num_stages=2, together=together)
    return dataclasses.replace(config, **changes)


@dataclasses.dataclass(frozen=True)
class Case:
    """A step's sizes, how its kernels are tuned, the soft cap, and whether some rows may have more tokens than one."""

    sizes: Sizes
    decode: DecodeConfig
    soft_cap: float | None = None
    mixed: bool = False


SMALL: dict[str, Any] = {"tokens": 12, "rows": 6, "max_len": 256}
CASES = [
    Case(Sizes(2, 4, 64, 16, **SMALL), _config(4), mixed=True),
    Case(Sizes(2, 3, 64, 32, sinks=True, **SMALL), _config(5, splits=8), 20.0),
    Case(Sizes(1, 4, 96, 64, pool_dtype="int8", sliding_window=100, **SMALL), _config(4)),
    Case(Sizes(1, 7, 64, 16, pool_dtype="float8_e4m3fn", sliding_window=70, sinks=True, **SMALL), _config(2), 5.0),
    Case(Sizes(1, 1, 64, 128, dtype="float32", pool_dtype="float32", **SMALL), _config(16, chunk=64)),
    # Tiles of 32 and of 64 rows.
    Case(Sizes(1, 8, 64, 16, dtype="float16", pool_dtype="float16", **SMALL), _config(4)),
    Case(Sizes(1, 16, 64, 16, sliding_window=33, **SMALL), _config(4, block=32)),
]


@functools.cache
def _attend(case: Case, cascade: str) -> Any:
    spec = AttentionSpec(case.sizes.head_dim**-0.5, case.sizes.sliding_window, case.soft_cap)
    attend = functools.partial(
        paged_attention,
        spec=spec,
        decode_only=not case.mixed,
        cascade=cascade,
        interpret=True,
        decode_config=case.decode,
        prefill_config=PREFILL,
    )
    # Interpreted kernels take a second to compile and are run a few times: the compiler's optimizations do not pay.
    return jax.jit(attend, compiler_options={"xla_backend_optimization_level": 0})


def _run(case: Case, step: SharedStep, *, cascade: str, share: bool = True) -> np.ndarray:
    pool, table = (step.pool, step.table) if share else (step.own_pool, step.own_table)
    stored = pool.view(storage_dtype(case.sizes.pool_dtype, "cpu"))
    k_scale, v_scale = (None, None) if step.scales is None else step.scales
    attend = _attend(case, cascade)
    arguments = step.query, stored, table, step.lengths, step.starts
    return np.asarray(attend(*arguments, k_scale=k_scale, v_scale=v_scale, sinks=step.sinks))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reading_shared_pages_together_changes_no_bit(case: Case):
    """Against each row alone, on the same pages and on pages of its own, in which what it does not see is NaN; and the
    values are those of sums in float64."""

    @budget(4)
    @given(rows=branches(case.sizes, decodes=not case.mixed), seed=st.integers(0, 2**31))
    def check(rows: list[Branch], seed: int) -> None:
        step = SharedStep(case.sizes, rows, seed)
        out = _run(case, step, cascade="auto")
        together = bits(out)
        np.testing.assert_array_equal(together, bits(_run(case, step, cascade="off")))
        np.testing.assert_array_equal(together, bits(_run(case, step, cascade="auto", share=False)))
        greatest = max(_greatest(step, number) for number in range(len(rows)))
        for number in range(len(rows)):
            found = out[step.starts[number] : step.starts[number + 1]].astype(np.float64)
            wanted = step.expected(number, case.sizes.head_dim**-0.5, case.soft_cap)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING[case.sizes.dtype] * greatest)
        assert not out[step.starts[-1] :].any(), "padding tokens must come out as zeros"

    check()


def test_the_last_row_of_a_full_bucket_has_its_results():
    case = CASES[1]
    step = SharedStep(case.sizes, [Branch(230), *[Branch(150 + n, 1, 0, 4) for n in range(5)]], 2)
    assert len(step.rows) == case.sizes.rows
    np.testing.assert_array_equal(bits(_run(case, step, cascade="auto")), bits(_run(case, step, cascade="off")))


def _greatest(step: SharedStep, number: int) -> float:
    values = np.abs(step.stored[number][:, 1].astype(np.float32))
    return float((values if step.scales is None else values * step.scales[1][None, :, None]).max(initial=0))


PLANNED = Sizes(1, 1, 8, 16, tokens=16, rows=7, max_len=512)


@functools.cache
def _plan(window: int | None, together: int) -> Any:
    def arrays(table: jax.Array, lengths: jax.Array, starts: jax.Array) -> Any:
        made = plan.plan_decode(lengths, starts, table, PLANNED.page_size, window, _config(together))
        return made.items, made.ends, made.chunks, made.members

    return jax.jit(arrays)


@pytest.mark.parametrize(("window", "together"), [(None, 2), (None, 5), (100, 3)])
def test_items_give_every_chunk_of_every_row_its_slot_once(window: int | None, together: int):
    """As the plan of single rows does, and all rows of an item read the same pages and see the same positions."""
    sizes = dataclasses.replace(PLANNED, sliding_window=window)
    splits = plan.max_splits(sizes.max_len, window, _config(together))

    @budget(40)
    @given(rows=branches(sizes), seed=st.integers(0, 2**31))
    def check(rows: list[Branch], seed: int) -> None:
        step = SharedStep(sizes, rows, seed)
        arguments = step.table, step.lengths, step.starts
        alone, ends, chunks = (np.asarray(one) for one in _plan(window, 1)(*arguments)[:3])
        items, shared_ends, shared_chunks, members = (np.asarray(one) for one in _plan(window, together)(*arguments))
        np.testing.assert_array_equal(shared_chunks, chunks)
        single = {one[plan.ITEM_SLOT]: one for one in alone[: ends[-1]]}
        seen = []
        for item, (tokens, slots) in zip(items[: shared_ends[-1]], members, strict=False):
            used = slots >= 0
            assert (tokens[used] == [single[slot][plan.ITEM_TOKEN] for slot in slots[used]]).all()
            for slot in slots[used]:
                own, columns = single[slot], [plan.ITEM_BEGIN, plan.ITEM_END]
                assert (own[columns] == item[columns]).all()
                first, last = max(own[plan.ITEM_OLDEST], own[plan.ITEM_BEGIN]), own[plan.ITEM_END]
                assert first == max(item[plan.ITEM_OLDEST], item[plan.ITEM_BEGIN])
                pages = slice(first // sizes.page_size, -(-last // sizes.page_size))
                assert (step.table[slot // splits, pages] == step.table[item[plan.ITEM_ROW], pages]).all()
            seen += slots[used].tolist()
        assert sorted(seen) == sorted(single)

    check()


def test_rows_of_one_prompt_share_their_items():
    """Five rows share 20 pages, two of them 24; two others 10."""
    rows = [Branch(400), Branch(500, 1, 0, 20), Branch(440, 1, 0, 24), Branch(180)]
    rows += [Branch(390, 1, 0, 20), Branch(350, 1, 0, 20), Branch(200, 1, 3, 10)]
    step = SharedStep(PLANNED, rows, 0)
    items, ends, _, members = (np.asarray(one) for one in _plan(None, 3)(step.table, step.lengths, step.starts))
    sizes = {}
    for item, (_, slots) in zip(items[: ends[-1]], members, strict=False):
        used = slots[slots >= 0] // plan.max_splits(PLANNED.max_len, None, _config(3))
        sizes.setdefault(tuple(used.tolist()), []).append((item[plan.ITEM_BEGIN], item[plan.ITEM_END]))
    # Chunks of 128 positions: two of 320 shared ones are whole, and three of 384; 160 are one and a rest.
    assert sizes[0, 1, 2] == [(0, 128), (128, 256)]
    assert sizes[4, 5] == [(0, 128), (128, 256)]
    assert sizes[0, 2] == [(256, 384)]
    assert len(sizes[1,]) == 2


def test_a_plan_with_shared_items_holds_no_loop_and_no_sort():
    step = SharedStep(PLANNED, [Branch(9)], 0)
    text = _plan(100, 4).lower(step.table, step.lengths, step.starts).compile().as_text()
    assert " while(" not in text
    assert " sort(" not in text
    assert " custom-call(" not in text
