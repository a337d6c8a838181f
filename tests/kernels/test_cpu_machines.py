"""Attention in float32 with the instructions of other CPUs, where this one can run them."""

from __future__ import annotations

import platform

import numpy as np
import pytest

from jaxserve.pallas_kernels.cpu import native_calls
from jaxserve.pallas_kernels.paged_attention.cpu import attention_calls, elements
from jaxserve.pallas_kernels.paged_attention.cpu.elements import Machine
from tests.kernels import packing
from tests.kernels.packing import Memory, Work, bits, for_cpu_float32

SHAPE = for_cpu_float32(2, 3, 64, sliding_window=100, soft_cap=9.0, sinks=True)
LENGTHS = [5, 140, 33]
ITEMS = [Work(0, 0, 5), Work(1, 139, 140), Work(2, 20, 33)]
CPUS = {"haswell": Machine(True, 1), "x86-64": Machine(False, 1)}


class _NoFeatures:
    """Features beyond those that a CPU's name implies."""

    def flatten(self) -> str:
        return ""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are those of x86-64")
@pytest.mark.parametrize("name", CPUS)
def test_other_cpus_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit where products and sums are rounded once, as here; else to the rounding of float32."""
    if CPUS[name].fused and "avx2" not in native_calls.features():
        pytest.skip("this CPU has no AVX2")
    here = Memory(SHAPE, LENGTHS, 3).attend(ITEMS)
    same = CPUS[name].fused == elements.machine().fused
    packing._attend.cache_clear()
    monkeypatch.setattr(native_calls.binding, "get_host_cpu_name", lambda: name)
    monkeypatch.setattr(native_calls.binding, "get_host_cpu_features", _NoFeatures)
    monkeypatch.setattr(elements, "machine", lambda: CPUS[name])
    monkeypatch.setattr(attention_calls, "_VERSION", f"test_{name}")
    there = Memory(SHAPE, LENGTHS, 3).attend(ITEMS)
    packing._attend.cache_clear()
    for one, other in zip(here, there, strict=True):
        if same:
            np.testing.assert_array_equal(bits(one), bits(other))
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5)
