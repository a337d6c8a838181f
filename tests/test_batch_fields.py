"""OpenAI's fields: what asks for nothing is answered as if it were absent, what is not supported is refused by name."""

import json

import pytest

from tests.batch_helpers import chat, line, run
from tests.frontend.tokenizers_for_tests import load
from tests.server.http.chat_model import TOOLS, SayingEngine, chat_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}{{ m.name or '' }}{{ m.tool_call_id or '' }}>{{ m.content }}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    pytest.importorskip("jinja2")
    return load(tmp_path_factory.mktemp("tokenizer"), chat_template=TEMPLATE)


def answers(tmp_path, lines, tokenizer):
    """Of each line the text, or the message of its error."""
    _, out = run(tmp_path, lines, tokenizer)

    def answer(result):
        if result["error"]:
            return result["error"]["message"].partition(": ")[2]
        (choice,) = result["response"]["body"]["choices"]
        return choice["text"] if "text" in choice else choice["message"]["content"]

    return {key: answer(result) for key, result in out.items()}


HI = [{"role": "user", "content": "hi"}]
BOTH = {  # name: values that ask for nothing, beside null
    "n": [1],
    "stream": [False],
    "stream_options": [{}, {"include_usage": False}, {"include_usage": None, "include_obfuscation": True}],
    "presence_penalty": [0, 0.0],
    "frequency_penalty": [0, -0.0],
    "logit_bias": [{}],
    "seed": [7],
    "stop": [[], "never", ["never", "ever"]],
    "temperature": [1, 0.0],
    "top_p": [1, 1.0],
    "max_tokens": [50],
    "logprobs": [False],
    "top_logprobs": [0],
    "user": ["u1", ""],
    "model": ["fake"],
}
CHAT = {
    "audio": [],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "max_completion_tokens": [50],
    "metadata": [{}, {"a": "b"}],
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],
    "prediction": [],
    "prompt_cache_key": ["k"],
    "prompt_cache_retention": ["in_memory", "in-memory"],
    "reasoning_effort": ["medium"],
    "response_format": [{"type": "text"}],
    "safety_identifier": ["s"],
    "service_tier": ["auto", "default"],
    "store": [False],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "verbosity": ["medium"],
    "web_search_options": [],
}
COMPLETION = {"best_of": [1], "echo": [False], "suffix": [""]}


def test_every_field_of_a_chat_with_its_default_or_null(tmp_path, tokenizer):
    lines = [chat("control", HI)]
    for name, values in (BOTH | CHAT).items():
        lines += [chat(json.dumps({name: value}), HI, **{name: value}) for value in [None, *values]]
    everything = {name: (values or [None])[0] for name, values in (BOTH | CHAT).items()}
    del everything["max_tokens"]
    lines.append(chat("everything", HI, **everything))
    found = answers(tmp_path, lines, tokenizer)
    assert found == dict.fromkeys(found, "<user>hi")
    assert len(found) == len(lines)


def test_every_field_of_a_completion_with_its_default_or_null(tmp_path, tokenizer):
    lines = [line("control", prompt="hi"), line("a list of one", prompt=["hi"])]
    lines.append(line("a list of one list", prompt=[tokenizer.encode("hi")]))
    for name, values in (BOTH | COMPLETION).items():
        lines += [line(json.dumps({name: value}), prompt="hi", **{name: value}) for value in [None, *values]]
    found = answers(tmp_path, lines, tokenizer)
    assert found == dict.fromkeys(found, "hi")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": True}, "n is True; it must be a whole number"),
        ({"n": "1"}, "n is '1'; it must be a whole number"),
        ({"best_of": 3}, "best_of is 3; only 1 is supported"),
        ({"stream": True}, "stream is True; only false is supported"),
        ({"stream": 0}, "stream is 0; only false is supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options is {'include_usage': True}; only"),
        ({"stream_options": {"other": False}}, "stream_options is {'other': False}; only"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be at least -2 and at most 2"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3; it must be at least -2 and at most 2"),
        ({"logit_bias": {"5": -101}}, "logit_bias[5] is -101; it must be at least -100 and at most 100"),
        ({"logit_bias": []}, "logit_bias is []; it must be an object of token ids and numbers"),
        ({"response_format": "text"}, "response_format is 'text'; it must be an object"),
        ({"modalities": ["text", "audio"]}, "modalities is ['text', 'audio']; only [\"text\"] is supported"),
        ({"audio": {"voice": "alloy"}}, "audio is {'voice': 'alloy'}; only null is supported"),
        (
            {"prediction": {"type": "content", "content": "x"}},
            "prediction is {'content': 'x', 'type': 'content'}; only",
        ),
        ({"web_search_options": {}}, "web_search_options is {}; only null is supported"),
        ({"tool_choice": "required"}, "tool_choice is 'required'; "),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls is 1; "),
        ({"functions": [{"name": "f"}]}, "functions is [{'name': 'f'}]; only [] is supported"),
        ({"function_call": {"name": "f"}}, "function_call is {'name': 'f'}; only"),
        ({"reasoning_effort": "high"}, "reasoning_effort is 'high'; "),
        ({"verbosity": "low"}, "verbosity is 'low'; only"),
        ({"store": True}, "store is True; only false is supported"),
        ({"service_tier": "flex"}, "service_tier is 'flex'; only"),
        ({"echo": True}, "echo is True; only false is supported"),
        ({"top_logprobs": 5}, "top_logprobs is 5; "),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21; this server returns at most max_logprobs 20 ids"),
        ({"suffix": "end"}, "suffix is 'end'; only \"\" is supported"),
        ({"user": 7}, "user is 7; it must be text"),
        ({"safety_identifier": ["s"]}, "safety_identifier is ['s']; it must be text"),
        ({"metadata": "m"}, "metadata is 'm'; it must be an object whose values are texts"),
        ({"metadata": {"a": 1}}, "metadata is {'a': 1}; it must be an object whose values are texts"),
        ({"temprature": 0}, "body has the unknown field 'temprature'; did you mean temperature?"),
        ({"zzz": 0}, "body has the unknown field 'zzz'; known are add"),
        ({"tools": "x" * 100_000}, "tools is 'xxx"),
        ({"temperature": "x" * 100_000}, "temperature is 'xxx"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(tmp_path, tokenizer, fields, words):
    found = answers(
        tmp_path, [chat("a", HI, **fields), line("b", prompt="hi", **fields), line("c", prompt="c")], tokenizer
    )
    assert found["c"] == "c"
    for key in "ab":
        assert found[key].startswith(words)
        assert len(found[key]) < 1500


def test_tools_without_a_parser_for_calls(tmp_path, tokenizer):
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    found = answers(tmp_path, [chat("a", HI, **tools), chat("b", HI, tool_choice="none", **tools)], tokenizer)
    assert found["a"].startswith("tool_choice is 'auto'; this server has no parser for the calls of its model")
    assert found["b"] == "<user>hi"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": "x", "name": None}, "<user>x"),
        ({"role": "user", "content": "x", "name": "n"}, "<usern>x"),
        ({"role": "user", "content": ""}, "<user>"),
        ({"role": "developer", "content": "x"}, "<system>x"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "<user>x"),
        ({"role": "system", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}, "<system>x\ny"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "annotations": None}]}, "<user>x"),
        ({"role": "assistant", "content": "x", "refusal": None, "annotations": []}, "<assistant>x"),
        ({"role": "assistant", "content": "x", "refusal": "", "audio": None}, "<assistant>x"),
        ({"role": "assistant", "content": "x", "tool_calls": [], "function_call": None}, "<assistant>x"),
        ({"role": "assistant", "content": "x", "tool_calls": None}, "<assistant>x"),
        ({"role": "assistant", "content": None}, "<assistant>"),
        ({"role": "assistant", "content": None, "refusal": "no"}, "<assistant>no"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "<assistant>no"),
        ({"role": "assistant", "content": [{"type": "text", "text": "x", "annotations": []}]}, "<assistant>x"),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "x", "annotations": None, "logprobs": []}]},
            "<assistant>x",
        ),
        ({"role": "tool", "content": "x", "tool_call_id": "call_1"}, "<toolcall_1>x"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}, "<assistant>"),
        ({"role": "assistant", "content": "x", "reasoning_content": "y"}, "<assistant>x"),
        ({"role": "function", "content": "x", "name": "f"}, "<functionf>x"),
    ],
)
def test_messages(tmp_path, tokenizer, message, text):
    found = answers(tmp_path, [chat("a", [*HI, message])], tokenizer)
    assert found["a"] == "<user>hi" + text


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user"}, "content must be text"),
        ({"role": "user", "content": None}, "content must be text"),
        ({"role": "assistant"}, "content must be text"),
        ({"content": "x"}, "role must be text"),
        ({"role": None, "content": "x"}, "role must be text"),
        ({"role": ["user"], "content": "x"}, "role must be text"),
        ({"role": "user", "content": 7}, "content must be text"),
        ({"role": "user", "content": []}, "content must be text, or a list of at least one part"),
        ({"role": "user", "content": ["x"]}, "content[0] is of type str; it must be an object"),
        ({"role": "user", "content": [{"text": "x"}]}, "content[0].type is None; only text is supported"),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}}],
            },
            "content[1].type is 'image_url'; only text is supported",
        ),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}, "content[0].type is 'refusal'; only text"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "content[0].text is None; it must be text"),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0].text is None; it must be text"),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "x", "annotations": [{"type": "url"}]}]},
            "content[0].annotations is [{'type': 'url'}]; only [] is supported",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "annotations": []}]},
            "content[0] has the unknown field 'annotations'",
        ),
        ({"role": "user", "content": [{"type": "text", "text": "x", "b": 1}]}, "content[0] has the unknown field 'b'"),
        ({"role": "user", "content": "x", "name": 7}, "name is 7; it must be text"),
        ({"role": "user", "content": "x", "refusal": "no"}, "refusal is 'no'; only an assistant's message has one"),
        ({"role": "assistant", "content": "x", "refusal": "no"}, "has content and a refusal"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "audio is {'id': 'a'}; only null is supported"),
        (
            {"role": "assistant", "content": "x", "tool_calls": [{"id": "c"}]},
            "tool_calls[0].function is None; it must be an object",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "[]"}}]},
            "tool_calls[0].function.arguments is '[]'; it must be a JSON object as text",
        ),
        (
            {"role": "user", "content": "x", "reasoning": "y"},
            "has reasoning, and its role is 'user'; only an assistant",
        ),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "function_call is {'name': 'f'}; only"),
        ({"role": "user", "content": "x", "nmae": "n"}, "has the unknown field 'nmae'; did you mean name?"),
        ({"role": "user", "content": "a\ud800"}, "has a lone surrogate at character"),
    ],
)
def test_messages_that_are_refused(tmp_path, tokenizer, message, words):
    found = answers(tmp_path, [chat("a", [*HI, message])], tokenizer)
    where = "prompt" if "surrogate" in words else "messages[1]"
    assert found["a"].startswith(f"{where} {words}" if words.startswith("has") else f"{where}.{words}")


@pytest.mark.parametrize("extra", [{"endpoint": None}, {"metadata": None, "x": None}])
def test_null_in_the_envelope_counts_as_absent(tmp_path, tokenizer, extra):
    assert answers(tmp_path, [line("a", prompt="hi") | extra], tokenizer) == {"a": "hi"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "prompt": "y"}}',
            "twice",
        ),
        (b'{"custom_id": "a", "custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {}}', "twice"),
        (b'{"custom_id": "a", "body": ' + b'{"n":' * 150 + b"1" + b"}" * 151, "it is nested more than 100 deep"),
        (b'{"custom_id": "a", "body": ' + b"[" * 5000 + b"]" * 5000 + b"}", "it is nested more than 100 deep"),
    ],
)
def test_json_that_means_two_things_or_has_no_bottom(tmp_path, tokenizer, data, words):
    found = answers(tmp_path, [data, line("after", prompt="hi")], tokenizer)
    assert words in found["malformed-line-1"]
    assert found["after"] == "hi"


def test_calls_and_reasoning_in_a_batch(tmp_path):
    """A line of a chat is answered as over HTTP."""
    tokenizer = chat_model(tmp_path)
    engine = SayingEngine(tokenizer)
    engine.answer = '<think>\nHm.\n</think>\n\n<tool_call>{"name": "time", "arguments": {"city": "Rome"}}</tool_call>'
    _, out = run(tmp_path, [chat("a", HI, tools=TOOLS), line("b", prompt="hi")], tokenizer, engine)
    (choice,) = out["a"]["response"]["body"]["choices"]
    message = choice["message"]
    assert (choice["finish_reason"], message["content"], message["reasoning"]) == ("tool_calls", None, "Hm.")
    assert message["tool_calls"][0]["function"] == {"name": "time", "arguments": '{"city": "Rome"}'}
    (choice,) = out["b"]["response"]["body"]["choices"]
    assert choice["text"].startswith("<think>"), "a completion is text"
