"""Divides a model's layers into groups that share the arrays of the page pool.

Layers of one kind (full attention, or a window of n positions) need the same pages of a sequence: all of them, or those
that the window reaches. A group holds layers of one kind and has a page table of its own, and all groups have the same
number m of layers, so that m pool arrays serve them all: array i holds the keys and values of layer i of every group. A
page number therefore belongs to one group at a time, and a page that one group's window has left can be taken by any
group. A kind with more than m layers has several groups, the last of which may have fewer: what it lacks is padding.

Imports no jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxserve.models.value_checks import check_count

MOST_PADDING = 0.05
"""Share of the fewest bytes that a sequence may take beyond them, so that there are fewer groups. Each group costs a
page table, and a page whenever a sequence grows by one."""


class LayerKind(NamedTuple):
    """Describes what of a layer determines its pages.

    Attributes:
        window: positions a token attends to, itself included; None for all before it.
        kv_heads: key-value heads.
        head_dim: numbers of a key or value.
    """

    window: int | None
    kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class LayerGroups:
    """Holds the groups of a model's layers: groups of full attention first, then those of wider windows.

    Attributes:
        size: layers of a group (m), and arrays of the pool.
        windows: of each group, positions that its layers attend to, at least 2; None for all. Layers of a group may
            have a narrower window than it.
        places: of each layer, its group and its array.
    """

    size: int
    windows: tuple[int | None, ...]
    places: tuple[tuple[int, int], ...]

    @property
    def padding(self) -> int:
        """Returns the number of a page's layers, over all groups, that no layer uses."""
        return self.size * len(self.windows) - len(self.places)

    def pages(self, length: int, page_size: int) -> int:
        """Returns the pages that a sequence of `length` tokens holds while it decodes."""
        return sum(pages_held(window, length, page_size) for window in self.windows)

    def most_pages(self, rows: int, length: int, page_size: int, step_tokens: int) -> int:
        """Returns the most pages that `rows` sequences of up to `length` tokens hold. A group with a window also holds
        what the prompts of the largest step, of `step_tokens` tokens, fill, until the window has left it.
        """
        whole, pages = rows * -(-length // page_size), 0
        for window in self.windows:
            held = rows * pages_held(window, length, page_size)
            pages += whole if window is None else min(held + step_tokens // page_size + rows, whole)
        return pages


def pages_held(window: int | None, length: int, page_size: int, tokens: int = 1) -> int:
    """Returns the most pages of one group that a sequence of up to `length` tokens holds.

    The window's first position and the step's last token may each lie anywhere in their pages.

    Args:
        window: positions a token attends to, itself included; None for all before it.
        length: tokens of the sequence.
        page_size: tokens of a page.
        tokens: most tokens of the sequence in one step.
    """
    pages = -(-length // page_size)
    if window is None:
        return pages
    return min(pages, -(-(window + tokens - 2) // page_size) + 1)


def layer_groups(kinds: Sequence[LayerKind], page_size: int, length: int) -> LayerGroups:
    """Chooses the groups of layers.

    Of all group sizes, those count with which a sequence of `length` tokens takes at most MOST_PADDING more than the
    fewest bytes; of these the one with the fewest groups is chosen, and of equally many the one with the fewest bytes.
    Where it takes hardly more with all layers in one group, which then has the widest window, that is chosen.

    Args:
        kinds: of each layer, first to last; at least one.
        page_size: tokens of a page.
        length: tokens of the longest sequence. A window of as many positions is none.

    Raises:
        ValueError: layers have pages of different sizes, or a number is out of range.
    """
    check_count("page_size", page_size)
    check_count("length", length)
    _check_alike(kinds)
    windows = [None if kind.window is None or kind.window >= length else max(2, kind.window) for kind in kinds]
    candidates = list(_candidates(windows))
    sizes = [groups.size * groups.pages(length, page_size) for groups in candidates]
    most = (1 + MOST_PADDING) * min(sizes)
    fit = [
        (len(groups.windows), size, place) for place, (groups, size) in enumerate(zip(candidates, sizes, strict=True))
    ]
    return candidates[min(one for one in fit if one[1] <= most)[2]]


def _candidates(windows: Sequence[int | None]) -> Iterator[LayerGroups]:
    """Yields all layers in one group, and groups of each kind for every size that a kind has layers for."""
    widest = max(windows, key=_width)
    yield LayerGroups(len(windows), (widest,), tuple((0, layer) for layer in range(len(windows))))
    kinds = sorted(set(windows), key=_width, reverse=True)
    if len(kinds) > 1:
        for size in range(1, max(windows.count(kind) for kind in kinds) + 1):
            yield _of_size(windows, kinds, size)


def _of_size(windows: Sequence[int | None], kinds: Sequence[int | None], size: int) -> LayerGroups:
    """Returns groups of `size` layers, each of one kind, in the order of `kinds`."""
    places: dict[int, tuple[int, int]] = {}
    of_groups: list[int | None] = []
    for kind in kinds:
        layers = [layer for layer, window in enumerate(windows) if window == kind]
        for index, layer in enumerate(layers):
            places[layer] = len(of_groups) + index // size, index % size
        of_groups += [kind] * -(-len(layers) // size)
    return LayerGroups(size, tuple(of_groups), tuple(places[layer] for layer in range(len(windows))))


def _width(window: int | None) -> float:
    return float("inf") if window is None else window


def _check_alike(kinds: Sequence[LayerKind]) -> None:
    """Raises ValueError where layers have pages of different sizes."""
    first = kinds[0]
    for layer, kind in enumerate(kinds):
        if kind.window is not None:
            check_count(f"window of layer {layer}", kind.window)
        if (kind.kv_heads, kind.head_dim) != (first.kv_heads, first.head_dim):
            raise ValueError(
                f"layer {layer} has {kind.kv_heads} key-value heads of {kind.head_dim} and layer 0 has "
                f"{first.kv_heads} of {first.head_dim}; all layers share one page pool, so their pages must have the "
                "same size: serve a model whose layers have equal key-value heads"
            )
