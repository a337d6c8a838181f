"""The processing of logits stated in numpy, float64, one row at a time, from what vLLM and transformers document.

Nothing here shares code with the sampler: filters sort, masks are sets of ids, penalties count lists of ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


def processed(
    logits: np.ndarray,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    logit_bias: Sequence[tuple[int, float]] = (),
    allowed_token_ids: Sequence[int] | None = None,
    bad_words_token_ids: Sequence[Sequence[int]] = (),
    forbidden: Sequence[int] = (),
) -> np.ndarray:
    """Logits [V] as a token is drawn from them. forbidden: stop tokens that min_tokens forbids."""
    values = np.asarray(logits, np.float64).copy()
    if allowed_token_ids is not None:
        values[~np.isin(np.arange(len(values)), list(allowed_token_ids))] = -np.inf
    for word in bad_words_token_ids:
        start = len(output) - (len(word) - 1)
        if start >= 0 and list(output[start:]) == list(word[:-1]):
            values[word[-1]] = -np.inf
    values[list(forbidden)] = -np.inf
    for token_id, bias in logit_bias:
        values[token_id] += bias
    counts = Counter(output)
    for token_id in {*prompt, *output}:
        value = values[token_id]
        value = value / repetition_penalty if value > 0 else value * repetition_penalty
        value -= frequency_penalty * counts[token_id]
        value -= presence_penalty * (counts[token_id] > 0)
        values[token_id] = value
    if temperature == 0:
        return values
    values = values / temperature
    values[softmax(values) < min_p * softmax(values).max()] = -np.inf
    if 0 < top_k < len(values):
        values[values < np.sort(values)[-top_k]] = -np.inf
    if top_p < 1:
        values[~_least_mass(-values, softmax(values), top_p)] = -np.inf
    if typical_p < 1:
        chances = softmax(values)
        with np.errstate(divide="ignore"):
            information = -np.log(chances)
        entropy = sum(chance * info for chance, info in zip(chances, information, strict=True) if chance > 0)
        values[~_least_mass(np.abs(information - entropy), chances, typical_p)] = -np.inf
    return values


def _least_mass(key: np.ndarray, chances: np.ndarray, mass: float) -> np.ndarray:
    """Tokens of the smallest keys whose chances together reach `mass`, with those of the same key as the last."""
    order = np.argsort(key, kind="stable")
    last = min(int((np.cumsum(chances[order]) < mass).sum()), len(key) - 1)
    return key <= key[order][last]


def softmax(values: np.ndarray) -> np.ndarray:
    """Returns probabilities; zeros where nothing is left."""
    if values.max() == -np.inf:
        return np.zeros_like(values)
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def margin(logits: np.ndarray, **options: float) -> float:
    """How far the limits of top_p and typical_p are from where one more or less token would be kept: the least distance
    between a limit and a cumulated probability, of a row that is processed by everything before them."""
    nearest = np.inf
    for name in ("top_p", "typical_p"):
        limit = options.get(name, 1.0)
        if limit == 1.0:
            continue
        later = {"top_p": ("top_p", "typical_p"), "typical_p": ("typical_p",)}[name]
        before = processed(logits, **{key: value for key, value in options.items() if key not in later})
        chances = softmax(before)
        key = -before
        if name == "typical_p":
            information = -np.log(np.where(chances > 0, chances, 1.0))
            key = np.where(chances > 0, np.abs(information - np.sum(chances * information)), np.inf)
        nearest = min(nearest, float(np.abs(np.cumsum(chances[np.argsort(key, kind="stable")]) - limit).min()))
    return nearest
