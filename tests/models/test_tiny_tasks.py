"""The default model's tasks, tokenizer, packing and shipped files."""

import json
import pathlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from jaxserve.models.tiny.data import Mixer, held_out_batches, largest_size, make_example, make_lookup_lesson
from jaxserve.models.tiny.tasks import KINDS, MAX_SIZE, generate, generate_split, is_held_out
from jaxserve.models.tiny.tiny_tokenizer import BOS_ID, EOS_ID, FIRST_BYTE_ID, VOCAB_SIZE, build_tokenizer, encode_fast
from jaxserve.models.tiny.words import EMOJI, KEY_WORDS
from tests.budgets import budget

CHECKPOINT = pathlib.Path(__file__).parents[2] / "models" / "tiny" / "checkpoint"
TOKENIZER = build_tokenizer()

seeds = st.integers(0, 2**32)
kinds = st.sampled_from(KINDS)


def draw(kind: str, seed: int) -> tuple[str, str]:
    rng = random.Random(seed)
    return generate(kind, rng, rng.randint(1, MAX_SIZE[kind]))


@given(kinds, seeds)
def test_generate_is_deterministic(kind, seed):
    assert draw(kind, seed) == draw(kind, seed)


@given(seeds)
def test_copy_and_reverse_repeat_the_text(seed):
    prompt, answer = draw("copy", seed)
    assert prompt == f"copy: {answer}\n"
    prompt, answer = draw("reverse", seed)
    assert prompt == f"reverse: {answer[::-1]}\n"


@given(st.integers(1, MAX_SIZE["copy"]), seeds)
def test_copy_size_is_bytes(size, seed):
    _, answer = generate("copy", random.Random(seed), size)
    assert len(answer.encode()) == size
    assert answer == answer.strip()
    assert "\n" not in answer


@given(seeds)
def test_sort_orders_the_letters(seed):
    prompt, answer = draw("sort", seed)
    text = prompt.removeprefix("sort: ").rstrip("\n")
    assert list(answer) == sorted(text)


@given(seeds)
def test_add_is_the_sum(seed):
    prompt, answer = draw("add", seed)
    left, right = prompt.removeprefix("add: ").rstrip("\n").split("+")
    assert int(left) + int(right) == int(answer)


@given(seeds)
def test_count_runs_from_first_to_last(seed):
    prompt, answer = draw("count", seed)
    first, last = map(int, prompt.removeprefix("count: ").split(" to "))
    assert [int(word) for word in answer.split()] == list(range(first, last + 1))
    assert last < 1000


@given(seeds)
def test_json_holds_the_fields_in_order(seed):
    prompt, answer = draw("json", seed)
    fields = [field.split(": ") for field in prompt.removeprefix("json: ").rstrip("\n").split(", ")]
    assert [[key, str(value)] for key, value in json.loads(answer).items()] == fields


@given(seeds)
def test_lookup_answers_with_the_value_of_the_key(seed):
    prompt, answer = draw("lookup", seed)
    table, _, query = prompt.partition("\n?")
    pairs = dict(pair.split("=") for pair in table.removeprefix("lookup:").split())
    assert answer == f"={pairs[query.strip()]}"
    assert len(encode_fast(query)) == len(encode_fast(answer)) == 1


@pytest.mark.parametrize("size", [0, MAX_SIZE["add"] + 1])
def test_a_size_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match=f"size is {size}; for add"):
        generate("add", random.Random(0), size)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind is 'divide'"):
        generate("divide", random.Random(0), 1)


@given(kinds, seeds, st.booleans())
def test_splits_are_disjoint_by_construction(kind, seed, held_out):
    rng = random.Random(seed)
    prompt, _ = generate_split(kind, rng, rng.randint(1, MAX_SIZE[kind]), held_out)
    assert is_held_out(prompt) == held_out


@given(seeds)
def test_the_split_of_a_lookup_is_that_of_its_table(seed):
    prompt, _ = draw("lookup", seed)
    assert is_held_out(prompt) == is_held_out(prompt.partition("\n")[0] + "\n? amber")


def test_training_draws_nothing_held_out():
    mixer = Mixer(random.Random(1), dict.fromkeys(KINDS, 1.0), MAX_SIZE, 384)
    for _ in range(1000):
        example = mixer.draw()
        prompt = TOKENIZER.decode(example.ids[1:], skip_special_tokens=False).partition("\n")[0]
        assert not is_held_out(prompt)


@given(st.text())
@budget(300)
def test_any_text_round_trips(text):
    specials = ("<pad>", "<bos>", "<eos>")
    if not any(special in text for special in specials):
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@given(kinds, seeds)
def test_the_fast_encoder_equals_the_tokenizer(kind, seed):
    prompt, answer = draw(kind, seed)
    assert TOKENIZER.encode(prompt).ids == [BOS_ID, *encode_fast(prompt)]
    assert TOKENIZER.encode(answer, add_special_tokens=False).ids == encode_fast(answer)


@given(st.text(alphabet="abr =019:cdopy\némn😀", max_size=40))
def test_the_fast_encoder_equals_the_tokenizer_on_odd_texts(text):
    assert TOKENIZER.encode(text).ids == [BOS_ID, *encode_fast(text)]


@pytest.mark.parametrize("emoji", EMOJI)
def test_an_emoji_is_its_four_bytes(emoji):
    ids = TOKENIZER.encode(emoji, add_special_tokens=False).ids
    assert ids == [byte + FIRST_BYTE_ID for byte in emoji.encode()]
    assert len(ids) == 4


def test_words_and_values_are_single_tokens():
    for text in (*(f" {word}" for word in KEY_WORDS), "=00", "=99", "copy:", "lookup:"):
        assert len(TOKENIZER.encode(text, add_special_tokens=False).ids) == 1
    assert TOKENIZER.get_vocab_size() == VOCAB_SIZE == 512


@given(kinds, seeds, st.sampled_from([128, 256, 384]))
def test_the_largest_size_fits_a_row(kind, seed, length):
    example = make_example(kind, random.Random(seed), largest_size(kind, length), held_out=False)
    assert len(example.ids) - 1 <= length
    assert len(example.ids) == len(example.weights)
    assert example.weights[-1] > 0
    assert example.ids[-1] == EOS_ID


@given(seeds)
def test_a_lookup_lesson_has_weight_on_values_only(seed):
    rng = random.Random(seed)
    size = rng.randint(1, 40)
    example = make_lookup_lesson(rng, size, rng.randint(1, size))
    weighted = [token for token, weight in zip(example.ids, example.weights, strict=True) if weight]
    assert weighted[-1] == EOS_ID
    assert all(TOKENIZER.id_to_token(token).startswith("=") for token in weighted[:-1])


def test_packed_rows_hold_every_example_once():
    batch = Mixer(random.Random(2), dict.fromkeys(KINDS, 1.0), MAX_SIZE, 384).batch(8)
    assert (batch.segments > 0).mean() > 0.9
    for row in range(8):
        for segment in range(1, len(batch.kinds[row]) + 1):
            where = batch.segments[row] == segment
            assert np.array_equal(batch.positions[row][where], np.arange(where.sum()))
            assert batch.tokens[row][where][0] == BOS_ID
            assert np.array_equal(batch.tokens[row][where][1:], batch.targets[row][where][:-1])
            assert batch.targets[row][where][-1] == EOS_ID


def test_held_out_batches_cover_every_kind():
    counts, texts = dict.fromkeys(KINDS, 0), set()
    for batch in held_out_batches(0, MAX_SIZE, 5, 4, 384):
        for row, kinds_of_row in enumerate(batch.kinds):
            for segment, kind in enumerate(kinds_of_row, start=1):
                counts[kind] += 1
                text = TOKENIZER.decode(batch.tokens[row][batch.segments[row] == segment].tolist())
                assert is_held_out(text)
                texts.add(text)
    assert counts == dict.fromkeys(KINDS, 5)
    assert len(texts) == 5 * len(KINDS)


def test_the_shipped_model_is_small():
    files = [path for path in CHECKPOINT.iterdir() if path.is_file()]
    assert {path.name for path in files} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    with safe_open(CHECKPOINT / "model.safetensors", framework="numpy") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    assert sum(int(np.prod(shape)) for shape in shapes) <= 2_000_000


def test_the_shipped_tokenizer_is_the_built_one():
    assert json.loads(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).to_str()) == json.loads(
        TOKENIZER.to_str()
    )
