"""The default model's tokenizer: bytes, plus a few whole words that the tasks are written in.

Every text round-trips, because the base vocabulary is the 256 bytes and nothing is merged: an ASCII letter is one
token, an emoji four. Task markers, lookup keys (with the space before them) and two-digit values are single tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from jaxserve.models.tiny.tasks import KINDS
from jaxserve.models.tiny.words import KEY_WORDS

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
FIRST_BYTE_ID = 3
WHOLE_TOKENS: tuple[str, ...] = (
    *(f"{kind}:" for kind in KINDS),
    *(f" {word}" for word in KEY_WORDS),
    *(f"={value:02d}" for value in range(100)),
)
FIRST_WHOLE_ID = FIRST_BYTE_ID + 256
VOCAB_SIZE = FIRST_WHOLE_ID + len(WHOLE_TOKENS)

CHAT_TEMPLATE = (
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% if not users %}{{ raise_exception('messages need one of role user: its content is the task') }}{% endif %}"
    "{% set task = users[-1]['content'].rstrip('\\r\\n') %}"
    "{{ bos_token }}{{ task }}"
    "{% if add_generation_prompt and not task.startswith('lookup:') %}{{ '\\n' }}{% endif %}"
)
"""The last message of the user is the task, as in training: a line, or a lookup, which ends with its key. The model
knows no conversation, so nothing else of one counts."""


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary, in byte order (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def build_tokenizer() -> Tokenizer:
    """A `tokenizers.Tokenizer` with VOCAB_SIZE tokens; `<bos>` is put in front of every encoded text."""
    vocab = {PAD: PAD_ID, BOS: BOS_ID, EOS: EOS_ID}
    vocab |= {symbol: FIRST_BYTE_ID + byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in WHOLE_TOKENS])
    return tokenizer


WHOLE_IDS: Mapping[str, int] = {text: FIRST_WHOLE_ID + i for i, text in enumerate(WHOLE_TOKENS)}
# The leftmost, then longest match, which is how the tokenizer finds added tokens.
_WHOLE = re.compile("(" + "|".join(re.escape(text) for text in sorted(WHOLE_TOKENS, key=len, reverse=True)) + ")")


def encode_fast(text: str) -> list[int]:
    """Token ids of `text` without `<bos>`: what the tokenizer gives, without its overhead (a test compares them).

    Texts that spell out `<pad>`, `<bos>` or `<eos>` are not supported: the generators write none.
    """
    ids: list[int] = []
    for i, piece in enumerate(_WHOLE.split(text)):
        if i % 2:
            ids.append(WHOLE_IDS[piece])
        else:
            ids.extend(byte + FIRST_BYTE_ID for byte in piece.encode())
    return ids
