"""Tools, reasoning and response formats over HTTP, with OpenAI's own client."""

from __future__ import annotations

import json

import openai
import pytest

from jaxserve.frontend.tokenizer import Tokenizer
from tests.server.http.chat_model import HARMONY, TOOLS, SayingEngine, chat_model
from tests.server.http.http_harness import http_serving_in_thread

ASK = [{"role": "user", "content": "Weather in Paris?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 🌧"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "time", "arguments": {"city": "Rome"}}\n</tool_call>'


class Model:
    """A served chat model. say: sets what it answers."""

    def __init__(self, served, engine: SayingEngine, client: openai.OpenAI):
        self.served = served
        self.engine = engine
        self.client = client

    def ask(self, answer: str, **fields):
        """The choice of a whole completion, after a stream of the same was found to be the same."""
        self.engine.answer = answer
        fields = {"model": "echo", "messages": ASK, **fields}
        (choice,) = self.client.chat.completions.create(**fields).choices
        message = choice.message
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        whole = message.content or "", getattr(message, "reasoning", ""), calls, choice.finish_reason
        assert _collected(self.client.chat.completions.create(stream=True, **fields)) == whole
        return choice


def _collected(stream):
    """What the chunks of a stream say: content, reasoning, calls and the reason of its end."""
    content, reasoning, calls, reason = "", "", [], None
    for chunk in stream:
        assert reason is None, "nothing follows the reason"
        (choice,) = chunk.choices
        reason, delta = choice.finish_reason, choice.delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning", "")
        for call in delta.tool_calls or ():
            if call.id:
                assert call.index == len(calls)
                calls.append((call.function.name, ""))
            name, arguments = calls[call.index]
            calls[call.index] = name, arguments + call.function.arguments
    return content, reasoning, calls, reason


def _serving(tokenizer: Tokenizer):
    return http_serving_in_thread(tokenizer, engine=SayingEngine(tokenizer))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = chat_model(tmp_path_factory.mktemp("qwen"))
    with _serving(tokenizer) as served:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            yield Model(served, served.engine, client)


def test_a_call_of_a_tool(model):
    choice = model.ask(f"I look.\n{CALL}", tools=TOOLS)
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Zürich 🌧"}
    assert call.id.startswith("call_")
    assert choice.message.content == "I look."
    assert choice.finish_reason == "tool_calls"


def test_the_clients_helper_for_streams(model):
    model.engine.answer = CALL + OTHER
    with model.client.chat.completions.stream(model="echo", messages=ASK, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        calls = stream.get_final_completion().choices[0].message.tool_calls
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Zürich 🌧", "Rome"]
    assert kinds.count("tool_calls.function.arguments.done") == 2


def test_two_calls_and_one_where_only_one_is_wanted(model):
    calls = model.ask(CALL + OTHER, tools=TOOLS).message.tool_calls
    assert [call.function.name for call in calls] == ["weather", "time"]
    assert len({call.id for call in calls}) == 2
    assert len(model.ask(CALL + OTHER, tools=TOOLS, parallel_tool_calls=False).message.tool_calls) == 1


def test_the_events_of_a_call(model):
    model.engine.answer = f"I look. {CALL}{OTHER}"
    stream = model.client.chat.completions.create(model="echo", messages=ASK, tools=TOOLS, stream=True)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls if call.id] == [(0, "weather"), (1, "time")]
    assert [json.loads(call.function.arguments)["city"] for call in calls if not call.id] == ["Zürich 🌧", "Rome"]
    assert all(call.index in (0, 1) for call in calls)


def test_each_sample_has_a_reply_of_its_own(model):
    """A fake's sample 1 says what sample 0 does but for its first token, and that is part of the call's tag here."""
    model.engine.answer = CALL
    fields = {"model": "echo", "messages": ASK, "tools": TOOLS, "n": 2}
    called, text = model.client.chat.completions.create(**fields).choices
    assert [call.function.name for call in called.message.tool_calls] == ["weather"]
    assert (called.finish_reason, called.message.content) == ("tool_calls", None)
    assert (text.index, text.message.tool_calls) == (1, None)
    assert text.message.content == CALL.removeprefix("<tool_call>")
    found = {0: [], 1: []}
    for chunk in model.client.chat.completions.create(stream=True, **fields):
        for choice in chunk.choices:
            found[choice.index].append(choice)
    assert "".join(choice.delta.content or "" for choice in found[1]) == text.message.content
    assert [call.function.name for choice in found[0] for call in choice.delta.tool_calls or () if call.id] == [
        "weather"
    ]
    assert [found[index][-1].finish_reason for index in (0, 1)] == ["tool_calls", "stop"]


def test_a_conversation_with_calls_and_their_results(model):
    messages = [
        *ASK,
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I need it.",
            "tool_calls": [
                {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "P"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "a1", "content": [{"type": "text", "text": "rain"}]},
    ]
    assert model.ask("Rain.", messages=messages, tools=TOOLS).message.content == "Rain."
    prompt = model.engine.prompt()
    assert (
        '<|im_start|>assistant<think>\nI need it.\n</think>\n\n<tool_call>{"name": "weather", "arguments": ' in prompt
    )
    assert '{"city": "P"}}</tool_call><|im_end|>\n<|im_start|>toolrain<|im_end|>\n<|im_start|>assistant\n' in prompt
    assert json.dumps(TOOLS[0]["function"]["parameters"]) in prompt


def test_special_tokens_in_tools_and_arguments_stay_text(model):
    (tool, _) = json.loads(json.dumps(TOOLS).replace("Gets the weather.", "<|im_end|>"))
    tool["function"]["parameters"]["properties"] = {"<|im_start|>": {"type": "string"}}
    arguments = json.dumps({"<|im_end|>": "<|im_start|>"})
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [*ASK, {"role": "assistant", "tool_calls": [call]}, *ASK]
    model.ask("Yes.", messages=messages, tools=[tool])
    tokenizer = model.served.frontend.tokenizer
    (start,), (end,) = (tokenizer.encode(text) for text in ("<|im_start|>", "<|im_end|>"))
    ids = model.engine.asked[-1].prompt_token_ids
    assert (ids.count(start), ids.count(end)) == (5, 4), "system, three messages and the reply"
    assert model.engine.prompt().count("<|im_end|>") == 6


def test_no_tools_no_calls(model):
    assert model.ask(CALL).message.content == CALL.removeprefix("<tool_call>").removesuffix("</tool_call>")
    choice = model.ask("Hello.", tools=TOOLS, tool_choice="none")
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("Hello.", None, "stop")
    assert "<tools>" not in model.engine.prompt()


def test_a_malformed_call_is_text(model):
    choice = model.ask('<tool_call>{"name": }</tool_call>', tools=TOOLS)
    assert choice.message.content == '<tool_call>{"name": }</tool_call>'
    assert choice.finish_reason == "stop"


def test_a_call_cut_off_by_max_tokens_is_text(model):
    choice = model.ask(CALL, tools=TOOLS, max_tokens=20)
    assert choice.message.content == CALL[: len("<tool_call>") + 19]
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "length")


def test_a_call_that_is_asked_for_by_name(model):
    choice = model.ask('{"city": "Rome"}', tools=TOOLS, tool_choice={"type": "function", "function": {"name": "time"}})
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("time", '{"city": "Rome"}')
    assert choice.finish_reason == "stop", "as OpenAI has it"


def test_required_calls(model):
    answer = '[{"name": "time", "parameters": {"city": "Rome"}}, {"name": "weather", "parameters": {"city": "é"}}]'
    choice = model.ask(answer, tools=TOOLS, tool_choice="required")
    assert [call.function.name for call in choice.message.tool_calls] == ["time", "weather"]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)


def test_reasoning(model):
    thinking = {"extra_body": {"chat_template_kwargs": {"thinking": True}}}
    message = model.ask("<think>\nHm.\n</think>\n\nYes.").message
    assert (message.content, message.reasoning, message.reasoning_content) == ("Yes.", "Hm.", "Hm.")
    choice = model.ask(f"So 🤔.\n</think>\n\n{CALL}", tools=TOOLS, **thinking)
    assert (choice.message.content, choice.message.reasoning) == (None, "So 🤔.")
    assert len(choice.message.tool_calls) == 1
    thinking["extra_body"]["include_reasoning"] = False
    message = model.ask("So.\n</think>\n\nYes.", **thinking).message
    assert (message.content, hasattr(message, "reasoning")) == ("Yes.", False)


def test_a_message_that_is_continued(model):
    messages = [*ASK, {"role": "assistant", "content": "The weather"}]
    choice = model.ask(" is fine.", messages=messages, extra_body={"continue_final_message": True})
    assert choice.message.content == " is fine."
    assert model.engine.prompt().endswith("<|im_start|>assistantThe weather")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"tools": [*TOOLS, TOOLS[0]]}, r"tools\[2\].function.name is 'weather'; another tool has this name"),
        ({"tools": [{"type": "x", "function": {}}]}, r"tools\[0\].type is 'x'; only function is supported"),
        ({"tools": [{"type": "function", "function": {}}]}, r"tools\[0\].function.name is None; it must be text"),
        ({"tools": TOOLS * 65}, "tools has 130 tools; at most 128 are allowed"),
        ({"tool_choice": "required"}, "tool_choice is 'required'; it needs tools, and the request has none"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice is 'any'; it must be none, auto, required or an object"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name is 'x'; it must be the name of one of tools",
        ),
        (
            {"tools": TOOLS, "response_format": {"type": "json_object"}},
            "tool_choice is 'auto', and the output is constrained",
        ),
        ({"reasoning_effort": "high"}, "reasoning_effort is 'high'; the model's chat template does not have it"),
        (
            {"extra_body": {"continue_final_message": True, "add_generation_prompt": True}},
            "continue_final_message is true and add_generation_prompt is true; give one of them",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            r"messages\[0\].tool_calls\[0\].function.arguments is '{'; it must be a JSON object as text",
        ),
    ],
)
def test_what_is_refused(model, fields, error):
    with pytest.raises(openai.BadRequestError, match=error):
        model.client.chat.completions.create(**{"model": "echo", "messages": ASK, **fields})


def test_harmony(tmp_path):
    """Its markers are special tokens, which clients do not see, and the parser does."""
    tokenizer = chat_model(tmp_path, HARMONY)
    assert (tokenizer.chat_format.tool_call_parser, tokenizer.chat_format.reasoning_parser) == (
        "openai",
        "openai_gptoss",
    )
    call = '<|channel|>commentary to=functions.weather json<|message|>{"city": "Rome"}<|call|>'
    with _serving(tokenizer) as served:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            model = Model(served, served.engine, client)
            choice = model.ask(f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{call} and on", tools=TOOLS)
            assert choice.message.reasoning == "Hm."
            assert [call.function.name for call in choice.message.tool_calls] == ["weather"]
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
            stop_ids = served.engine.asked[-1].stop_token_ids
            assert tokenizer.encode("<|call|>")[0] in stop_ids, "a call ends the reply, whatever the checkpoint says"
            choice = model.ask("<|channel|>final<|message|>Hi.<|end|>")
            assert (choice.message.content, choice.finish_reason) == ("Hi.", "stop")
            choice = model.ask(
                f"{call}<|start|>assistant<|channel|>final<|message|>Hi.", tools=TOOLS, tool_choice="none"
            )
            assert (choice.message.content, choice.message.tool_calls) == (None, None), "the call ends the reply"
            assert choice.message.reasoning == '{"city": "Rome"}'
