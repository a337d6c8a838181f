"""Filters tokens by min_p, top_k, top_p and typical_p, for rows that each have parameters of their own.

Each of the last three keeps the tokens with the largest keys (their logits, or how typical they are), down to a
threshold that is found by bisection instead of sorting: exact, with ties kept together. A pass over the keys tries 15
thresholds and finds four bits. The measure of what a threshold keeps is a count, or a sum of probabilities.

Probabilities are counted in units of 2**-30, as integers: a sum of those does not depend on the order in which they are
added, and never rises with the threshold. Rounding to units costs what rounding a sum of float32 costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.programs.logit_rows import in_groups, largest

_TRIED = 15
"""Number of thresholds that one pass tries."""
_WHOLE = 1 << 30
"""What the probabilities of a row add up to as integers, but for their rounding."""
_LOWEST = -22.0
"""The exponential function of any less is rounded to 0 units."""


def filter_logits(
    logits: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    active: jax.Array,
    typical_p: jax.Array | None = None,
    *,
    on_cpu: bool = True,
) -> jax.Array:
    """Masks tokens to -inf by min_p, then top_k, then top_p, then typical_p; the last two count probability among the
    tokens left by then.

    Args:
        logits: float32 [R, V], after temperature.
        top_k: int32 [R], 0 or less is off.
        top_p: float32 [R], 1 is off.
        min_p: float32 [R], 0 is off.
        active: bool [R], rows whose result matters; a filter runs only for those.
        typical_p: float32 [R], 1 is off; None is off for all.
        on_cpu: chooses how thresholds are searched for, not which are found.
    """
    size = logits.shape[-1]
    use_top_k = active & (top_k > 0) & (top_k < size)
    use_top_p = active & (top_p < 1.0)
    best = largest(logits)[:, None]
    floor = best + jnp.log(jnp.maximum(min_p, jnp.finfo(jnp.float32).tiny))[:, None]
    logits = jnp.where((min_p > 0)[:, None] & (logits < floor), -jnp.inf, logits)

    def keep_top_k(logits: jax.Array) -> jax.Array:
        return _kept(logits, logits, None, top_k, use_top_k, on_cpu)

    def keep_top_p(logits: jax.Array) -> jax.Array:
        return _kept(logits, logits, jnp.exp(logits - best), top_p, use_top_p, on_cpu, lowest=_LOWEST)

    logits = jax.lax.cond(jnp.any(use_top_k), keep_top_k, lambda logits: logits, logits)
    logits = jax.lax.cond(jnp.any(use_top_p), keep_top_p, lambda logits: logits, logits)
    if typical_p is None:
        return logits
    use_typical_p = active & (typical_p < 1.0)

    def keep_typical(logits: jax.Array) -> jax.Array:
        keys, weights = _typicality(logits, best)
        return _kept(logits, keys, weights, typical_p, use_typical_p, on_cpu)

    return jax.lax.cond(jnp.any(use_typical_p), keep_typical, lambda logits: logits, logits)


def _typicality(logits: jax.Array, best: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns float32 [R, V] each: minus the distance of a token's information from the entropy, and its weight.

    Source: Meister et al., "Locally typical sampling" (TACL 2023), as transformers' TypicalLogitsWarper computes it.
    """
    relative = logits - best
    weights = jnp.exp(relative)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    log_probability = relative - jnp.log(total)
    terms = jnp.where(weights > 0, weights / total * log_probability, 0.0)
    entropy = -jnp.sum(terms, axis=-1, keepdims=True)
    return -jnp.abs(log_probability + entropy), weights


def _kept(
    logits: jax.Array,
    keys: jax.Array,
    weights: jax.Array | None,
    limit: jax.Array,
    use: jax.Array,
    on_cpu: bool,
    lowest: float = -math.inf,
) -> jax.Array:
    """Masks to -inf the tokens with the smallest keys, in the rows that `use` this filter.

    Kept are the fewest with the largest keys, ties included, whose number reaches `limit`, or whose weights reach that
    share of the row's sum where there are weights. One is always kept. lowest: weights of keys that are further below
    the row's largest are 0 units.
    """

    def group(logits: jax.Array, arguments: tuple[jax.Array, ...]) -> jax.Array:
        keys, limit, use, *more = arguments
        units = _units(more[0], on_cpu) if more else None
        everything = jnp.sum(jnp.isfinite(keys), axis=-1) if units is None else jnp.sum(units, axis=-1)
        wanted = limit if units is None else jnp.ceil(limit * everything.astype(jnp.float32)).astype(jnp.int32)
        order, top = _ordered_bits(keys), _ordered_bits(largest(keys))
        if on_cpu:
            low = _ordered_bits(jnp.maximum(_least(keys), _value_of(top) + lowest))
            use = use & (everything >= wanted)  # else all that is finite stays
            interval = _Interval.of(low, top, everything, use & (wanted > 0))
            threshold = jnp.where(wanted > 0, _narrowed(order, units, interval, wanted, top), top)
        else:
            threshold = _bisected(order, units, wanted)
        threshold = jnp.minimum(threshold, top)  # the best stays where the limit rounds to 0
        return jnp.where(use[:, None] & (order < threshold[:, None]), -jnp.inf, logits)

    arguments = (keys, limit, use, *(() if weights is None else (weights,)))
    return in_groups(group, logits, arguments, on_cpu=on_cpu)


def _units(weights: jax.Array, on_cpu: bool) -> jax.Array:
    """Returns int32 [R, V]: the probabilities that are proportional to the weights."""
    stored = jax.lax.optimization_barrier if on_cpu else lambda array: array  # a sum of what is stored is vectorized
    weights = stored(weights)
    scale = _WHOLE / jnp.sum(weights, axis=-1, keepdims=True)
    return stored(jnp.round(weights * scale).astype(jnp.int32))


def _least(keys: jax.Array) -> jax.Array:
    """Returns the least finite key of each row, float32 [R]."""
    return -largest(jax.lax.optimization_barrier(jnp.where(jnp.isfinite(keys), -keys, -jnp.inf)))


def _ordered_bits(values: jax.Array) -> jax.Array:
    """Returns uint32 whose order is that of the float32 values."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _value_of(order: jax.Array) -> jax.Array:
    """Returns the float32 values that `_ordered_bits` maps to `order`."""
    bits = jnp.where(order >> 31 == 1, order ^ jnp.uint32(1 << 31), ~order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bisected(order: jax.Array, units: jax.Array | None, wanted: jax.Array) -> jax.Array:
    """Returns the largest threshold, uint32 [R], that keeps as much as is wanted; 0 where none does."""

    def narrow(step: jax.Array, threshold: jax.Array) -> jax.Array:
        unit = jnp.uint32(1 << 28) >> (4 * step).astype(jnp.uint32)
        tried = [threshold | unit * jnp.uint32(digit) for digit in range(1, _TRIED + 1)]
        digit = sum((measure >= wanted).astype(jnp.uint32) for measure in _measures(order, units, tried))
        return threshold | unit * digit

    return jax.lax.fori_loop(0, 8, narrow, jnp.zeros(order.shape[:1], jnp.uint32))


def _measures(order: jax.Array, units: jax.Array | None, tried: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Returns what each of the thresholds keeps, int32 [R] each, in one pass: a sum of units, or a count."""
    kept = [order >= one[:, None] for one in tried]
    terms = [one.astype(jnp.int32) if units is None else jnp.where(one, units, 0) for one in kept]

    def add(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> list[jax.Array]:
        return [one + other for one, other in zip(left, right, strict=True)]

    return jax.lax.reduce(terms, [jnp.int32(0)] * len(terms), add, (1,))


class _Interval(NamedTuple):
    """Holds the state of searches, uint32 [R] each: `low` keeps as much as is wanted, `high` (above it) does not.

    step: number of passes so far. bounds: uint32 [4, R], low, high, and what each of them keeps; the second and third
    are inverted, so that a pass only raises them. done: bool [R], nothing is left to search.
    """

    step: jax.Array
    bounds: jax.Array
    done: jax.Array

    @classmethod
    def of(cls, low: jax.Array, top: jax.Array, everything: jax.Array, use: jax.Array) -> _Interval:
        """Begins searches between what keeps everything and what keeps nothing, where they are of `use`."""
        kept = everything.astype(jnp.uint32)
        bounds = jnp.stack([low, ~(top + 1), ~kept, jnp.zeros_like(kept)])
        return cls(jnp.int32(0), bounds, ~use | (top <= low))

    @property
    def low(self) -> jax.Array:
        return self.bounds[0]

    @property
    def high(self) -> jax.Array:
        return ~self.bounds[1]

    @property
    def num_between(self) -> jax.Array:
        """Returns the number of keys that `low` keeps and `high` does not, where the measure is a count."""
        return ~self.bounds[2] - self.bounds[3]

    def after(self, tried: jax.Array, kept: jax.Array, enough: jax.Array) -> _Interval:
        """Returns the interval once thresholds [N, R] are tried, by what they keep and whether that is enough.

        What a threshold keeps never rises with it, so that the highest of those that keep enough keeps the least.
        """
        nothing = jnp.zeros_like(tried)
        raised = jnp.stack([tried, nothing, ~kept, nothing]), jnp.stack([nothing, ~tried, nothing, kept])
        return self._replace(bounds=jnp.maximum(self.bounds, jnp.max(jnp.where(enough, *raised), axis=1)))

    def moved(self, after: _Interval, done: jax.Array) -> _Interval:
        """Returns the next state: of searches that were done, the same."""
        return _Interval(self.step + 1, jnp.where(self.done, self.bounds, after.bounds), self.done | done)


def _narrowed(
    order: jax.Array, units: jax.Array | None, interval: _Interval, wanted: jax.Array, top: jax.Array
) -> jax.Array:
    """Returns the thresholds, uint32 [R], to which intervals are narrowed: they keep as much as is wanted, and the next
    key does not."""

    def narrow(state: _Interval) -> _Interval:
        tried = _spread(state, top)
        kept = jnp.stack(_measures(order, units, list(tried)))
        after = state.after(tried, kept.astype(jnp.uint32), kept >= wanted)
        done = after.high - after.low <= 1
        if units is None:
            done |= after.num_between <= 1  # one key is left, or equal ones
        return state.moved(after, done)

    return jax.lax.while_loop(lambda state: ~jnp.all(state.done), narrow, interval).low


def _spread(state: _Interval, top: jax.Array) -> jax.Array:
    """Returns rising thresholds, uint32 [15, R], that divide intervals in 16 equal parts, by the keys' values, or by
    their bits where the values extend over several orders of magnitude, and now and then, lest values are too close to
    be divided."""
    best = _value_of(top)
    low, high = _value_of(state.low) - best, _value_of(state.high - 1) - best
    by_bits = ~(low >= -4096.0) | (state.step % 4 == 3)
    part, span = jnp.arange(1, _TRIED + 1, dtype=jnp.uint32)[:, None], state.high - state.low
    bits = state.low + (span >> 4) * part + ((span & 15) * part >> 4)
    values = _ordered_bits(best + (low + (high - low) * (part.astype(jnp.float32) / 16)))
    return jnp.where(by_bits, bits, jnp.clip(values, state.low, state.high - 1))
