"""Prompt and output as one text, and stop strings that hold special tokens: Python, batch and gRPC.

The checkpoint's next token is a table lookup, so a test says which tokens the model emits.
"""

import itertools

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.request import FinishReason
from tests.batch_helpers import chat, line, run
from tests.frontend.tokenizers_for_tests import byte_fallback, load, save
from tests.models.checkpoints import BASE, random_tensors, write_checkpoint
from tests.server.harness import Served, run_served

SPECIAL = ("<|im_start|>", "<|im_end|>", "[/INST]")
BACKEND = byte_fallback(special=SPECIAL)
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
ENGINE = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
    "token_buckets": (8,),
    "row_buckets": (8,),
    "num_pages": 17,
    "dtype": "float32",
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}[/INST]"


def ids(*pieces):
    """Token ids of pieces; one of several characters that is no piece becomes byte tokens."""
    found = []
    for piece in pieces:
        token_id = BACKEND.token_to_id(piece)
        found += [3 + byte for byte in piece.encode()] if token_id is None else [token_id]
    return found


def next_tokens():
    """The table: ▁ab ▁▁ b <|im_end|> c </s>, and the bytes of an apple in turn, then a."""
    chains = [ids("▁ab", "▁▁", "b", "<|im_end|>", "c", "</s>", "c"), ids("🍏", "a", "é", "[/INST]")]
    return {token: after for chain in chains for token, after in itertools.pairwise(chain)}


def table_checkpoint(directory):
    """A Llama whose embeddings are one-hot and whose layers add nothing; row t of the head adds up what precedes t."""
    size = BACKEND.get_vocab_size()
    size += -size % 8
    raw = BASE | {"vocab_size": size, "hidden_size": size, "num_hidden_layers": 1, "head_dim": 16, "eos_token_id": 2}
    tensors = random_tensors(raw, 0)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.0.{name}.weight"][:] = 0
    tensors["model.norm.weight"][:] = 1
    tensors["model.embed_tokens.weight"] = np.eye(size, dtype=np.float32)
    tensors["lm_head.weight"][:] = 0
    for token, after in next_tokens().items():
        tensors["lm_head.weight"][after, token] = 1
    return save(write_checkpoint(directory, raw, tensors), BACKEND, **NAMES)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    model = table_checkpoint(tmp_path_factory.mktemp("model"))
    with LLM(model=str(model), **ENGINE) as llm:
        yield llm


def generate(llm, prompt, **params):
    (answer,) = llm.generate([prompt], SamplingParams(temperature=0, **params), use_tqdm=False)
    (output,) = answer.outputs
    return list(answer.prompt_token_ids), output


def test_prompt_and_output_are_the_text_of_all_tokens(llm):
    prompt, output = generate(llm, "ab")
    assert list(output.token_ids) == ids("▁▁", "b", "<|im_end|>", "c", "</s>")
    assert "ab" + output.text == BACKEND.decode([*prompt, *output.token_ids]) == "ab  bc"


def test_the_output_completes_a_character_of_the_prompt(llm):
    for length in range(1, 4):
        prompt = {"prompt_token_ids": ids("c", "🍏")[: 1 + length]}
        text = generate(llm, prompt, max_tokens=7 - length)[1].text
        assert text == "🍏aé"
    assert generate(llm, {"prompt_token_ids": ids("🍏")[:2]}, max_tokens=1)[1].text == "\ufffd" * 3  # not completed


@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        ("<|im_end|>", "  b", 3),
        ("b<|im_end|>c", "  ", 4),
        ("end|>c</s>", "  b", 5),
        ("  b", "", 2),  # of the first piece
        ("</s>", "  bc", 5),
        ("c</s>", "  b", 5),
    ],
)
def test_stop_strings_see_what_is_generated(llm, stop, text, count):
    _, output = generate(llm, "ab", stop=(stop,))
    assert (output.text, len(output.token_ids), output.finish_reason) == (text, count, "stop")


def test_the_end_token_as_a_stop_string_with_ignore_eos(llm):
    _, output = generate(llm, "ab", stop=("</s>",), ignore_eos=True, max_tokens=20)
    assert (output.text, len(output.token_ids), output.finish_reason) == ("  bc", 5, "stop")
    _, output = generate(llm, "ab", stop=("</s>",), ignore_eos=True, max_tokens=9, min_tokens=6)
    assert (output.text, len(output.token_ids), output.finish_reason) == ("  bcc", 7, "stop")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"), BACKEND, chat_template=TEMPLATE, **NAMES)


def test_batch_completions_and_chats(tmp_path, tokenizer):
    """The answer of this engine is the prompt again, without <s> (id 1)."""
    content = [{"role": "user", "content": "ab"}]
    lines = [
        line("completion", prompt="ab ab"),
        chat("chat", content),
        chat("stop", content, stop="ab<|im_end|>"),
        chat("special", content, stop=["never", "[/INST]"]),
        line("bytes", prompt=ids("a", "🍏")[:3], max_tokens=1),
    ]
    _, out = run(tmp_path, lines, tokenizer)
    choices = {name: result["response"]["body"]["choices"][0] for name, result in out.items()}
    assert choices["completion"]["text"] == " ab ab"
    assert choices["bytes"]["text"] == "\ufffd\ufffda"
    prompt = tokenizer.encode_chat(content)
    both = tokenizer.decode([*prompt, *choices["chat"]["token_ids"]])
    answer = both[len(tokenizer.decode(prompt)) :]
    contents = {name: choices[name]["message"]["content"] for name in ("chat", "stop", "special")}
    assert contents == {"chat": answer, "stop": answer.removesuffix("ab"), "special": answer}
    assert {choices[name]["finish_reason"] for name in contents} == {"stop"}


def test_grpc_streams(tokenizer):
    async def body(served: Served) -> None:
        answer = await served.client.generate_text("ab ab", SamplingParams(temperature=0.0))
        assert answer.text == " ab ab"
        params = SamplingParams(temperature=0.0, stop=("b<|im_end|>\n",))
        text, last = "", None
        async for chunk in served.client.generate(ids("▁ab", "b", "<|im_end|>", "\n", "c"), params):
            text, last = text + chunk.text, chunk
            assert " ab".startswith(text)  # nothing of the stop string on the way
        assert last is not None
        assert (text, last.finish_reason) == (" ab", FinishReason.STOP)

    run_served(body, tokenizer)
