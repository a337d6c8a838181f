"""Static settings of an attention layer, and what an implementation is to serve."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What an attention layer computes beyond softmax(q k^T) v. Hashable, so it can be a static jit argument.

    Attributes:
        scale: multiplies the scores; usually head_dim ** -0.5.
        sliding_window: positions a token attends to, itself included; None for all before it.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for no cap.

    Raises:
        ValueError: a field is out of range.
    """

    scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}; it must be finite")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window is {self.sliding_window}; it must be None or at least 1")
        if self.soft_cap is not None and not (math.isfinite(self.soft_cap) and self.soft_cap > 0):
            raise ValueError(f"soft_cap is {self.soft_cap}; it must be None or a finite number above 0")


@dataclasses.dataclass(frozen=True)
class Use:
    """What decides whether an implementation serves a model.

    Attributes:
        dtype: of queries, keys and values as the model computes them.
        kv_cache_dtype: of keys and values in pages.
        page_size: positions a page.
        head_dim: D.
        group_heads: G.
    """

    dtype: str
    kv_cache_dtype: str
    page_size: int
    head_dim: int
    group_heads: int
