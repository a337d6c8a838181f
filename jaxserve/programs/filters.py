"""Filters tokens by min_p, top_k, top_p and typical_p, for rows that each have parameters of their own.

Each of the last three keeps the tokens with the largest keys (their logits, or how typical they are), down to a
threshold that is found by bisection instead of sorting: exact, with ties kept together. A pass over the keys tries 15
thresholds and finds four bits. The measure of what a threshold keeps is a count or a sum of probabilities.

A sum of probabilities depends on the order in which they are added, rounding included. On a GPU it is that of the pass.
On a CPU it is that of one plain sum over the row, whatever else is computed at once, so that a threshold is the same as
if each bit was found by itself: such a sum never rises with the threshold, because its terms are always added in the
same order, so what it keeps at least is well defined. It is slow, so the passes count in integers, which gives the same
threshold or its neighbor, and plain sums check that. The keys of a few rows at a time stay in the cache.
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
"""What the weights of a row add up to as integers."""
_PASSES = 5
"""Number of passes over integers, after which hardly more than one key is left between two thresholds."""
_NEIGHBORS = 8
"""Number of plain sums after which a search for the right one among neighbors gives way to halving."""
_LOWEST = -104.0
"""The exponential function of any float32 below this is 0."""


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
    the row's largest are 0.
    """

    def group(logits: jax.Array, arguments: tuple[jax.Array, ...]) -> jax.Array:
        keys, limit, use, *more = arguments
        order = _ordered_bits(keys)
        top = _ordered_bits(jnp.max(keys, axis=-1))
        if more:
            everything = jnp.sum(more[0], axis=-1)
            wanted = limit * everything
        else:
            everything, wanted = jnp.sum(jnp.isfinite(keys), axis=-1), limit
        if on_cpu:
            least = jnp.min(jnp.where(jnp.isfinite(keys), keys, jnp.inf), axis=-1)
            low = _ordered_bits(jnp.maximum(least, _value_of(top) + lowest))
            use = use & (everything >= wanted)  # else all that is finite stays
            searched = use & (wanted > 0)
            if more:
                threshold = _checked(order, more[0], limit, everything, low, top, searched)
            else:
                interval = _Interval.of(low, top, everything, searched)
                threshold = _narrowed(order, None, interval, wanted, top).low
            threshold = jnp.where(wanted > 0, threshold, top)
        else:
            threshold = _bisected(order, more[0] if more else None, wanted)
        threshold = jnp.minimum(threshold, top)  # the best stays where the limit rounds to 0
        return jnp.where(use[:, None] & (order < threshold[:, None]), -jnp.inf, logits)

    arguments = (keys, limit, use, *(() if weights is None else (weights,)))
    return in_groups(group, logits, arguments, on_cpu=on_cpu)


def _ordered_bits(values: jax.Array) -> jax.Array:
    """Returns uint32 whose order is that of the float32 values."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _value_of(order: jax.Array) -> jax.Array:
    """Returns the float32 values that `_ordered_bits` maps to `order`."""
    bits = jnp.where(order >> 31 == 1, order ^ jnp.uint32(1 << 31), ~order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bisected(order: jax.Array, weights: jax.Array | None, wanted: jax.Array) -> jax.Array:
    """Returns the largest threshold, uint32 [R], that keeps as much as is wanted; 0 where none does."""

    def narrow(step: jax.Array, threshold: jax.Array) -> jax.Array:
        unit = jnp.uint32(1 << 28) >> (4 * step).astype(jnp.uint32)
        tried = [threshold | unit * jnp.uint32(digit) for digit in range(1, _TRIED + 1)]
        digit = sum((measure >= wanted).astype(jnp.uint32) for measure in _measures(order, weights, tried))
        return threshold | unit * digit

    return jax.lax.fori_loop(0, 8, narrow, jnp.zeros(order.shape[:1], jnp.uint32))


def _measures(order: jax.Array, weights: jax.Array | None, tried: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Returns what each of the thresholds keeps, [R] each, in one pass: the sum of the weights, or a count."""
    kept = [order >= one[:, None] for one in tried]
    terms = [one.astype(jnp.int32) if weights is None else jnp.where(one, weights, 0) for one in kept]
    zero = jnp.zeros((), terms[0].dtype)

    def add(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> list[jax.Array]:
        return [one + other for one, other in zip(left, right, strict=True)]

    return jax.lax.reduce(terms, [zero] * len(terms), add, (1,))


class _Interval(NamedTuple):
    """Holds the state of searches, uint32 [R] each: `low` keeps as much as is wanted, `high` (above it) does not.

    step: number of passes so far. bounds: uint32 [4, R], low, high, and what each of them keeps as an integer; the
    second and third are inverted, so that a pass only raises them. done: bool [R], nothing is left to search.
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
    order: jax.Array, weights: jax.Array | None, interval: _Interval, wanted: jax.Array, top: jax.Array
) -> _Interval:
    """Narrows intervals of counts until one key, or ties of it, is left in each; those of integer weights, int32
    [R, V], for a fixed number of passes."""

    def go_on(state: _Interval) -> jax.Array:
        some = ~jnp.all(state.done)
        return some if weights is None else some & (state.step < _PASSES)

    def narrow(state: _Interval) -> _Interval:
        tried = _spread(state, top)
        kept = jnp.stack(_measures(order, weights, list(tried)))
        after = state.after(tried, kept.astype(jnp.uint32), kept >= wanted)
        done = after.high - after.low <= 1
        if weights is None:
            done |= after.num_between <= 1
        return state.moved(after, done)

    return jax.lax.while_loop(go_on, narrow, interval)


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


def _checked(
    order: jax.Array,
    weights: jax.Array,
    limit: jax.Array,
    everything: jax.Array,
    low: jax.Array,
    top: jax.Array,
    use: jax.Array,
) -> jax.Array:
    """Returns a threshold, uint32 [R], that keeps the fewest keys whose plain sum of weights is as much as is wanted.

    Args:
        order: uint32 [R, V], of the keys.
        weights: float32 [R, V].
        limit: float32 [R], the share of all weights that is wanted.
        everything: float32 [R], the plain sum of all weights.
        low: uint32 [R], a threshold that keeps all that weighs anything.
        top: uint32 [R], of the row's largest key.
        use: bool [R], rows whose result matters.
    """
    shares = jnp.round(weights * (_WHOLE / everything)[:, None]).astype(jnp.int32)
    whole, wanted = jnp.sum(shares, axis=-1), limit * everything
    interval = _Interval.of(low, top, whole, use)
    goal = jnp.ceil(limit * whole.astype(jnp.float32)).astype(jnp.int32)
    guess = _narrowed(order, shares, interval, goal, top).low

    def narrow(state: _Interval) -> _Interval:
        # First the guess, then the next key up or down, until one is passed that makes the difference. Where that
        # takes long, halves.
        up = state.low > low
        places, bound = jnp.where(up[:, None], ~order, order), jnp.where(up, ~state.low, state.high - 1)
        nearest = jnp.max(jnp.where(places <= bound[:, None], places, 0), axis=-1)
        tried = jnp.where(up, ~nearest + 1, nearest)
        halves = state.low + (state.high - state.low) // 2
        tried = jnp.where(state.step == 0, guess, jnp.where(state.step < _NEIGHBORS, tried, halves))
        tried = jnp.clip(tried, state.low + 1, jnp.maximum(state.high - 1, state.low + 1))
        enough = jnp.sum(jnp.where(order >= tried[:, None], weights, 0.0), axis=-1) >= wanted
        passed = (state.step > 0) & (state.step < _NEIGHBORS) & (up != enough)
        after = state.after(tried[None], jnp.zeros_like(tried[None]), enough[None])
        return state.moved(after, passed | (after.high - after.low <= 1))

    return jax.lax.while_loop(lambda state: ~jnp.all(state.done), narrow, interval).low
