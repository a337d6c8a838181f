"""Represents a model's parameters as a plain pytree, and creates their shapes, dtypes and shardings without a
checkpoint.

The tree is nested dicts keyed by the module's attribute names and layer numbers. It holds arrays and nothing else, so
it passes through jit, device_put and orbax as it is; `bind` turns it into a module again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import matmul, quantized
from jaxserve.models.layers.decoder import Decoder
from jaxserve.models.layers.matmul import Products
from jaxserve.models.layers.parameter import Initial, Packing, Parameter, Params, Path, get, path_text, put
from jaxserve.models.layers.quantized import Quantized
from jaxserve.models.quantization import Quantization
from jaxserve.models.registry import lookup
from jaxserve.pallas_kernels.cpu import panel_weights
from jaxserve.pallas_kernels.grouped_matmul import choose

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the supported weight dtypes."""


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Builds a mesh with the one axis `tensor` over the jax devices; None takes the first device alone."""
    devices = jax.devices()[:1] if devices is None else list(devices)
    return Mesh(np.array(devices), ("tensor",), axis_types=(AxisType.Auto,))


def resolve_dtype(dtype: Any) -> np.dtype:
    """Returns the numpy dtype of a name or a dtype; a ValueError names the supported ones."""
    try:
        resolved = np.dtype(jnp.dtype(dtype))
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in DTYPES:
        name = dtype if resolved is None else resolved.name
        raise ValueError(f"model dtype is {name!r}; supported dtypes are {', '.join(DTYPES)}")
    return resolved


def abstract_params(config: ModelConfig, dtype: Any, mesh: Mesh) -> Params:
    """Returns the parameters as ShapeDtypeStructs with NamedShardings: all that compiling needs.

    Args:
        config: the architecture; one that the registry does not know is a ValueError.
        dtype: of every parameter; see `resolve_dtype`.
        mesh: with the axis `tensor`, whose size must divide the key-value heads and the width of MLPs (ValueError).
    """
    resolved = resolve_dtype(dtype)
    check_mesh(config, mesh)
    tree: Params = {}
    for path, parameter in parameters(config).items():
        partition = _fitting(parameter, mesh)
        if parameter.scheme is None:
            leaf = jax.ShapeDtypeStruct(parameter.shape, resolved, sharding=NamedSharding(mesh, partition))
        else:
            leaf = quantized.abstract(parameter, partition, functools.partial(NamedSharding, mesh))
        put(tree, path, leaf)
    return tree


def parameters(config: ModelConfig) -> dict[Path, Parameter]:
    """Lists every parameter as its layer declares it, by path; sources have the names that a checkpoint has, and
    parameters the scheme that the model's quantization has for all of their sources.

    Raises ValueError where a quantized parameter's shape does not go with its scheme.
    """
    declared = _structure(config, Products())[1]
    names = lookup(config.architecture).names
    found = {}
    for path, parameter in declared.items():
        sources = names.stored(parameter.sources, path[1] if path[0] == "layers" else None)
        found[path] = _formed(path, dataclasses.replace(parameter, sources=sources), config.quantization)
    return found


def _formed(path: Path, parameter: Parameter, quantization: Quantization | None) -> Parameter:
    """Returns a parameter with its scheme. One whose sources are quantized in several ways, or that a quantized tensor
    fills in another layout than its own, has none: what is stored is dequantized as it is loaded.
    """
    if quantization is None or parameter.packing not in (Packing.MATRIX, Packing.GATE_UP):
        return parameter
    targets = {quantization.target(source.tensor.removesuffix(".weight")) for source in parameter.sources}
    target = targets.pop()
    if targets or target is None or target.scheme is None:
        return parameter
    if quantization.method == "load":
        if path[0] != "layers":
            return parameter
    elif any(source.transposed or source.item is not None for source in parameter.sources):
        return parameter
    quantized.check(path_text(path), parameter, target.scheme)
    return dataclasses.replace(parameter, scheme=target.scheme)


def num_parameters(config: ModelConfig) -> int:
    """Returns the number of weights; scales do not count."""
    return sum(math.prod(parameter.shape) for parameter in parameters(config).values())


def random_params(config: ModelConfig, dtype: Any, mesh: Mesh, seed: int) -> Params:
    """Draws random weights on the devices, for measuring speed without a checkpoint.

    Matrices and biases are normal with variance 1 / (length of the dot), norms change nothing. The same seed gives the
    same weights on every mesh. Arguments are those of `abstract_params`.
    """
    declared = parameters(config)
    root = jax.random.key(seed)

    def draw(number: int, path: Path, leaf: Any) -> Any:
        if isinstance(leaf, Quantized):
            return quantized.random_weight(leaf, jax.random.fold_in(root, number))
        if declared[path].neutral:
            one = declared[path].initial is Initial.ONES
            return jax.device_put(np.full(leaf.shape, one, leaf.dtype), leaf.sharding)
        return _normal(leaf.shape, leaf.dtype, leaf.sharding, declared[path].dot_length)(
            jax.random.fold_in(root, number)
        )

    tree: Params = {}
    for number, (path, leaf) in enumerate(leaves(abstract_params(config, dtype, mesh))):
        put(tree, path, draw(number, path, leaf))
    return tree


def packed_kernels(config: ModelConfig, dtype: Any) -> str:
    """Returns the name of this CPU's kernels that read weights of `dtype` in packed order; "" without any."""
    return matmul.packed_kernels(resolve_dtype(dtype), parameters(config).values())


def quantized_kernels(config: ModelConfig) -> str:
    """Returns the name of this CPU's kernels for the model's quantized weights; "" where it has none."""
    return panel_weights.kernels() if config.quantization else ""


def products_for(
    dtype: Any,
    mesh: Mesh,
    *,
    packed: str = "",
    by_rows: bool = False,
    experts: bool = False,
    quantized: str = "",
    quantization: Quantization | None = None,
) -> Products:
    """Selects the matrix products of layers with weights of `dtype` on the devices of `mesh`.

    packed: name of the kernels in whose order weights are packed, or ""; by_rows: on a CPU, the kernels multiply whose
    results depend on their row alone; experts: some layers have experts; quantized: name of the kernels for the weights
    that `quantization` quantizes, in their packed order, or "".

    Sums are float32 in any case. A GPU's matmul rounds in its epilogue, where it adds the residual too: float32
    products would double what a step moves besides the weights, and XLA would then sum the residual stream anew from
    all layers' products in every norm. XLA's CPU backend has no fast dot with a bfloat16 result; with packed weights
    (`pack_for`) or kernels by rows, both for one device, its dots are not used at all.
    """
    resolved, platform = resolve_dtype(dtype), mesh.devices.flat[0].platform
    grouped: dict[str, Any] = {}
    if experts:
        split = mesh if mesh.size > 1 else None
        by_kernel = platform != "cpu" or (by_rows and split is None)
        form = "packed" if Products(packed=packed).in_pairs else "dense"
        grouped = {"experts": choose(platform, resolved, form) if by_kernel else "xla", "mesh": split}
    if platform != "cpu":
        return Products(resolved, **grouped)
    if mesh.size > 1:
        return Products(**grouped)
    targets = quantization.targets if quantization else ()
    schemes = tuple(dict.fromkeys(target.scheme for target in targets if target.scheme))
    rows = resolved.name if by_rows else ""
    return Products(packed=packed, rows=rows, quantized=quantized, schemes=schemes, **grouped)


def pack_for(config: ModelConfig, params: Params, products: Products) -> Params:
    """Reorders the parameters in place into the order that `products` reads, where that differs."""
    for path, parameter in parameters(config).items() if products.packed else ():
        stored = parameter.packing is Packing.EXPERTS and not products.in_pairs
        if parameter.packing is not Packing.NONE and not stored and parameter.scheme is None:
            put(params, path, matmul.packed(get(params, path), parameter, products))
    for path, leaf in leaves(params) if products.quantized else ():
        if isinstance(leaf, Quantized) and leaf.packs:
            put(params, path, quantized.packed(leaf))
    return params


def bind(config: ModelConfig, params: Params, products: Products = Products()) -> Any:
    """Builds the module with these parameters and products. It copies nothing and is cheap, inside jit too."""
    graph, _ = _structure(config, products)
    return nnx.merge(graph, nnx.State(params))


def params_of(model: nnx.Module) -> Params:
    """Returns the parameters of a module as a tree, as this module's functions and the checkpoint's take them."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def leaves(params: Params) -> list[tuple[Path, Any]]:
    """Returns (path, leaf) of every parameter, in pytree order; a quantized one is a `Quantized`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return [(tuple(entry.key for entry in path), leaf) for path, leaf in flat]


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError where the model cannot be split over the mesh's axis `tensor`."""
    if "tensor" not in mesh.shape:
        raise ValueError(f"mesh axes are {tuple(mesh.shape)}; one of them must be 'tensor'")
    size = mesh.shape["tensor"]
    widths = dict.fromkeys(("intermediate_size", layer.mlp.intermediate_size) for layer in config.layer_specs)
    for name, value in (("num_key_value_heads", config.num_key_value_heads), *widths):
        if value % size:
            raise ValueError(f"mesh axis tensor has {size} devices; it must divide {name} {value}")


def _fitting(parameter: Parameter, mesh: Mesh) -> P:
    for length, axis in zip(parameter.shape, parameter.partition, strict=True):
        if axis is not None and length % mesh.shape[axis]:
            assert parameter.whole_if_uneven, parameter
            return P(*(None for _ in parameter.shape))
    return parameter.partition


@functools.lru_cache(maxsize=16)
def _structure(config: ModelConfig, products: Products) -> tuple[Any, dict[Path, Parameter]]:
    """Returns the module's graph definition and the declaration of each parameter by path; no array is created."""
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.float32, products=products, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    flat: list[tuple[Any, Any]] = sorted(nnx.to_flat_state(state))
    return graph, {path: leaf.get_metadata("spec") for path, leaf in flat}


@functools.lru_cache(maxsize=64)
def _normal(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding, fan_in: int) -> Any:
    def draw(key: jax.Array) -> jax.Array:
        return (jax.random.normal(key, shape, jnp.float32) / math.sqrt(fan_in)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)
