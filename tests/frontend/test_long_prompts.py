"""Long prompts are refused by their size, and what clients send never makes a message long."""

import math
import re
from collections.abc import Sequence

import pytest
from tokenizers import normalizers

from jaxserve.frontend.delta import DeadlineError, DuplicateRequestError
from jaxserve.frontend.encoding import PIECE_CHARACTERS, Encoder
from jaxserve.frontend.frontend import FrontEnd
from jaxserve.request_checks import InfeasibleError
from jaxserve.sampling_params import SamplingParams
from tests.frontend.fakes import HandPlayedEngine, asked
from tests.frontend.tokenizers_for_tests import byte_level, load, metaspace

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine():
    return HandPlayedEngine()


@pytest.fixture
def front_end(engine, tokenizer):
    return FrontEnd(engine, tokenizer)


class Untouched(Sequence):
    """A list of token ids whose length may be asked, and nothing else."""

    def __init__(self, length):
        self._length = length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        raise AssertionError("a token id was looked at")


@pytest.fixture
def encoded(monkeypatch):
    """The texts that were encoded, piece by piece."""
    texts, parts = [], Encoder.parts

    def record(self, text, add_special_tokens, apart=None):
        texts.append(text)
        return parts(self, text, add_special_tokens)

    monkeypatch.setattr(Encoder, "parts", record)
    return texts


@pytest.mark.parametrize("length", [10**6, 64, 4 * 10**6])
def test_the_number_of_token_ids_is_looked_at_before_them(front_end, length):
    with pytest.raises(ValueError, match=f"^prompt has {length} tokens; with at least one output token"):
        front_end.submit(Untouched(length), GREEDY)


@pytest.mark.parametrize(
    "text", ["word " * 10_000, "x" * 50_000, "🍏" * 20_000, "\n" * 50_000], ids=["words", "x", "🍏", "lines"]
)
def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(front_end, encoded, text):
    with pytest.raises(
        ValueError, match=r"^prompt has \d+ characters, at least \d+ tokens; with at least one"
    ) as caught:
        front_end.submit(text, GREEDY)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    assert least >= len(text) // 5  # the longest token, <pad>, has five bytes
    assert not encoded


@pytest.mark.parametrize("text", ["a" * 2**22, "好" * 2**20, "\u1fbe\u0308\u0301" * 2**19], ids=["a", "好", "ΐ"])
@pytest.mark.parametrize("form", [normalizers.NFC(), normalizers.NFKC()], ids=["NFC", "NFKC"])
def test_under_a_normal_form_what_cannot_fit_is_refused_unencoded_too(engine, tmp_path, encoded, form, text):
    backend = byte_level()
    backend.normalizer = form
    front_end = FrontEnd(engine, load(tmp_path, backend))
    with pytest.raises(ValueError, match=f"^prompt has {len(text)} characters, at least [0-9]+ tokens; "):
        front_end.submit(text, GREEDY)
    assert not encoded


def test_without_a_bound_encoding_ends_with_the_first_piece_too_many(engine, tmp_path, encoded):
    front_end = FrontEnd(engine, load(tmp_path, metaspace()))
    text = "ab ac " * (5 * PIECE_CHARACTERS)
    with pytest.raises(ValueError, match=f"^prompt has {len(text)} characters, at least [0-9]+ tokens; "):
        front_end.submit(text, GREEDY)
    assert len(encoded) == 1


def test_max_tokens_and_the_pool_count_for_a_text_that_is_not_encoded(tmp_path, tokenizer, encoded):
    params = SamplingParams(max_tokens=60_000)
    front_end = FrontEnd(HandPlayedEngine(max_model_len=100_000, max_prompt_len=100_000), tokenizer)
    with pytest.raises(ValueError, match=r"tokens and max_tokens is 60000; together at least 100001 exceed max_model_"):
        front_end.submit("x" * 200_001, params)
    with pytest.raises(
        InfeasibleError, match=r"at least 2000 tokens and max_tokens is 60000; together at least 62000 ex"
    ):
        front_end.submit("x" * 10_000, params)
    assert not encoded


def test_what_is_refused_anyway_is_not_encoded(front_end, encoded, tokenizer):
    front_end = FrontEnd(HandPlayedEngine(max_model_len=10**6, max_prompt_len=10**6, usable_pages=10**6), tokenizer)
    front_end.submit([5], GREEDY, request_id="a")
    text = "x" * 10_000
    for options, kind in (({"request_id": "a"}, DuplicateRequestError), ({"deadline": 1.0}, DeadlineError)):
        with pytest.raises(kind):
            front_end.submit(text, GREEDY, **asked(**options))
    for options in ({"tenant": "x" * 257}, {"priority": 2**40}, {"deadline": math.nan}):
        with pytest.raises(ValueError, match=next(iter(options))):
            front_end.submit(text, GREEDY, **asked(**options))
    assert not encoded
    front_end.submit(text, GREEDY)
    assert encoded == [text]


@pytest.mark.parametrize(
    "options",
    [
        {"deadline": -1e308},
        {"deadline": -(10**300)},
        {"deadline": 10**400},
        {"deadline": -(10**400)},
        {"deadline": "x" * 1_000_000},
        {"priority": 10**400},
        {"priority": "x" * 1_000_000},
        {"request_id": "x" * 1_000_000},
        {"request_id": ["x" * 1_000_000]},
        {"tenant": "\ud800" * 256},
        {"cache_salt": {"x" * 1_000_000: 1}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_messages_are_short_whatever_was_sent(front_end, engine, options):
    with pytest.raises((ValueError, DeadlineError), match=next(iter(options))) as caught:
        front_end.submit([5], GREEDY, **asked(**options))
    assert len(str(caught.value)) < 300
    assert not engine.sent


@pytest.mark.parametrize(
    "token_id", ["x" * 1_000_000, 10**400, [0] * 1_000_000, -1e308], ids=["text", "number", "list", "float"]
)
def test_a_faulty_token_id_is_shown_in_short(front_end, token_id):
    with pytest.raises(ValueError, match=r"^prompt_token_ids\[1\] is ") as caught:
        front_end.submit([5, token_id], GREEDY)
    assert len(str(caught.value)) < 300
