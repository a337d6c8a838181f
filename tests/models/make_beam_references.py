"""Records what transformers' beam search finds: `python -m tests.models.make_beam_references FILE`.

Needs torch. With the shipped model, over prompts of its tasks, whose outputs it is sure of, and texts that it has never
seen, whose outputs are all about as likely. What float32 and float64 do not agree about is too close to say anything,
and refused.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

import torch
import transformers

from jaxserve.frontend.tokenizer import Tokenizer

CHECKPOINT = pathlib.Path(__file__).parents[2] / "models" / "tiny" / "checkpoint"
MAX_TOKENS = 10

PROMPTS = (
    "reverse: stressed\n",
    "sort: cab\n",
    "add: 20+22\n",
    "copy: abc",
    "upper: quiet\n",
    "count: banana\n",
    "12+34=",
    "sort: zyxwvu",
    "reverse: ",
    "add: 999+1\n",
    "the quick brown fox",
    "Once upon a time",
    "int main(void)",
    "What is the capital of",
    "def f(x):\n",
    "a b a b a",
    "1, 2, 3,",
    "<html>",
    "Dear Sir,\n",
    "E = m",
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a search goes by, in transformers' words. stop: further ids that end an output."""

    num_beams: int
    early_stopping: bool | str
    length_penalty: float = 1.0
    stop: tuple[int, ...] = ()


SETTINGS = (
    Setting(4, False),
    Setting(4, True),
    Setting(4, "never"),
    Setting(3, False, length_penalty=0.0),
    Setting(5, "never", length_penalty=2.5),
    Setting(4, "never", length_penalty=-1.0),
    Setting(4, True, length_penalty=0.5, stop=(35, 13)),
    Setting(2, False, length_penalty=-0.5, stop=(35,)),
)


def found(model: Any, prompt: list[int], setting: Setting) -> tuple[list[list[int]], list[float]]:
    """The outputs of a prompt, the best first, and their scores."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=setting.num_beams,
            num_return_sequences=setting.num_beams,
            early_stopping=setting.early_stopping,
            length_penalty=setting.length_penalty,
            eos_token_id=[model.config.eos_token_id, *setting.stop],
            pad_token_id=-1,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    sequences = [[one for one in row[len(prompt) :] if one >= 0] for row in output.sequences.tolist()]
    return sequences, output.sequences_scores.tolist()


def main(path: str, every: int = 1) -> None:
    """Writes the file. every: only the first of so many prompts."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype, attn_implementation="eager").eval()
        for dtype in (torch.float32, torch.float64)
    ]
    tokenizer = Tokenizer(CHECKPOINT)
    rows = []
    for text in PROMPTS[::every]:
        prompt = tokenizer.encode(text)
        searches = []
        for setting in SETTINGS:
            (sequences, scores), (exact, _) = (found(model, prompt, setting) for model in models)
            assert sequences == exact, f"{text!r}, {setting}: too close"
            searches.append({"sequences": sequences, "scores": [round(score, 5) for score in scores]})
        rows.append({"text": text, "prompt": prompt, "searches": searches})
    settings = [dataclasses.asdict(setting) for setting in SETTINGS]
    lines = ",\n".join(json.dumps(row) for row in rows)
    pathlib.Path(path).write_text(f'{{"settings": {json.dumps(settings)},\n"prompts": [\n{lines}\n]}}\n', "utf-8")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
