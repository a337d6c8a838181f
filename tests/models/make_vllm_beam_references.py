"""Records what vLLM's `LLM.beam_search` finds: `python tests/models/make_vllm_beam_references.py PROMPTS FILE`.

Runs in vLLM's own environment, in float32, with the shipped model and the prompts of beam_references.json (PROMPTS).
Recorded with vLLM 0.32.0 on a CPU; tests compare with the file alone.
"""

import json
import pathlib
import sys

from vllm import LLM
from vllm.sampling_params import BeamSearchParams

CHECKPOINT = pathlib.Path(__file__).parents[2] / "models" / "tiny" / "checkpoint"

SETTINGS = (
    {"beam_width": 4, "max_tokens": 10, "length_penalty": 1.0},
    {"beam_width": 3, "max_tokens": 10, "length_penalty": 0.0},
    {"beam_width": 5, "max_tokens": 12, "length_penalty": 2.5},
    {"beam_width": 2, "max_tokens": 8, "length_penalty": -1.0},
)


def main(prompts_path: str, path: str) -> None:
    """Writes the file: for each setting, of each prompt the new tokens of all outputs and the sums of their
    log-probabilities."""
    prompts = [row["prompt"] for row in json.loads(pathlib.Path(prompts_path).read_text("utf-8"))["prompts"]]
    llm = LLM(model=str(CHECKPOINT), dtype="float32", max_model_len=512, enforce_eager=True, max_num_seqs=32)
    rows = []
    for setting in SETTINGS:
        outputs = llm.beam_search([{"prompt_token_ids": ids} for ids in prompts], BeamSearchParams(**setting))
        found = [
            {
                "sequences": [one.tokens[len(ids) :] for one in output.sequences],
                "sums": [round(one.cum_logprob, 5) for one in output.sequences],
            }
            for ids, output in zip(prompts, outputs, strict=True)
        ]
        rows.append({"setting": setting, "outputs": found})
    lines = ",\n".join(json.dumps(row) for row in rows)
    pathlib.Path(path).write_text(f"[\n{lines}\n]\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
