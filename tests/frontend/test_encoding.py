"""Texts in pieces: the token ids of the whole, and bounds that never refuse what would fit."""

import functools
import itertools
import random
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from jaxserve.config.id_checks import IDS_PER_PART
from jaxserve.frontend import tokenizer as tokenizer_module
from jaxserve.frontend import tokenizer_process
from jaxserve.frontend.encoding import PIECE_CHARACTERS, Encoder
from jaxserve.frontend.pattern import Pattern, UnsupportedError
from jaxserve.frontend.preparation_steps import finish
from jaxserve.frontend.token_bound import _SHRINKING, TokenBound
from jaxserve.frontend.tokenizer_process import CHARACTERS_PER_PART
from tests.budgets import budget
from tests.frontend.tokenizer_kinds import CORPUS, KINDS, LLAMA_3, PARTS, kind
from tests.frontend.tokenizers_for_tests import byte_fallback, byte_level, load, metaspace

TEXTS = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=60).map("".join),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=60),
    st.integers(0, len(CORPUS) // 10 - 100).map(lambda place: CORPUS[place : place + 100]),
)


def encode_in_pieces(encoder, text, add_special_tokens):
    pieces = list(encoder.pieces(text))
    if len(pieces) == 1:
        return encoder.encode(text, add_special_tokens)
    before, behind = encoder.around if add_special_tokens else ([], [])
    return [*before, *(token_id for piece, _ in pieces for token_id in encoder.encode(piece, False)), *behind]


@pytest.mark.parametrize("name", KINDS)
@budget(60)
@given(text=TEXTS, size=st.integers(1, 20), special=st.booleans())
def test_pieces_have_the_ids_of_the_whole(name, text, size, special):
    backend = kind(name)
    expected = backend.encode(text, add_special_tokens=special).ids
    assert encode_in_pieces(Encoder(backend, size), text, special) == expected


@functools.cache
def bound_of(name):
    return TokenBound(kind(name))


@pytest.mark.parametrize("name", KINDS)
@budget(60)
@given(text=TEXTS)
def test_no_text_has_fewer_tokens_than_the_bound_says(name, text):
    backend = kind(name)
    num_tokens, bound = len(backend.encode(text, add_special_tokens=False).ids), bound_of(name)
    assert num_tokens >= bound.of_text(text.encode()) >= bound.of_size(len(text.encode()))


@pytest.mark.parametrize(
    "name", [name for name in KINDS if name not in ("Unigram, bytes", "byte fallback, greedy tokens")]
)
def test_ordinary_text_is_cut_with_every_kind(name):
    lengths = [len(piece) for piece, _ in Encoder(kind(name), 200).pieces(CORPUS)]
    assert len(lengths) > 10
    assert max(lengths) < 500


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tiny", "x" * 300),
        ("tiny", "🍏" * 300),
        ("tiny", " \n" * 150),
        ("Llama 3", "没有空格，" * 60),
        ("Llama 3", "no_spaces(at,all)\n" * 20),
        ("Gemma", "x y" * 100),
    ],
)
def test_hostile_text_is_cut_where_that_is_safe(name, text):
    assert max(len(piece) for piece, _ in Encoder(kind(name), 50).pieces(text)) <= 50


def test_what_is_remembered_of_pairs_is_bounded(monkeypatch):
    monkeypatch.setattr("jaxserve.frontend.cuts._MAX_KNOWN", 50)
    encoder = Encoder(kind("Llama 3"), 10)
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))
    assert "".join(piece for piece, _ in encoder.pieces(text)) == text
    assert len(encoder._cuts._known) <= 50


def test_what_cannot_be_cut_stays_whole():
    """One word for the model, however long: BPE may merge anywhere in it."""
    text = "x" * 300 + " and " + "y" * 300
    pieces = [piece for piece, _ in Encoder(kind("Llama 3"), 100).pieces(text)]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) >= 300


def test_a_long_text_has_the_ids_of_one_call(tmp_path):
    tokenizer = load(tmp_path)
    text = "".join(random.Random(0).choices(PARTS, k=PIECE_CHARACTERS))
    assert len(text) > 2 * PIECE_CHARACTERS
    assert tokenizer.encode(text) == tokenizer._backend.encode(text).ids
    assert (
        tokenizer.encode(text, add_special_tokens=False)
        == tokenizer._backend.encode(text, add_special_tokens=False).ids
    )


def test_long_texts_are_encoded_in_a_process_of_their_own(tmp_path, caplog, monkeypatch):
    """With the same ids; here, where the process ends, and in a new one the next time."""
    monkeypatch.setattr(tokenizer_module, "LONG_TEXT", 5000)  # the process has little time on a busy machine
    tokenizer = load(tmp_path, byte_level())
    text, uncut = "größe 12, und 😀 noch eins. " * 3000, "x" * 5001
    expected = [tokenizer.encode(text), tokenizer.encode(uncut, add_special_tokens=False)]
    tokenizer.take_long_texts_apart()
    apart = tokenizer._process
    tokenizer.encode(text[:5000])
    assert apart._worker is None, "a process is there that no text needs"
    for _ in range(2):
        assert [tokenizer.encode(text), tokenizer.encode(uncut, add_special_tokens=False)] == expected
        first = apart._worker
        assert first is not None
        assert not caplog.text
        first._process.kill()
        first._process.wait()
        assert tokenizer.encode(text) == expected[0]
        assert "a long text is encoded here: the process for long texts ended with exit code -9" in caplog.text
        assert apart._worker not in (None, first)
        caplog.clear()


@pytest.mark.parametrize("skips", [True, False])
def test_long_ids_are_decoded_in_a_process_of_their_own(tmp_path, caplog, monkeypatch, skips):
    """With the same text; here, where the process ends, and in a new one the next time."""
    monkeypatch.setattr(tokenizer_module, "LONG_IDS", 5000)
    tokenizer = load(tmp_path, byte_level())
    ids = random.Random(0).choices(range(tokenizer.vocab_size), k=2 * IDS_PER_PART)
    expected = tokenizer._backend.decode(ids, skip_special_tokens=skips)
    assert tokenizer.decode(ids, skips) == expected
    tokenizer.take_long_texts_apart()
    tokenizer.decode(ids[:5000], skips)
    assert tokenizer._process._worker is None, "a process is there that no text needs"
    assert tokenizer.decode(ids, skips) == expected
    first = tokenizer._process._worker
    assert not caplog.text
    first._process.kill()
    first._process.wait()
    assert tokenizer.decode(ids, skips) == expected
    assert "a long text is decoded here: the process for long texts ended with exit code -9" in caplog.text
    assert tokenizer.decode(ids, skips) == expected
    assert tokenizer._process._worker not in (None, first)


@pytest.mark.parametrize("place", [0, 5, 70_000])
@pytest.mark.parametrize("wrong", [-7, 512, 2**31 - 1])
def test_arrays_of_ids_are_checked_and_decoded_as_lists(tmp_path, place, wrong):
    tokenizer = load(tmp_path, byte_level())
    ids = random.Random(0).choices(range(tokenizer.vocab_size), k=70_001)
    texts: list[str] = []
    finish(tokenizer.decode_steps(np.array(ids, np.int32), texts.append, 512))
    assert "".join(texts) == tokenizer._backend.decode(ids)
    ids[place] = wrong
    for given_ids in (ids, np.array(ids, np.int32)):
        with pytest.raises(ValueError, match=rf"^token_ids\[{place}\] is {wrong}; token ids must be from 0 to 511$"):
            finish(tokenizer.decode_steps(given_ids, texts.append, 512))


@pytest.mark.parametrize("apart", [False, True])
def test_ids_and_texts_come_in_parts_of_bounded_size(tmp_path, monkeypatch, apart):
    monkeypatch.setattr(tokenizer_module, "LONG_TEXT", 5000)
    monkeypatch.setattr(tokenizer_module, "LONG_IDS", 5000)
    tokenizer = load(tmp_path, byte_level())
    text = "🍏o" * 40_000
    if apart:
        tokenizer.take_long_texts_apart()
    parts: list[list[int]] = []
    finish(tokenizer.encode_steps(text, lambda ids, _: parts.append(ids)))
    ids = list(itertools.chain(*parts))
    assert ids == tokenizer._backend.encode(text).ids
    assert max(map(len, parts)) == IDS_PER_PART
    texts: list[str] = []
    finish(tokenizer.decode_steps(ids, texts.append))
    assert "".join(texts) == text
    assert max(map(len, texts)) == CHARACTERS_PER_PART
    assert (tokenizer._process is not None and tokenizer._process._worker is not None) == apart


def test_long_texts_are_encoded_here_where_no_process_starts(tmp_path, caplog, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no process")

    tokenizer = load(tmp_path, byte_level())
    text = "one, two. " * 30_000
    expected = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_process, "WorkerProcess", refuse)
    tokenizer.take_long_texts_apart()
    for _ in range(2):
        assert tokenizer.encode(text) == expected
    assert caplog.text.count("long texts are encoded and decoded here: their process does not start: no process") == 1


def test_the_rest_of_the_text_is_told_with_each_step(tmp_path):
    tokenizer = load(tmp_path)
    told = []
    steps = tokenizer.encode_steps("xyz" * PIECE_CHARACTERS, lambda ids, rest: told.append((len(ids), rest)))
    sizes = list(steps)
    assert max(sizes) <= PIECE_CHARACTERS
    assert told[0] == (0, -(-3 * PIECE_CHARACTERS // 5))
    assert told[1] == (0, 3 * PIECE_CHARACTERS)  # none of these letters is in a longer token
    assert [rest for _, rest in told[1:]] == sorted((rest for _, rest in told[1:]), reverse=True)
    assert sum(count for count, _ in told) == 3 * PIECE_CHARACTERS + 1  # and <bos>


def longest_silence(work):
    """The longest time that another thread did not get to run while `work` ran, and how long that took."""
    done, silence = threading.Event(), 0.0

    def run():
        work()
        done.set()

    thread = threading.Thread(target=run)
    begin = last = time.perf_counter()
    thread.start()
    while not done.is_set():
        time.sleep(0.0005)
        now = time.perf_counter()
        silence, last = max(silence, now - last), now
    thread.join()
    return silence, now - begin


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_other_threads_run_meanwhile(tmp_path, what):
    tokenizer = load(tmp_path)
    ids = tokenizer.encode("a b" * 400_000)
    work = {"encode": lambda: tokenizer.encode("a b" * 400_000), "decode": lambda: tokenizer.decode(ids)}[what]
    shares = []
    for _ in range(3):  # a busy machine may stop us at any time
        silence, whole = longest_silence(work)
        shares.append(silence / whole)
    assert min(shares) < 0.5


# ---- the bound -------------------------------------------------------------------------------------------------------


def with_normalizer(normalizer):
    tokenizer = byte_level()
    tokenizer.normalizer = normalizer
    return tokenizer


def with_split(pre_tokenizer):
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer, pre_tokenizers.ByteLevel(use_regex=False)])
    return tokenizer


def with_added(**flags):
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("mask", **flags)])
    return tokenizer


def longest(backend):
    return TokenBound(backend).bytes_per_token


def test_the_bound_is_the_longest_token():
    assert longest(byte_level(added=())) == 5  # <pad>, <bos>, <eos>
    assert longest(byte_level(added=("é" * 20,))) == 40
    assert longest(byte_fallback()) == 6  # <0x41>, as long as a text of it that is no byte


@pytest.mark.parametrize(
    "backend",
    [
        with_normalizer(normalizers.Strip()),
        with_normalizer(normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])),
        with_normalizer(normalizers.Sequence([normalizers.ByteLevel(), normalizers.Lowercase()])),
        with_normalizer(normalizers.Replace("  ", " ")),
        with_normalizer(normalizers.Replace(Regex(" +"), " ")),
        with_normalizer(normalizers.StripAccents()),
        with_split(pre_tokenizers.WhitespaceSplit()),
        with_split(pre_tokenizers.Split(" ", "removed")),
        with_split(pre_tokenizers.Punctuation("removed")),
        with_added(lstrip=True),
        with_added(rstrip=True),
        metaspace(),
        Tokenizer(models.BPE(vocab={"a": 0}, merges=[])),
        Tokenizer(models.BPE(vocab={"a": 0, "?": 1}, merges=[], unk_token="?", fuse_unk=True)),
        kind("WordPiece"),
        kind("WordLevel"),
        kind("Unigram"),
    ],
)
def test_no_bound_where_text_can_vanish(backend):
    assert longest(backend) is None
    assert TokenBound(backend).of_size(10**9) == TokenBound(backend).of_text(b"x" * 1000) == 0


def test_letters_count_by_the_longest_token_that_they_are_in():
    """A token of eighty spaces says nothing of letters."""
    bound = TokenBound(byte_level(added=(" " * 80, "klmn")))
    assert bound.of_size(800) == 10
    assert bound.of_text(b"k" * 800) == 200
    assert bound.of_text(b"x" * 800) == 800
    assert bound.of_text(b"x" * 400 + b" " * 80 + b"nmlk" * 10) == 411
    assert bound.of_text("好".encode() * 100_000) == 300_000


SHRINKING = (
    *("\u212a", "\u1fef", "\u1fbe\u0308\u0301", "\u1100\u1161\u11a8", "\u1f82", "\ufb03", "\U0001f149"),
    "\u2126\u0313\u0342\u0345",
)
"""What normal forms and lower case make much shorter."""


@pytest.mark.parametrize("name", ["Qwen", "NFD", "NFKC, lowercase", "NFKD, byte fallback"])
@budget(60)
@given(
    text=st.lists(st.sampled_from([*SHRINKING, " ", "a", "é", "K"]), max_size=60).map("".join),
    number=st.integers(1, 9),
)
def test_the_bound_holds_for_what_normal_forms_shorten(name, text, number):
    text *= number
    assert bound_of(name).bytes_per_token
    num_tokens = len(kind(name).encode(text, add_special_tokens=False).ids)
    assert num_tokens >= bound_of(name).of_text(text.encode()) >= bound_of(name).of_size(len(text.encode()))


@pytest.mark.parametrize("text", SHRINKING)
@pytest.mark.parametrize("form", _SHRINKING)
def test_a_token_of_a_shortened_text_is_within_the_bound(form, text):
    """The whole normalized text is one token."""
    backend = with_normalizer(getattr(normalizers, form)())
    backend.add_tokens([AddedToken(backend.normalizer.normalize_str(text * 30), normalized=True)])
    assert len(backend.encode(text * 30, add_special_tokens=False).ids) == 1
    assert TokenBound(backend).of_text((text * 30).encode()) == 1


def test_no_character_is_shortened_more_than_the_bound_allows():
    """Each character that a form leaves is given all bytes that could have become it, in every version of Unicode.

    A character of a decomposition has the largest share of a character that decomposes to it and others. A text, its
    decomposition and its composition have the same decomposition, up to order, so these shares add up to its bytes.
    """
    planes = (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000))  # the others have no characters
    characters = list(map(chr, planes))
    for decompose, compose in (("NFD", "NFC"), ("NFKD", "NFKC")):
        decomposed = dict(
            zip(characters, map(getattr(normalizers, decompose)().normalize_str, characters), strict=True)
        )
        shares: dict[str, float] = {}
        for character, parts in decomposed.items():
            for part in parts:
                shares[part] = max(shares.get(part, 0.0), size(character) / len(parts))
        most = max(share / size(part) for part, share in shares.items())
        assert _SHRINKING[decompose] - 1 < most <= _SHRINKING[decompose]
        form = getattr(normalizers, compose)()
        most = max(
            sum(map(shares.__getitem__, parts)) / size(character)
            for character, parts in decomposed.items()
            if len(parts) == 1 or form.normalize_str(character) == character
        )
        assert _SHRINKING[compose] - 1 < most <= _SHRINKING[compose]
    lower = normalizers.Lowercase().normalize_str
    assert max(size(character) / size(lower(character)) for character in characters) == _SHRINKING["Lowercase"]


def size(text):
    return len(text.encode())


def test_a_normal_form_leaves_ascii_to_its_letters():
    backend = with_normalizer(normalizers.NFC())
    backend.add_tokens([" " * 80])
    bound = TokenBound(backend)
    assert bound.bytes_per_token == 320
    assert bound.of_text(b"x" * 800) == 800
    assert bound.of_text(b"x" * 797 + "好".encode()) == 3
    assert longest(with_normalizer(normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()]))) == 45


# ---- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "left", "right", "joined"),
    [
        (LLAMA_3, "a", " ", False),
        (LLAMA_3, "a", "\n", False),
        (LLAMA_3, "a", "b", True),
        (LLAMA_3, ".", "\n", True),
        (LLAMA_3, "1", "2", True),
        (LLAMA_3, " ", "b", True),
        (LLAMA_3, "S", "'", False),
        (LLAMA_3, "'", "s", True),
        (r"a(?=b)c", "a", "b", True),
        (r"(?:ab)+", "b", "a", True),
        (r"(?:ab)?c", "b", "a", False),
        (r"a{1}b", "a", "a", False),
        (r"a{2,}", "a", "a", True),
        (r"a\.b", "a", ".", True),
        (r"a\.b", "a", "x", False),
        (r"[\]a-c-]x", "]", "x", True),
        (r"[\]a-c-]x", "-", "x", True),
        (r"[^\W\d_]x", "1", "x", False),
        (r"\x41\u0042", "A", "B", True),
        (r"(?i:s)x", "ß", "x", True),
        (r"(?i:s)x", "é", "x", False),
        (r"(?i:s)x", "ſ", "x", True),
        (r"\p{Han}x", "好", "x", True),
    ],
)
def test_which_characters_a_match_takes_in_a_row(pattern, left, right, joined):
    assert Pattern(pattern).joins(left, right) is joined


@pytest.mark.parametrize(
    ("pattern", "character", "starts"),
    [
        (LLAMA_3, " ", True),
        (LLAMA_3, "\n", True),
        (LLAMA_3, "a", True),
        (r"\s+(?!\S)", " ", False),
        (r"ab", "a", False),
        (r"a*+a|b", "a", False),
        (r"a?b", "b", True),
        (r"a{2}", "a", False),
        (r"\p{Han}", "好", False),
    ],
)
def test_where_a_match_certainly_starts(pattern, character, starts):
    assert Pattern(pattern).starts_with(character) is starts


@pytest.mark.parametrize(
    "pattern",
    [r"^a", r"a$", r"\ba", r"(?<=a)b", r"(a)\1", r"a*", r"[a[bc]]", r"[a&&b]", r"(a", r"a)", r"(?i)a", r"\h", "[a"],
)
def test_what_is_not_understood_is_not_guessed(pattern):
    with pytest.raises(UnsupportedError):
        Pattern(pattern)


def test_a_pattern_that_is_not_understood_leaves_texts_whole():
    backend = with_split(pre_tokenizers.Split(Regex(r"\bx"), "isolated"))
    assert [piece for piece, _ in Encoder(backend, 10).pieces("a b c " * 20)] == ["a b c " * 20]
