"""Grouped matrix products behind one seam: checked arguments, implementations by name.

Rows are sorted by expert; each is multiplied by its expert's matrix. An implementation is one entry of
`IMPLEMENTATIONS`. Letters in shapes: M rows, K contracted axis, N columns, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.cpu.native_calls import FLOATING
from jaxserve.pallas_kernels.grouped_matmul import cpu, cpu_packed, reference, triton, xla

FORMS = ("dense", "packed")
"""Forms of the matrices: "dense" is one number an element, [E, N, K]; "packed" has each expert's in the order of
`cpu_packed.pack`, bfloat16."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to multiply.

    Attributes:
        multiply: (x, weights, offsets, dtype) -> out, as `grouped_matmul` describes them.
        platforms: platforms it runs on; empty for all.
        forms: forms of the matrices that it reads.
        dtypes: names of the dtypes of matrices that it reads; empty for all.
        prepare: makes known to XLA what a program with matrices of a dtype calls; None where nothing need be.
        row_bits: a row's bits depend on the row and its expert alone, in programs of any number of rows.
    """

    multiply: Callable[[jax.Array, jax.Array, jax.Array, jax.typing.DTypeLike], jax.Array]
    platforms: tuple[str, ...] = ()
    forms: tuple[str, ...] = ("dense",)
    dtypes: tuple[str, ...] = ()
    prepare: Callable[[jax.typing.DTypeLike], None] | None = None
    row_bits: bool = False


# In order of preference: `choose` takes the first that runs on the platform.
IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "triton": Implementation(triton.multiply, platforms=("gpu",)),
        "cpu": Implementation(
            cpu.multiply, platforms=("cpu",), dtypes=tuple(FLOATING), prepare=cpu.prepare, row_bits=True
        ),
        "cpu_packed": Implementation(
            cpu_packed.multiply,
            platforms=("cpu",),
            forms=("packed",),
            dtypes=("bfloat16",),
            prepare=cpu_packed.prepare,
            row_bits=True,
        ),
        "xla": Implementation(xla.multiply),
        "reference": Implementation(reference.multiply),
    }
)


def choose(platform: str, dtype: jax.typing.DTypeLike, form: str = "dense") -> str:
    """Returns the name of the implementation for a platform ("cpu", "gpu"), a form and a dtype.

    Raises ValueError where there is none.
    """
    for name, one in IMPLEMENTATIONS.items():
        fits = form in one.forms and (not one.dtypes or jnp.dtype(dtype).name in one.dtypes)
        if fits and (not one.platforms or platform in one.platforms):
            return name
    raise ValueError(f"form of experts is {form!r}; it must be one of {', '.join(FORMS)}")


def prepare(implementation: str, dtype: jax.typing.DTypeLike) -> None:
    """Makes known to XLA what programs with this implementation call; must precede loading or running one."""
    function = IMPLEMENTATIONS[implementation].prepare
    if function is not None:
        function(dtype)


def grouped_matmul(
    x: jax.Array,
    weights: jax.Array,
    offsets: jax.Array,
    *,
    implementation: str,
    form: str = "dense",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Multiplies each row by the transposed matrix of its expert, with sums in float32.

    Args:
        x: [M, K], sorted by expert.
        weights: [E, N, K].
        offsets: int32 [E + 1], not descending, from 0 to at most M: rows offsets[e] to offsets[e + 1] are of expert e.
            Nothing is read of an expert without rows; rows from the last offset on are of no expert.
        implementation: a key of `IMPLEMENTATIONS`.
        form: of the weights, one of `FORMS`.
        dtype: to which results are rounded, once.

    Returns:
        [M, N] in `dtype`, zeros for the rows of no expert.

    Raises:
        ValueError: a shape, dtype or form does not fit.
    """
    chosen = IMPLEMENTATIONS.get(implementation)
    if chosen is None:
        raise ValueError(f"implementation is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
    if form not in chosen.forms:
        raise ValueError(f"form of experts is {form!r}; {implementation} takes {', '.join(chosen.forms)}")
    if chosen.dtypes and weights.dtype.name not in chosen.dtypes:
        raise ValueError(f"dtype of experts is {weights.dtype.name}; {implementation} takes {', '.join(chosen.dtypes)}")
    if x.ndim != 2 or weights.ndim != 3 or x.shape[1] != weights.shape[2]:
        raise ValueError(f"x is {x.shape} and experts are {weights.shape}; they must be [M, K] and [E, N, K]")
    if offsets.shape != (weights.shape[0] + 1,) or offsets.dtype != jnp.int32:
        raise ValueError(
            f"offsets are {offsets.dtype.name} {offsets.shape}; for experts {weights.shape} they must be int32 "
            f"({weights.shape[0] + 1},)"
        )
    return chosen.multiply(x, weights, offsets, dtype)
