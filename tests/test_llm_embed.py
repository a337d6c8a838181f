"""`LLM.embed` and `LLM.chat` over an engine of a rule, and how embeddings are configured."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxserve.config.pooler_config import PoolerConfig
from jaxserve.llm import LLM
from jaxserve.pooling_params import PoolingParams, cosine, pair_scores
from jaxserve.request import Pooling
from jaxserve.request_checks import ModelLimits
from jaxserve.sampling_params import SamplingParams
from tests.frontend.fakes import RuleEngine
from tests.frontend.tokenizers_for_tests import load


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


def ids(*token_ids):
    return {"prompt_token_ids": list(token_ids)}


def test_embed(tokenizer):
    with LLM(client=RuleEngine(), tokenizer=tokenizer) as llm:
        prompts = [ids(5, 6, 7, 8), "abcd", ids(9, 1, 1, 1)]
        one, text, other = llm.embed(prompts, PoolingParams(normalize=False), use_tqdm=False)
        assert one.outputs.embedding == [5, 6, 7, 8]
        assert text.prompt == "abcd"
        assert text.prompt_token_ids == tuple(tokenizer.encode("abcd"))
        assert (other.prompt, other.outputs.hidden_size, other.finished) == (None, 4, True)
        each = llm.embed(prompts[:1] * 2, [PoolingParams(dimensions=1), PoolingParams(dimensions=2)], use_tqdm=False)
        assert each[0].outputs.embedding == [1.0]
        np.testing.assert_allclose(each[1].outputs.embedding, np.array([5, 6]) / np.sqrt(61), rtol=1e-6)
        (failed,) = llm.embed(ids(0, 1), use_tqdm=False)
        assert (failed.error, failed.outputs.embedding) == ("logits are not finite", [])
        assert len(llm.embed([ids(5)] * 300, use_tqdm=False)) == 300
        with pytest.raises(ValueError, match=r"prompts\[1\]: prompt is empty"):
            llm.embed([ids(5), ids()], use_tqdm=False)
        with pytest.raises(ValueError, match="pooling_params has 1 items for 2 prompts"):
            llm.embed([ids(5)] * 2, [PoolingParams()])


def test_a_prompt_may_fill_the_context_or_be_cut(tokenizer):
    with LLM(client=RuleEngine(), tokenizer=tokenizer) as llm:
        (whole,) = llm.embed(ids(*range(3, 259), *range(3, 259)), use_tqdm=False)
        assert len(whole.prompt_token_ids) == 512
        with pytest.raises(ValueError, match="prompt has 513 tokens; at most max_model_len 512 are allowed"):
            llm.embed(ids(*[5] * 513), use_tqdm=False)
        for most, length in ((3, 3), (-1, 512)):
            (cut,) = llm.embed(ids(*[5] * 600, 7), PoolingParams(truncate_prompt_tokens=most), use_tqdm=False)
            assert (len(cut.prompt_token_ids), cut.prompt_token_ids[-1]) == (length, 7)
            assert cut.num_truncated_tokens == 601 - length
        long = "x" * 5000
        with pytest.raises(ValueError, match="prompt has 5000 characters, at least"):
            llm.embed(long, use_tqdm=False)
        (cut,) = llm.embed(long, PoolingParams(truncate_prompt_tokens=4), use_tqdm=False)
        assert cut.prompt_token_ids == tuple(tokenizer.encode(long)[-4:])


def test_vectors_of_zeros_and_cosines():
    limits = ModelLimits(10, 10, 10, 10, (), embedding_size=2)
    zero = PoolingParams().embedding(np.zeros(2).tobytes(), limits)
    assert np.frombuffer(zero, "<f4").tolist() == [0, 0]
    a, b = (np.array(values, "<f4").tobytes() for values in ((3, 4), (4, -3)))
    assert (cosine(a, a), cosine(a, b), cosine(a, zero)) == (pytest.approx(1), pytest.approx(0), 0)
    assert pair_scores([a, a, b], 1) == pytest.approx([1, 0])
    assert pair_scores([a, b, a, b], 2) == pytest.approx([1, 1])


def test_chat(chat_llm):
    hi = [{"role": "user", "content": "hi"}]
    (output,) = chat_llm.chat(hi, SamplingParams(temperature=0), use_tqdm=False)
    assert output.outputs[0].text == "hi\n"  # the engine repeats the prompt that the template makes
    both = chat_llm.chat([hi, [{"role": "user", "content": [{"type": "text", "text": "yo"}]}]], use_tqdm=False)
    assert [one.outputs[0].text for one in both] == ["hi\n", "yo\n"]
    with pytest.raises(ValueError, match=r"messages\[0\].role must be text"):
        chat_llm.chat([{"content": "hi"}], use_tqdm=False)
    with pytest.raises(ValueError, match="messages must be a list of at least one message"):
        chat_llm.chat([], use_tqdm=False)


@pytest.fixture
def chat_llm(tmp_path):
    from jaxserve.frontend.tokenizer import Tokenizer
    from jaxserve.models.tiny.tiny_tokenizer import BOS, CHAT_TEMPLATE, EOS
    from tests.server.fakes import save_tokenizer

    names = {"bos_token": BOS, "eos_token": EOS, "chat_template": CHAT_TEMPLATE}
    (save_tokenizer(tmp_path) / "tokenizer_config.json").write_text(json.dumps(names))
    with LLM(client=RuleEngine(vocab_size=512), tokenizer=Tokenizer(tmp_path)) as llm:
        yield llm


def test_chat_without_tokenizer():
    with LLM(client=RuleEngine()) as llm, pytest.raises(ValueError, match="messages need a tokenizer"):
        llm.chat([{"role": "user", "content": "hi"}])


# ---- configuration ---------------------------------------------------------------------------------------------------


def modules(directory, pooling, normalize):
    found = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    if pooling is not None:
        found.append({"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if normalize:
        found.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"})
    (directory / "modules.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("pooling", "normalize", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, True, ("MEAN", True)),
        ({"pooling_mode_lasttoken": True}, False, ("LAST", False)),
        ({"pooling_mode": "cls"}, True, ("CLS", True)),
        (None, True, ("LAST", True)),
    ],
)
def test_a_checkpoint_says_how_it_is_pooled(tmp_path, pooling, normalize, expected):
    modules(tmp_path, pooling, normalize)
    assert PoolerConfig().resolved(str(tmp_path)) == expected
    assert PoolerConfig(pooling_type="MEAN", normalize=False).resolved(str(tmp_path)) == ("MEAN", False)


def test_checkpoints_that_say_nothing_or_too_much(tmp_path):
    assert PoolerConfig().resolved(None) == PoolerConfig().resolved(str(tmp_path)) == ("LAST", True)
    modules(tmp_path, {"pooling_mode_max_tokens": True}, True)
    with pytest.raises(ValueError, match="asks for another pooling than LAST, MEAN, CLS; set PoolerConfig"):
        PoolerConfig().resolved(str(tmp_path))
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ValueError, match=r"modules.json cannot be read"):
        PoolerConfig().resolved(str(tmp_path))
    with pytest.raises(ValueError, match="pooling_type is 'MAX'"):
        PoolerConfig(pooling_type="MAX")


def test_a_request_overrides_the_model():
    limits = ModelLimits(10, 10, 10, 10, (), embedding_size=2, pooling=Pooling.MEAN, normalize=False)
    assert PoolingParams().kind(limits) is Pooling.MEAN
    assert PoolingParams(pooling_type="cls").kind(limits) is Pooling.CLS
    pooled = np.array([3.0, 4.0]).tobytes()
    assert np.frombuffer(PoolingParams().embedding(pooled, limits), "<f4").tolist() == [3, 4]
    unit = np.frombuffer(PoolingParams(normalize=True).embedding(pooled, limits), "<f4")
    np.testing.assert_allclose(unit, [0.6, 0.8], rtol=1e-6)
