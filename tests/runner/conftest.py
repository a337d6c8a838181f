"""What tests of a runner's start share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.sharding import Mesh

from jaxserve.programs import build_set
from jaxserve.programs.compiler import compile_program
from jaxserve.programs.step_programs import ProgramKey, Shapes


class _Runtime:
    """What the runtime holds of a program, serialized once: a second time it may have lost its functions."""

    def __init__(self, runtime: Any):
        self._runtime = runtime
        self.serialize = functools.cache(runtime.serialize)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)


class _Program:
    """A compiled program that several starts may keep."""

    def __init__(self, compiled: jax.stages.Compiled):
        self._compiled = compiled
        self._runtime = _Runtime(compiled.runtime_executable())

    def __call__(self, *arguments: Any) -> Any:
        return self._compiled(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def runtime_executable(self) -> _Runtime:
        return self._runtime


@functools.cache
def _compiled(key: ProgramKey, shapes: Shapes, mesh: Mesh) -> _Program:
    return _Program(compile_program(key, shapes, mesh))


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[None]:
    """Each program is compiled once in this process: for tests of what stands around the compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_set, "compile_program", _compiled)
        yield
