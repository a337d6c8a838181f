"""A chat model for tests: a tokenizer of bytes, a chat template with tools, an engine that says what it is told to."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxserve.config.chat_config import ChatConfig
from jaxserve.engine.messages import AddRequest, ToEngine
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.models.tiny.tiny_tokenizer import BOS_ID, EOS_ID
from jaxserve.request import EngineRequest
from tests.engine_ready import engine_ready
from tests.server.fakes import EchoEngine

SPECIALS = (
    "<|im_start|> <|im_end|> <tool_call> </tool_call> <|start|> <|channel|> <|message|> <|end|> <|call|>"
).split()

QWEN = (
    "{%- if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>"
    '<tool_call>{"name": ...}</tool_call><|im_end|>\n{% endif -%}'
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{%- if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor -%}'
    "<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% if thinking %}<think>\n{% endif %}{% endif -%}"
)
HARMONY = (
    "{%- for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor -%}"
    "<|start|>assistant{# <|channel|>analysis #}"
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Gets the {name}.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("weather", "time")
]


def chat_model(directory: pathlib.Path, template: str = QWEN, chat: ChatConfig = ChatConfig()) -> Tokenizer:
    """A tokenizer of bytes, in which even the tags of tool calls are special."""
    # The first ids are those that the echo engine leaves out or ends with.
    pieces = [*(f"<{index}>" for index in range(1 + max(BOS_ID, EOS_ID))), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))
    return Tokenizer(directory, chat)


class SayingEngine(EchoEngine):
    """Says `answer` to every request, and ends."""

    def __init__(self, tokenizer: Tokenizer):
        end = tokenizer.encode("<|im_end|>")
        super().__init__(
            engine_ready(
                vocab_size=tokenizer.vocab_size,
                max_model_len=8192,
                eos_token_ids=tuple(end),
                usable_pages=1024,
                max_num_seqs=8,
                max_num_waiting=32,
            )
        )
        self._tokenizer = tokenizer
        self._end = end
        self.answer = ""
        self.asked: list[EngineRequest] = []

    def send(self, message: ToEngine) -> None:
        if isinstance(message, AddRequest):
            self.asked.append(message.request)
            said = [*self._tokenizer.encode(self.answer), *self._end]
            request = dataclasses.replace(message.request, prompt_token_ids=tuple(said))
            message = AddRequest(request, message.sample_ids)
        super().send(message)

    def prompt(self) -> str:
        """The prompt of the last request, as text."""
        return self._tokenizer.decode(self.asked[-1].prompt_token_ids, skip_special_tokens=False)
