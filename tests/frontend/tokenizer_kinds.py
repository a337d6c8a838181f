"""Tokenizers of every kind that checkpoints hold, trained in a moment on a few sentences in several scripts."""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxserve.models.tiny.tiny_tokenizer import build_tokenizer
from tests.frontend.tokenizers_for_tests import byte_fallback, byte_level, metaspace

CORPUS = (
    "The quick brown fox jumps over the lazy dog, and it's 12,345.67 times as fast as they'll say.\n\n"
    "    def f(x):\n        return x ** 2  # a comment\n\tprint('hello', \"world\")\r\n"
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Ça va? Où est-ce, déjà vu!\n"
    "日本語のテキスト。これは試験です！中文文本，没有空格。한국어 문장입니다.\n"
    "Съешь же ещё этих мягких французских булок, да выпей чаю... 🍏🍏\n"
) * 10

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _regex_bpe(*patterns: str, normalizer: object = None) -> Tokenizer:
    """Bytes, split by regular expressions: Llama 3, Qwen, gpt-oss, DeepSeek."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>"]
    tokenizer.train_from_iterator(
        [CORPUS],
        trainers.BpeTrainer(
            vocab_size=500,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=special,
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[(token, index) for index, token in enumerate(special)]
    )
    return tokenizer


def _sentencepiece_bpe(normalizer: object, pre_tokenizer: object = None, words: bool = True) -> Tokenizer:
    """Characters with byte tokens for the rest: Llama 2, Gemma."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700, limit_alphabet=60, special_tokens=["<unk>", "<s>", *_BYTES], show_progress=False
    )
    tokenizer.train_from_iterator([" " + word for word in CORPUS.split(" ")] if words else [CORPUS], trainer)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def _with_greedy_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Added tokens that take whitespace beside them, or that stand for whole words alone."""
    tokenizer.add_tokens(
        [
            AddedToken("foo", lstrip=True, normalized=False),
            AddedToken("bar", rstrip=True),
            AddedToken("the", single_word=True),
            AddedToken(" a", normalized=False),
        ]
    )
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def _word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False, n_sub_iterations=1
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def _unigram_bytes() -> Tokenizer:
    """Unigram with a token for every byte, over the whole text as one word."""
    pieces = [
        ("<unk>", 0.0),
        *((byte, -20.0) for byte in _BYTES),
        *((piece, -3.0) for piece in "▁abcdefghi"),
        ("▁a", -2.0),
    ]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("▁a", -2.0)], unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


_LLAMA_2 = (normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"))

KINDS = {
    "tiny": build_tokenizer,
    "byte level": byte_level,
    "Llama 3": lambda: _regex_bpe(LLAMA_3),
    "Qwen": lambda: _regex_bpe(LLAMA_3.replace("{1,3}", ""), normalizer=normalizers.NFC()),
    "NFD": lambda: _regex_bpe(LLAMA_3, normalizer=normalizers.NFD()),
    "NFKC, lowercase": lambda: _regex_bpe(
        LLAMA_3, normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "NFKD, byte fallback": lambda: _sentencepiece_bpe(
        normalizers.Sequence([normalizers.NFKD(), normalizers.Replace(" ", "▁")])
    ),
    "o200k": lambda: _regex_bpe(O200K),
    "DeepSeek": lambda: _regex_bpe(*DEEPSEEK),
    "Llama 2": lambda: _sentencepiece_bpe(normalizers.Sequence(list(_LLAMA_2))),
    "Llama 2, Metaspace": lambda: _sentencepiece_bpe(
        normalizers.Sequence([]), pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
    "Gemma": lambda: _sentencepiece_bpe(
        normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")
    ),
    "byte fallback": byte_fallback,
    "Unigram": _unigram,
    "Unigram, bytes": _unigram_bytes,
    "Metaspace, first": lambda: metaspace("first"),
    "Metaspace, never": lambda: metaspace("never"),
    "WordPiece": _word_piece,
    "WordLevel": _word_level,
    "Llama 3, greedy tokens": lambda: _with_greedy_tokens(_regex_bpe(LLAMA_3)),
    "byte fallback, greedy tokens": lambda: _with_greedy_tokens(byte_fallback()),
}
"""A function that makes a tokenizer of each kind."""

PARTS = (
    *" \n\t\r'.,abcxyzABC019_-/éñ好日。、のカ한글\u0301\u200b▁😀\0ǅſİ�\u0085\u2028",
    *(
        "foo",
        "bar",
        "the",
        " a",
        "<|bos|>",
        "</s>",
        "<bos>",
        "=07",
        " word",
        "'s",
        "'LL",
        "  ",
        "\n\n",
        "<0x41>",
        "123",
    ),
    *("The quick", " brown fox", "日本語", "déjà", "булок", "    ", "\r\n", "lookup: ", "#", "123", " it's"),
)
"""Parts of texts, among them what the steps of these tokenizers treat in ways of their own."""


@functools.cache
def kind(name: str) -> Tokenizer:
    """The tokenizer of a kind, made once."""
    return KINDS[name]()
