"""Functions compiled from Python's own syntax against Python."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llvmlite import ir

from jaxserve.pallas_kernels.cpu import native_calls
from jaxserve.pallas_kernels.cpu.emitter import WORD
from jaxserve.pallas_kernels.cpu.native_functions import Native, Parameter, Program, native

SHARE = Parameter("share")


@native
def divide(one, other):
    return one // other * 1000 + one % other


@native
def divide_by_constants(one, other):
    return one // 8 + one % 8 * 100 + one // 7 - one % 7 + -other // 1


@native
def swap(one, other):
    one, other = other, one
    if one > other:
        return one - other
    return one | other & 3


@native
def helper(one, factor):
    return one * factor - 1


@native
def guarded(one, other):
    """The second of two conditions divides by what the first has looked at."""
    if one != 0 and other // one > 2:
        return 1
    return one == 0 or other % one == 0


@native
def count_shares(one, other):
    return one * SHARE + other


@functools.cache
def compiled(function: Native) -> Callable[[int, int], int]:
    """Calls the compiled function."""
    module = ir.Module("test")
    made, emit = native_calls.function(module, "called", WORD, [WORD, WORD], public=True)
    program = Program(module, _Parameters())
    emit.builder.ret(emit.builder.call(program.function(function, WORD, WORD), made.args))
    engine = native_calls._compiled(str(module), False)
    call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(engine.get_function_address("called"))
    _KEPT.append(engine)
    return call


_KEPT: list[Any] = []


class _Parameters:
    share = 5


SMALL = st.integers(-200, 200)


@pytest.mark.parametrize("function", [divide_by_constants, swap, guarded], ids=lambda one: one.__name__)
@given(one=SMALL, other=SMALL)
def test_it_computes_what_python_does(function: Native, one: int, other: int) -> None:
    assert compiled(function)(one, other) == function(one, other)


@given(one=SMALL, other=SMALL.filter(bool))
def test_division_rounds_down(one: int, other: int) -> None:
    assert compiled(divide)(one, other) == divide(one, other)


@native
def loops(one, other):
    total, index = 0, one
    while index < other:
        index += 1
        if index % 3 == 0:
            continue
        for step in range(0, index, 4):
            if step > 20 or total > 500:
                break
            total += helper(step, 2) if step % 2 else step
        total += 1
    return total


@given(one=SMALL, other=SMALL)
def test_loops_are_left_and_continued_where_python_does(one: int, other: int) -> None:
    assert compiled(loops)(one, other) == loops(one, other)


def test_a_parameter_is_what_the_program_is_compiled_with() -> None:
    assert compiled(count_shares)(3, 4) == 19


@native
def powers(one, other):
    return one**other


@native
def unknown(one, other):
    return nowhere(one, other)  # noqa: F821  # pyright: ignore[reportUndefinedVariable]


@pytest.mark.parametrize(("function", "text"), [(powers, "one ** other"), (unknown, "nowhere")])
def test_what_cannot_be_compiled_is_named(function: Native, text: str) -> None:
    with pytest.raises(SyntaxError, match=rf"{function.__name__}, line 3: cannot compile '{text.replace('*', '.')}"):
        compiled(function)
