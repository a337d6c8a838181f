"""Filters tokens by min_p, top_k, top_p and typical_p, for rows that each have parameters of their own.

Each of the last three keeps the tokens with the largest keys (their logits, or how typical they are), down to a
threshold that is found by bisection instead of sorting: exact, with ties kept together. A pass over the keys tries 15
thresholds and finds four bits. The measure of what a threshold keeps is a count, or a sum of probabilities.

Probabilities are counted in units of 2**-30, as integers: a sum of those does not depend on the order in which they are
added, and never rises with the threshold. Rounding to units costs what rounding a sum of float32 costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.programs.logit_rows import largest

_TRIED = 15
"""Number of thresholds that one pass tries."""
_WHOLE = 1 << 30
"""What the probabilities of a row add up to as integers, but for their rounding."""


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
    best = largest(logits)[:, None]
    floor = best + jnp.log(jnp.maximum(min_p, jnp.finfo(jnp.float32).tiny))[:, None]
    logits = jnp.where((min_p > 0)[:, None] & (logits < floor), -jnp.inf, logits)
    used = [(top_k > 0) & (top_k < size), top_p < 1.0]
    searches: list[Callable[[jax.Array], _Search]] = [
        lambda logits: _Search.of_number(logits, top_k),
        lambda logits: _Search.of_share(logits, logits - best, top_p, on_cpu),
    ]
    if typical_p is not None:
        used.append(typical_p < 1.0)
        searches.append(lambda logits: _Search.of_share(*_typicality(logits, best), typical_p, on_cpu))
    uses = jnp.stack(used) & active

    def one_filter(number: jax.Array, logits: jax.Array) -> jax.Array:
        def keep(logits: jax.Array) -> jax.Array:
            return _kept(logits, jax.lax.switch(number, searches, logits), uses[number], on_cpu)

        return jax.lax.cond(jnp.any(uses[number]), keep, lambda logits: logits, logits)

    # A loop, so that the search is compiled once.
    all_filters = lambda logits: jax.lax.fori_loop(0, len(searches), one_filter, logits)  # noqa: E731
    return jax.lax.cond(jnp.any(uses), all_filters, lambda logits: logits, logits)


def _typicality(logits: jax.Array, best: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns float32 [R, V] each: minus the distance of a token's information from the entropy, and the logarithm of
    its weight.

    Source: Meister et al., "Locally typical sampling" (TACL 2023), as transformers' TypicalLogitsWarper computes it.
    """
    relative = logits - best
    weights = jnp.exp(relative)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    log_probability = relative - jnp.log(total)
    terms = jnp.where(weights > 0, weights / total * log_probability, 0.0)
    entropy = -jnp.sum(terms, axis=-1, keepdims=True)
    return -jnp.abs(log_probability + entropy), relative


class _Search(NamedTuple):
    """Holds what a filter searches for: the fewest tokens with the largest keys, ties included, that measure as much as
    is wanted.

    keys: float32 [R, V]. units: int32 [R, V], the measure of each token. wanted: int32 [R]. counts: bool [], each token
    measures 1.
    """

    keys: jax.Array
    units: jax.Array
    wanted: jax.Array
    counts: jax.Array

    @classmethod
    def of_number(cls, keys: jax.Array, number: jax.Array) -> _Search:
        """Searches for so many tokens, int32 [R]."""
        return cls(keys, jnp.isfinite(keys).astype(jnp.int32), number, jnp.array(True))

    @classmethod
    def of_share(cls, keys: jax.Array, log_weights: jax.Array, share: jax.Array, on_cpu: bool) -> _Search:
        """Searches for tokens whose probabilities, proportional to the weights, add up to a share, float32 [R]."""
        stored = (
            jax.lax.optimization_barrier if on_cpu else lambda array: array
        )  # a sum of what is stored is vectorized
        weights = stored(jnp.exp(log_weights))
        total = jnp.sum(weights, axis=-1)
        units = stored(jnp.round(weights * (_WHOLE / total)[:, None]).astype(jnp.int32))
        wanted = jnp.ceil(share * jnp.sum(units, axis=-1).astype(jnp.float32)).astype(jnp.int32)
        wanted = jnp.where(jnp.isfinite(total), wanted, jnp.iinfo(jnp.int32).max)  # more than there is
        return cls(keys, units, wanted, jnp.array(False))


def _kept(logits: jax.Array, search: _Search, use: jax.Array, on_cpu: bool) -> jax.Array:
    """Masks to -inf the tokens that the search leaves out, in the rows that `use` this filter. One is always kept."""
    keys, units, wanted, _ = search
    order, top = _ordered_bits(keys), _ordered_bits(largest(keys))
    if on_cpu:
        everything = jnp.sum(units, axis=-1)
        use = use & (everything >= wanted)  # else all that is finite stays
        low = _ordered_bits(_least(jnp.where(units > 0, keys, jnp.inf)))
        interval = _Interval.of(low, top, everything, use & (wanted > 0))
        threshold = jnp.where(wanted > 0, _narrowed(order, search, interval, top), top)
    else:
        threshold = _bisected(order, units, wanted)
    threshold = jnp.minimum(threshold, top)  # the best stays where the limit rounds to 0
    return jnp.where(use[:, None] & (order < threshold[:, None]), -jnp.inf, logits)


def _least(values: jax.Array) -> jax.Array:
    """Returns the least of each row, float32 [R]."""
    return -largest(jax.lax.optimization_barrier(-values))


def _ordered_bits(values: jax.Array) -> jax.Array:
    """Returns uint32 whose order is that of the float32 values."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _value_of(order: jax.Array) -> jax.Array:
    """Returns the float32 values that `_ordered_bits` maps to `order`."""
    bits = jnp.where(order >> 31 == 1, order ^ jnp.uint32(1 << 31), ~order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bisected(order: jax.Array, units: jax.Array, wanted: jax.Array) -> jax.Array:
    """Returns the largest threshold, uint32 [R], that keeps as much as is wanted; 0 where none does."""

    def narrow(step: jax.Array, threshold: jax.Array) -> jax.Array:
        unit = jnp.uint32(1 << 28) >> (4 * step).astype(jnp.uint32)
        tried = [threshold | unit * jnp.uint32(digit) for digit in range(1, _TRIED + 1)]
        digit = sum((measure >= wanted).astype(jnp.uint32) for measure in _measures(order, units, tried))
        return threshold | unit * digit

    return jax.lax.fori_loop(0, 8, narrow, jnp.zeros(order.shape[:1], jnp.uint32))


def _measures(order: jax.Array, units: jax.Array, tried: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Returns the units that each of the thresholds keeps, int32 [R] each, in one pass."""
    terms = [jnp.where(order >= one[:, None], units, 0) for one in tried]

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
    def between(self) -> jax.Array:
        """Returns the units that `low` keeps and `high` does not."""
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


def _narrowed(order: jax.Array, search: _Search, interval: _Interval, top: jax.Array) -> jax.Array:
    """Returns the thresholds, uint32 [R], to which intervals are narrowed: they keep as much as is wanted, and the next
    key does not."""

    def narrow(state: _Interval) -> _Interval:
        tried = _spread(state, top)
        kept = jnp.stack(_measures(order, search.units, list(tried)))
        after = state.after(tried, kept.astype(jnp.uint32), kept >= search.wanted)
        one_left = search.counts & (after.between <= 1)
        return state.moved(after, one_left | (after.high - after.low <= 1))

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
