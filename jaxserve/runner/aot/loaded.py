"""A program from a bundle: the runtime's executable, called with trees of arrays as a compiled program is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh


class LoadedProgram:
    """Calls an executable that the runtime has loaded.

    executable: what the client's `deserialize_executable` returned. arguments, results: the program's trees of
    ShapeDtypeStructs with shardings. kept: numbers of the flat arguments that the executable takes, in its order; the
    compiler drops what a program does not use.
    """

    def __init__(
        self, executable: Any, arguments: tuple[Any, ...], results: tuple[Any, ...], kept: Sequence[int], mesh: Mesh
    ):
        self._executable = executable
        self._arguments, self._tree = jax.tree.flatten(arguments)
        self._results, self._result_tree = jax.tree.flatten(results)
        self._kept = tuple(kept)
        self._one_device = mesh.size == 1
        self._checked = False

    def __call__(self, *arguments: Any) -> Any:
        """Runs it and returns without waiting. Donated arguments are deleted, as by a compiled program.

        Raises TypeError where the arguments' tree differs from the program's, or, in the first call, a shape or dtype.
        """
        flat, tree = jax.tree.flatten(arguments)
        if tree != self._tree:
            raise TypeError(f"program takes arguments of the structure {self._tree}; it was called with {tree}")
        if not self._checked:
            self._check(flat)
        taken = [self._place(flat[number], self._arguments[number]) for number in self._kept]
        outputs = self._executable.execute_sharded(taken).disassemble_into_single_device_arrays()
        if self._one_device:
            arrays = [output[0] for output in outputs]
        else:
            arrays = [
                jax.make_array_from_single_device_arrays(result.shape, result.sharding, output)
                for result, output in zip(self._results, outputs, strict=True)
            ]
        return jax.tree.unflatten(self._result_tree, arrays)

    def _check(self, flat: list[Any]) -> None:
        for number, (array, wanted) in enumerate(zip(flat, self._arguments, strict=True)):
            if array.shape != wanted.shape or array.dtype != wanted.dtype:
                raise TypeError(
                    f"program takes {wanted.dtype}{list(wanted.shape)} as flat argument {number}; it was called with "
                    f"{array.dtype}{list(array.shape)}"
                )
        self._checked = True

    @staticmethod
    def _place(array: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(array, wanted.sharding) if isinstance(array, np.ndarray) else array
