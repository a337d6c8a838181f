"""Describes which pages of a sequence each group of layers needs (models/layer_groups.py). Imports no jax."""

from __future__ import annotations

import dataclasses
import functools

from jaxserve.kv_cache.content_keys import KEY_BYTES
from jaxserve.models.layer_groups import pages_held


@dataclasses.dataclass(frozen=True)
class PageGroups:
    """Describes the page tables of a sequence, one for each group of layers. All have the same entries; an entry that a
    group's window has left is the null page.

    Attributes:
        page_size: tokens of a page.
        windows: of each group, the positions that a token attends to, itself included; None for all before it.
        step_tokens: most tokens of a sequence in one step.
    """

    page_size: int
    windows: tuple[int | None, ...] = (None,)
    step_tokens: int = 1

    def __post_init__(self) -> None:
        for window in self.windows:
            if window is not None and window < 2:  # a sequence that is swapped out has a page
                raise ValueError(f"window of a group is {window}; it must be at least 2, or None")

    @functools.cached_property
    def count(self) -> int:
        """Number of groups."""
        return len(self.windows)

    @functools.cached_property
    def windowed(self) -> bool:
        """Whether a group has a window."""
        return any(window is not None for window in self.windows)

    @functools.cached_property
    def alike(self) -> bool:
        """Whether all layers need all pages, so that there is one group without a window."""
        return self.windows == (None,)

    def left(self, position: int) -> list[int]:
        """Returns the number of entries of each table that the token at `position`, and those after it, do not attend
        to."""
        return [0 if window is None else max(0, position - window + 1) // self.page_size for window in self.windows]

    def held(self, length: int) -> int:
        """Returns the pages that a sequence of `length` tokens holds while it decodes."""
        return sum(pages_held(window, length, self.page_size) for window in self.windows)

    def most(self, length: int) -> list[int]:
        """Returns the most pages of each group that a sequence of up to `length` tokens holds, whatever its steps."""
        return [pages_held(window, length, self.page_size, self.step_tokens) for window in self.windows]

    def pool_tokens(self, num_usable: int, max_model_len: int) -> int:
        """Returns the number of tokens of the longest sequence that `num_usable` pages hold when it runs alone; at most
        max_model_len where groups differ."""
        if self.alike:
            return num_usable * self.page_size
        low, high = 0, max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if sum(self.most(middle)) <= num_usable else (low, middle - 1)
        return low


def group_key(key: bytes, group: int) -> bytes:
    """Returns the content key of a group's page, from that of its tokens, which is the first group's."""
    return key if group == 0 else key + group.to_bytes(2, "little")


def key_group(key: bytes) -> int:
    """Returns the group of a page with this content key, as `group_key` made it."""
    return int.from_bytes(key[KEY_BYTES:], "little")
