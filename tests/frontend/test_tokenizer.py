"""The tokenizer of a checkpoint directory, and every way in which it may be missing or corrupt."""

import json
import re
import subprocess
import sys

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from jaxserve.config.settings import EngineConfig
from jaxserve.frontend.tokenizer import Tokenizer, load_tokenizer
from tests.frontend.tokenizers_for_tests import BOS, byte_fallback, byte_level, load, save
from tests.models.checkpoints import write_files

CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


def test_encode_adds_what_the_post_processor_adds(tokenizer):
    ids = tokenizer.encode("ab")
    assert ids[0] == BOS
    assert len(ids) == 3
    assert tokenizer.encode("ab", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<bos>ab"


@pytest.mark.parametrize("text", ["", "\0", "a\0b\0", "🍏 zwölf\r\n", " word=07"])
def test_texts_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_detokenizer_speaks_the_same_language(tokenizer):
    detokenizer = tokenizer.detokenizer()
    ids = tokenizer.encode("🍏\0 word")
    assert "".join(detokenizer.add([token_id]) for token_id in ids) + detokenizer.finish() == "🍏\0 word"


def test_prompt_and_output_are_what_transformers_decodes(tmp_path):
    backend = byte_fallback(special=("<|im_end|>",))
    tokenizer = load(tmp_path, backend, bos_token="<s>", eos_token="</s>")
    fast = PreTrainedTokenizerFast.from_pretrained(str(tmp_path), local_files_only=True)
    ids = [1, *tokenizer.encode("ab 🍏 é"), backend.token_to_id("<|im_end|>"), *tokenizer.encode(" c 🍏 ab"), 2]
    whole = fast.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert whole == "ab 🍏 é  c 🍏 ab"
    for length in range(len(ids)):
        detokenizer = tokenizer.detokenizer(ids[:length])
        output = detokenizer.add(ids[length:]) + detokenizer.finish()
        prompt = fast.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert whole == prompt.rstrip("\ufffd") + output


def test_invalid_unicode_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"^prompt has a lone surrogate at character 1; text must be valid Unicode$"):
        tokenizer.encode("a\udcff")


def test_token_ids_out_of_range_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"^token_ids\[1\] is -1; token ids must be from 0 to 4294967295$"):
        tokenizer.decode([1, -1])


def test_vocab_size(tokenizer):
    assert tokenizer.vocab_size == 259 + 2  # é is a byte symbol already


def test_truncation_and_padding_of_the_training_run_are_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    assert len(load(tmp_path, backend).encode("abcdefghijkl")) == 13
    assert len(load(tmp_path, backend).encode("a")) == 2


def test_a_directory_without_tokenizer_config_will_do(tmp_path):
    save(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer(tmp_path).encode("a")[0] == BOS


def test_the_post_processor_of_tokenizer_json_decides_on_special_tokens(tmp_path):
    backend = byte_level()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    assert BOS not in load(tmp_path, backend).encode("a")


# ---- missing and corrupt ---------------------------------------------------------------------------------------------


def assert_refused(directory, message):
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(directory)
    assert "\n" not in str(caught.value)


def test_missing_directory(tmp_path):
    assert_refused(
        tmp_path / "no", f"^tokenizer directory {str(tmp_path / 'no')!r} does not exist; set EngineConfig.tokenizer$"
    )


def test_missing_tokenizer(tmp_path):
    assert_refused(tmp_path, f"^tokenizer file {str(tmp_path / 'tokenizer.json')!r} does not exist$")


def test_truncated_tokenizer(tmp_path):
    path = save(tmp_path, byte_level()) / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:1000])
    assert_refused(tmp_path, f"^tokenizer file {re.escape(repr(str(path)))} cannot be read: EOF while parsing")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_truncated_configuration(tmp_path, name):
    (save(tmp_path, byte_level()) / name).write_text('{"bos_token": ')
    assert_refused(tmp_path, f"^tokenizer file {str(tmp_path / name)!r} cannot be read: Expecting value")


def test_configuration_of_the_wrong_kind(tmp_path):
    (save(tmp_path, byte_level()) / "tokenizer_config.json").write_text("[]")
    assert_refused(tmp_path, "tokenizer_config.json' does not hold a JSON object$")


def test_a_configuration_that_transformers_refuses(tmp_path):
    save(tmp_path, byte_level(), extra_special_tokens=7)
    assert_refused(tmp_path, f"^tokenizer in {str(tmp_path)!r} cannot be loaded: ")


def test_a_decoder_that_cannot_be_streamed(tmp_path):
    path = save(tmp_path, byte_level()) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["decoder"] = {"type": "Strip", "content": " ", "start": 0, "stop": 1}
    path.write_text(json.dumps(content))
    assert_refused(tmp_path, "tokenizer.json: tokenizer has a decoder that strips the end of the text; it cannot be")


def test_an_older_format_that_cannot_be_converted(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a sentencepiece model")
    assert_refused(tmp_path, "tokenizer.json' does not exist, and the older format in its place cannot be converted: ")


def test_a_converted_tokenizer_is_compared_with_the_model(tmp_path):
    vocab = {"<eos>": 0} | {symbol: 1 + number for number, symbol in enumerate("abc")}
    write_files(tmp_path, {"vocab_size": 5}, vocab=vocab, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    config = EngineConfig(model=str(tmp_path))
    tokenizer = load_tokenizer(config)  # conversion adds <|endoftext|>
    assert tokenizer is not None
    assert tokenizer.vocab_size == 5
    write_files(tmp_path, {"vocab_size": 4})
    with pytest.raises(ValueError, match=r"converted from an older format, has 5 tokens; the model's .* has 4 tokens"):
        load_tokenizer(config)


@pytest.mark.parametrize("flags", [{"add_bos_token": False}, {"add_eos_token": True}])
def test_what_tokenizer_json_puts_around_a_text_counts_as_in_transformers(tmp_path, flags):
    save(tmp_path, byte_level(), bos_token="<bos>", eos_token="<eos>", **flags)
    ids = Tokenizer(tmp_path).encode("ab")
    assert ids == PreTrainedTokenizerFast.from_pretrained(str(tmp_path))("ab")["input_ids"]
    assert (ids[0], len(ids)) == (BOS, 3)


def test_fault_25_code_of_the_checkpoint_never_runs(tmp_path):
    save(tmp_path, byte_level(), tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    Tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_chat_template(tmp_path):
    pytest.importorskip("jinja2")
    tokenizer = load(tmp_path, chat_template=CHAT_TEMPLATE)
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert ids.count(BOS) == 1
    assert tokenizer.decode(ids) == "user: hi\n"


def test_chat_without_a_template(tokenizer):
    with pytest.raises(
        ValueError, match=r"^messages cannot be used: the tokenizer has no chat template; send a prompt"
    ):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
        ("{% for %}", "Expected an expression, got 'end of statement block'"),
    ],
)
def test_fault_25_templates_that_fail_or_try_to_escape(tmp_path, template, reason):
    pytest.importorskip("jinja2")
    tokenizer = load(tmp_path, chat_template=template)
    with pytest.raises(ValueError, match=f"^messages do not fit the chat template: {re.escape(reason)}$"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


# ---- imports ---------------------------------------------------------------------------------------------------------


def test_loading_a_tokenizer_loads_neither_torch_nor_jax(tmp_path):
    save(tmp_path, byte_level())
    code = (
        "import sys; import jaxserve.frontend.async_frontend; from jaxserve.frontend.tokenizer import Tokenizer\n"
        f"Tokenizer({str(tmp_path)!r}).encode('a')\n"
        "print([name for name in ('torch', 'jax', 'flax', 'tensorflow') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
    assert result.stderr == ""
