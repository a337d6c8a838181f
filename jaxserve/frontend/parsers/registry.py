"""Lists the formats of tool calls and of reasoning, under the names that vLLM has for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jaxserve.frontend.parsers import harmony, hermes, llama3_json, mistral, pythonic, qwen3_coder
from jaxserve.frontend.parsers.pieces import Machine, NewMachine
from jaxserve.frontend.parsers.think import Think


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """Describes a format of tool calls.

    Attributes:
        new_machine: makes the parser of one reply.
        signs: texts of which a chat template in this format has all; none where it cannot be told.
        foreign: texts of which it has none.
        markers: special tokens that the parser must see.
        stops: special tokens that end a reply in this format.
        id_length: characters of a call's id, where templates ask for a certain number.
        whole: it parses whole replies, their reasoning too, and tools or not.
    """

    new_machine: NewMachine
    signs: Sequence[str] = ()
    foreign: Sequence[str] = ()
    markers: Sequence[str] = ()
    stops: Sequence[str] = ()
    id_length: int | None = None
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class ReasoningFormat:
    """Describes a format of reasoning.

    Attributes:
        begin, end: the tags around it; "" where the machine of the tools' format parses it.
        signs: as of a `ToolFormat`.
        always: a reply begins with reasoning although nothing says so, unless its prompt has closed it.
    """

    begin: str = ""
    end: str = ""
    signs: Sequence[str] = ()
    always: bool = False

    def machine(self, *, is_open: bool) -> Machine | None:
        """Makes the parser of one reply. is_open: the reply begins inside of the reasoning."""
        return Think(self.begin, self.end, is_open=is_open) if self.end else None

    def is_open(self, prompt: str) -> bool:
        """Returns whether the reply to a prompt begins inside of the reasoning."""
        prompt = prompt.rstrip()
        return prompt.endswith(self.begin) or (self.always and not prompt.endswith(self.end))

    def is_open_in(self, message: str) -> bool:
        """Returns whether a reply that continues a message does."""
        return message.rfind(self.begin) > message.rfind(self.end)


_HARMONY = ToolFormat(
    harmony.new_machine,
    signs=(harmony.CHANNEL, harmony.MESSAGE),
    markers=harmony.MARKERS,
    stops=harmony.STOPS,
    whole=True,
)
_PYTHONIC = ToolFormat(pythonic.new_machine, signs=("[func_name1(",), markers=pythonic.MARKERS)
_LLAMA3 = ToolFormat(
    llama3_json.new_machine, signs=("<|start_header_id|>", '"parameters"'), markers=(llama3_json.PYTHON_TAG,)
)
_QWEN3_CODER = ToolFormat(qwen3_coder.new_machine, signs=("<function=", "<parameter="), markers=tuple(qwen3_coder.TAGS))

TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "openai": _HARMONY,
    "qwen3_coder": _QWEN3_CODER,
    "qwen3_xml": _QWEN3_CODER,
    "hermes": ToolFormat(
        hermes.new_machine,
        signs=("<tool_call>", "</tool_call>"),
        foreign=("<arg_key>", "<parameter"),
        markers=(*hermes.TAGS, *hermes.TAGS.values()),
    ),
    "mistral": ToolFormat(mistral.new_machine, signs=(mistral.TOOL_CALLS,), markers=mistral.MARKERS, id_length=9),
    "pythonic": _PYTHONIC,
    "llama4_pythonic": _PYTHONIC,
    "llama3_json": _LLAMA3,
    "llama4_json": _LLAMA3,
}
"""The formats of tool calls; where several are found in a template, the first counts."""

_THINK = ReasoningFormat("<think>", "</think>", signs=("</think>",))

REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    "openai_gptoss": ReasoningFormat(signs=_HARMONY.signs),
    "qwen3": _THINK,
    "deepseek_r1": dataclasses.replace(_THINK, signs=(), always=True),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]", signs=("[THINK]", "[/THINK]")),
}
"""The formats of reasoning; where several are found in a template, the first counts."""


def found_tool_format(template: str) -> str | None:
    """Returns the name of the format in which a chat template has the model call tools; None where none is known."""
    return _found(template, {name: (one.signs, one.foreign) for name, one in TOOL_FORMATS.items()})


def found_reasoning_format(template: str) -> str | None:
    """Returns the name of the format in which a chat template has reasoning; None where none is known."""
    return _found(template, {name: (one.signs, ()) for name, one in REASONING_FORMATS.items()})


def _found(template: str, signs: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> str | None:
    for name, (wanted, foreign) in signs.items():
        if wanted and all(sign in template for sign in wanted) and not any(sign in template for sign in foreign):
            return name
    return None
