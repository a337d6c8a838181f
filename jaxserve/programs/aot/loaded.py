"""Calls a program that the runtime has loaded with trees of arrays, as a compiled program is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import tree_util
from jax._src.interpreters import pxla
from jax.sharding import Mesh
from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]  compiled, without a stub


class LoadedProgram:
    """Calls an executable that the runtime has loaded, as fast as jax calls one that it has compiled.

    Args:
        executable: the result of the client's `deserialize_executable`.
        arguments: the program's tree of ShapeDtypeStructs with shardings.
        results: the program's tree of ShapeDtypeStructs with shardings.
        kept: indices of the flat arguments that the executable takes, in its order; the compiler drops unused ones.
    """

    def __init__(
        self, executable: Any, arguments: tuple[Any, ...], results: tuple[Any, ...], kept: Sequence[int], mesh: Mesh
    ):
        self._executable = executable
        self._arguments, self._tree = jax.tree.flatten(arguments)
        self._results, self._result_tree = jax.tree.flatten(results)
        self._kept = tuple(kept)
        self._call = fast_call(self)

    def __call__(self, *arguments: Any) -> Any:
        """Runs the program and returns without waiting. Donated arguments are deleted, as by a compiled program.

        Raises TypeError where the arguments' tree, a shape or a dtype differs from the program's.
        """
        return self._call(*arguments)

    def run(self, *arguments: Any) -> Any:
        """Runs the program through public interfaces alone, which takes 0.1 to 0.2 ms longer."""
        flat, tree = jax.tree.flatten(arguments)
        if tree != self._tree:
            raise TypeError(f"program takes arguments of the structure {self._tree}; it was called with {tree}")
        self._check(flat)
        taken = [self._place(flat[number], self._arguments[number]) for number in self._kept]
        outputs = self._executable.execute_sharded(taken).disassemble_into_single_device_arrays()
        arrays = [
            jax.make_array_from_single_device_arrays(result.shape, result.sharding, output)
            for result, output in zip(self._results, outputs, strict=True)
        ]
        return jax.tree.unflatten(self._result_tree, arrays)

    def dispatch_data(self, outputs: Any) -> Any:
        """Returns the data with which jax's dispatch runs the program itself; outputs: of the first run."""
        arrays = jax.tree.leaves(outputs)
        kept = frozenset(self._kept)
        return pxla.MeshExecutableFastpathData(
            xla_executable=self._executable,
            out_pytree_def=tree_util.dispatch_registry.flatten(outputs)[1],
            in_shardings=[argument.sharding for argument in self._arguments],
            out_shardings=[result.sharding for result in self._results],
            out_avals=[array.aval for array in arrays],
            out_committed=[True] * len(arrays),
            kept_var_bitvec=[number in kept for number in range(len(self._arguments))],
            in_device_local_layouts=[None] * len(self._kept),
            const_args=[],
        )

    def _check(self, flat: list[Any]) -> None:
        for number, (array, wanted) in enumerate(zip(flat, self._arguments, strict=True)):
            if array.shape != wanted.shape or array.dtype != wanted.dtype:
                raise TypeError(
                    f"program takes {wanted.dtype}{list(wanted.shape)} as flat argument {number}; it was called with "
                    f"{array.dtype}{list(array.shape)}"
                )

    @staticmethod
    def _place(array: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(array, wanted.sharding) if isinstance(array, np.ndarray) else array


def fast_call(program: LoadedProgram) -> Callable[..., Any]:
    """Wraps `program.run` in the dispatch that jax uses for its own compiled programs.

    It calls `run` for arguments of a kind that it has not seen, and handles all further ones of that kind itself. jax
    has no public name for it (jax/_src/interpreters/pxla.py, MeshExecutable.create_cpp_call).
    """

    def unseen(*arguments: Any) -> tuple[Any, Any, bool]:
        outputs = program.run(*arguments)
        return outputs, program.dispatch_data(outputs), False

    return _jax.pjit(
        "loaded", None, unseen, [], [], pxla.JitGlobalCppCacheKeys(), tree_util.dispatch_registry, pxla.cc_shard_arg
    )
