"""Turns bad words, which are texts, into the token sequences that a request's output must not have."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.config.shown import shown
from jaxserve.frontend.tokenizer import Tokenizer


def bad_words_token_ids(
    bad_words: Sequence[str], tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """Returns the token sequences of bad words, as vLLM makes them: of each text as it begins an output, and, where
    that is another token sequence as long, of the text after a space.

    Raises ValueError where a text has no tokens, or ones that the model does not have, or nothing can encode it.
    """
    if bad_words and tokenizer is None:
        raise ValueError("bad_words needs text, and this server has no tokenizer; use logit_bias or allowed_token_ids")
    found: list[tuple[int, ...]] = []
    for word in bad_words:
        assert tokenizer is not None
        bare = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        if not bare:
            raise ValueError(f"bad_words has {shown(word)}, which is no token; leave it out")
        spaced = tuple(tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False))
        found.append(bare)
        if spaced and spaced[0] != bare[0] and len(spaced) == len(bare):
            found.append(spaced)
        if (largest := max(*bare, *spaced)) >= vocab_size:
            raise ValueError(
                f"bad_words has {shown(word)} with token {largest}; the model has token ids from 0 to {vocab_size - 1}"
            )
    return tuple(dict.fromkeys(found))
