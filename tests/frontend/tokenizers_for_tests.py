"""Small tokenizers built in place: a byte-level one (GPT-2, Llama 3), sentencepiece's (Llama 2, Gemma), others."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.frontend.tokenizer import Tokenizer as CheckpointTokenizer

BOS, EOS = 1, 2


def byte_level(added=(" word", "=07", "é")):
    """<pad>, <bos>, <eos>, the 256 bytes from id 3, then `added`; an emoji is four tokens."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<bos>": BOS, "<eos>": EOS} | {symbol: 3 + index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return tokenizer


def byte_fallback(decoder=None, special=()):
    """Llama 2's shape: ▁ for a space, byte tokens (ids from 3) for what has no token of its own; `special` behind."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcé", "ab", "▁ab", "▁▁", "<0x4>"]
    merges = [("a", "b"), ("▁", "ab"), ("▁", "▁")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *special])
    return tokenizer


def metaspace(scheme="always"):
    """Unigram with the Metaspace decoder, without byte fallback."""
    pieces = ["<unk>", "</s>", *"▁abcé", "ab", "▁ab", "▁▁", "b▁", "�"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(len(pieces) - len(piece))) for piece in pieces], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def words(decoder, pieces, special=("[PAD]", "[CLS]", "[SEP]")):
    """Whole tokens and the decoder that is to be tried (WordPiece, CTC, BPEDecoder and the like)."""
    vocab = {piece: index for index, piece in enumerate((*special, *pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def save(directory, tokenizer, **config):
    """Writes a tokenizer as a checkpoint directory holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def load(directory, tokenizer=None, **config):
    """The tokenizer as the front end loads it."""
    return CheckpointTokenizer(save(directory, tokenizer or byte_level(), **config))
