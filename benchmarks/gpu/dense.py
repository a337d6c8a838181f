"""Attention in float64 on the host, row by row: what every kernel's values are compared with. numpy only."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
"""Largest magnitude that a quantized pool stores."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One attention call. rows: (new tokens, length with them) of each row.

    K kv_heads, G group, D head_dim, P page_size; dtype of queries, pool_dtype of the pool, "" for the same.
    padding: tokens after the last row's, whose queries are NaN. decode_only: the promise of the api.
    """

    rows: tuple[tuple[int, int], ...]
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    pool_dtype: str = ""
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    decode_only: bool = False
    padding: int = 3

    @property
    def stored(self) -> str:
        return self.pool_dtype or self.dtype

    @property
    def quantized(self) -> bool:
        return self.stored in LARGEST

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of a problem, and what the result must be.

    q [T, K, G, D], pool [pages, 2, K, P, D], page_table [R, maxp], kv_lens [R], query_start_loc [R + 1] are the api's.
    k_scale, v_scale: f32 [K] or None; sinks: f32 [K, G] or None. expected: float64 [T, K, G, D].
    """

    q: np.ndarray
    pool: np.ndarray
    page_table: np.ndarray
    kv_lens: np.ndarray
    query_start_loc: np.ndarray
    k_scale: np.ndarray | None
    v_scale: np.ndarray | None
    sinks: np.ndarray | None
    expected: np.ndarray


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a jax dtype's name."""
    return np.dtype(getattr(ml_dtypes, name, name))


def make_inputs(problem: Problem, seed: int) -> Inputs:
    """Random inputs. Whatever must not be read is NaN (the largest integer in an int8 pool) or an impossible page."""
    random = np.random.default_rng(seed)
    heads, dim, size = problem.kv_heads, problem.head_dim, problem.page_size
    lengths = np.array([length for _, length in problem.rows], np.int32)
    new = [count for count, _ in problem.rows]
    pages = [-(-int(length) // size) for length in lengths]
    kind = numpy_dtype(problem.stored)
    hole = np.float32(127 if problem.stored == "int8" else np.nan).astype(kind)
    pool = np.full((sum(pages) + 4, 2, heads, size, dim), hole, kind)
    free = random.permutation(np.arange(1, pool.shape[0], dtype=np.int32))
    table = np.full((len(pages), max(pages) + 2), 2**28, np.int32)
    values = [random.standard_normal((int(length), 2, heads, dim)).astype(np.float32) for length in lengths]
    scales = np.stack([_scales(values, side, problem) for side in (0, 1)])
    tokens = sum(new) + problem.padding
    q = np.full((tokens, heads, problem.group, dim), np.nan, np.float32)
    q[: sum(new)] = random.standard_normal((sum(new), *q.shape[1:]))
    q = q.astype(numpy_dtype(problem.dtype))
    sinks = random.standard_normal((heads, problem.group)).astype(np.float32) if problem.sinks else None
    expected = np.zeros(q.shape, np.float64)
    taken = start = 0
    for row, (count, length) in enumerate(problem.rows):
        stored = store(values[row] / scales[:, :, None], problem.stored)
        held = stored.astype(np.float64) * scales[:, :, None]
        table[row, : pages[row]] = free[taken : taken + pages[row]]
        for position in range(length):
            pool[table[row, position // size], :, :, position % size] = stored[position]
        expected[start : start + count] = _attend(problem, q[start : start + count], held, sinks)
        taken, start = taken + pages[row], start + count
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    k_scale, v_scale = (scales.astype(np.float32)) if problem.quantized else (None, None)
    return Inputs(q, pool, table, lengths, starts, k_scale, v_scale, sinks, expected)


def store(values: np.ndarray, dtype: str) -> np.ndarray:
    """The pool's elements for values that are divided by their scale already: rounded to nearest even, saturating."""
    if dtype not in LARGEST:
        return values.astype(numpy_dtype(dtype))
    limit = LARGEST[dtype]
    clipped = np.clip(values, -limit, limit)
    return (np.rint(clipped) if dtype == "int8" else clipped).astype(numpy_dtype(dtype))


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotary embedding of x [T, ..., D] with half-split pairing; cos and sin are [T, D / 2]. float64."""
    shape = (x.shape[0], *(1,) * (x.ndim - 2), cos.shape[1])
    cos, sin = cos.astype(np.float64).reshape(shape), sin.astype(np.float64).reshape(shape)
    low, high = np.split(x.astype(np.float64), 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _scales(values: list[np.ndarray], side: int, problem: Problem) -> np.ndarray:
    """float64 [K], exact in float32: the largest magnitude of each head over the largest that the pool stores."""
    if not problem.quantized:
        return np.ones(problem.kv_heads)
    most = np.max([np.abs(one[:, side]).max((0, 2), initial=1e-3) for one in values], axis=0)
    return (most / LARGEST[problem.stored]).astype(np.float32).astype(np.float64)


def _attend(problem: Problem, q: np.ndarray, held: np.ndarray, sinks: np.ndarray | None) -> np.ndarray:
    """float64 [n, K, G, D] for the last n positions of a row; held is [length, 2, K, D]."""
    count, length = q.shape[0], held.shape[0]
    if not count:
        return np.zeros(q.shape)
    queries = q.astype(np.float64).transpose(1, 2, 0, 3)  # [K, G, n, D]
    keys, values = held[:, 0].transpose(1, 0, 2), held[:, 1].transpose(1, 0, 2)  # [K, length, D]
    score = queries @ keys[:, None].swapaxes(-1, -2) * problem.scale
    if problem.soft_cap is not None:
        score = problem.soft_cap * np.tanh(score / problem.soft_cap)
    place = np.arange(length - count, length)[:, None]
    seen = np.arange(length)[None, :] <= place
    if problem.sliding_window is not None:
        seen &= np.arange(length)[None, :] > place - problem.sliding_window
    score = np.where(seen, score, -np.inf)
    top = score.max(-1, keepdims=True)
    sink = None if sinks is None else sinks.astype(np.float64)[:, :, None, None]
    top = top if sink is None else np.maximum(top, sink)
    weight = np.exp(score - top)
    total = weight.sum(-1, keepdims=True) + (0.0 if sink is None else np.exp(sink - top))
    return ((weight / total) @ values[:, None]).transpose(2, 0, 1, 3)
