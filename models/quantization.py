"""Describes how a model's weights are quantized, as plain data. Imports no jax."""

from __future__ import annotations

import dataclasses
import re

LOAD_GROUP = 128
"""Numbers that share a scale where int4 is made of a plain checkpoint."""

KINDS = ("fp8", "int8", "int4")
"""Kinds of numbers, which are the values of `EngineConfig.quantization`, too."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Describes the numbers of one matrix [out, in]; a weight is (number - zero) * scale.

    Attributes:
        kind: "fp8" (e4m3), "int8" or "int4".
        group: numbers along the contracted axis that share a scale; None for a whole row.
        zeros: each group has a zero of its own; otherwise it is 0.
        ordered: the numbers of a group need not follow each other (act order): an index names the group of each.
        activations: "int8" or "fp8" where the format quantizes what enters the product, each token by a scale of its
            own; "" where it does not.
    """

    kind: str
    group: int | None = None
    zeros: bool = False
    ordered: bool = False
    activations: str = ""

    @property
    def text(self) -> str:
        """Names the scheme in messages."""
        span = "a scale for each row" if self.group is None else f"groups of {self.group}"
        zeros = ", zero points" if self.zeros else ""
        order = ", in act order" if self.ordered else ""
        inputs = f", {self.activations} activations" if self.activations else ""
        return f"{self.kind}, {span}{zeros}{order}{inputs}"

    def row_bytes(self, length: int) -> float:
        """Returns the bytes of a row of so many numbers, its scales and zeros included."""
        groups = 1 if self.group is None else length // self.group
        return length * (0.5 if self.kind == "int4" else 1.0) + groups * (4 + 2 * self.zeros)


@dataclasses.dataclass(frozen=True)
class Target:
    """Says which modules have a scheme.

    Attributes:
        modules: names, regular expressions after `re:`, or "Linear" for all matrices.
        scheme: theirs; None where they are not quantized.
        stored: how their tensors are laid out, see `jaxserve.models.loading.quantized_tensors`.
        block: rows and columns that share a stored scale, where it is stored so.
    """

    modules: tuple[str, ...]
    scheme: Scheme | None
    stored: str = ""
    block: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Describes the quantization of a model.

    Attributes:
        method: `quant_method` of `config.json`; "load" where a plain checkpoint is quantized while it is loaded.
        targets: the first one that names a module counts.
        ignored: modules that are not quantized; as `Target.modules`.
        loosely: `ignored` holds patterns of transformers' kind: the beginning of a name, or its end.
        head: the output matrix is one of the matrices that "Linear" names.
    """

    method: str
    targets: tuple[Target, ...]
    ignored: tuple[str, ...] = ()
    loosely: bool = False
    head: bool = False

    @classmethod
    def at_load(cls, kind: str) -> Quantization:
        """Returns the quantization of a plain checkpoint: symmetric, fp8 and int8 with a scale for each output, int4
        with groups of LOAD_GROUP.
        """
        return cls("load", (Target(("Linear",), Scheme(kind, LOAD_GROUP if kind == "int4" else None)),))

    @property
    def text(self) -> str:
        """Names the method and its schemes, for people."""
        schemes = dict.fromkeys(target.scheme.text for target in self.targets if target.scheme)
        method = "quantized while loading" if self.method == "load" else self.method
        return f"{method} ({'; '.join(schemes)})"

    @property
    def kinds(self) -> frozenset[str]:
        """Returns the kinds of numbers that some module has."""
        return frozenset(target.scheme.kind for target in self.targets if target.scheme)

    def target(self, module: str) -> Target | None:
        """Returns what a module's matrix is quantized by; None where it is not."""
        if any(self._ignores(pattern, module) for pattern in self.ignored):
            return None
        if not self.head and module == "lm_head":
            return None
        for target in self.targets:
            if any(pattern == "Linear" or _names(pattern, module) for pattern in target.modules):
                return target if target.scheme else None
        return None

    def _ignores(self, pattern: str, module: str) -> bool:
        if not self.loosely:
            return pattern == "Linear" or _names(pattern, module)
        # As transformers' should_convert_module: up to a module boundary, or as an end.
        return module.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) is not None


def _names(pattern: str, module: str) -> bool:
    """Returns whether a pattern of compressed-tensors names a module."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern == module
