"""Computes every file of recorded numbers anew, in one process: `python -m tests.models.make_all_references DIRECTORY`.

Importing torch and transformers takes longer than most of what is computed.
"""

from __future__ import annotations

import pathlib
import sys

from tests.models import make_beam_references, make_embedding_references, make_references

PARITY, EMBEDDINGS, BEAMS = "parity.npz", "embeddings.npz", "beams.json"
EVERY_BEAM_PROMPT = 5
"""Only the first of so many prompts is searched."""


def main(directory: str) -> None:
    """Writes the files."""
    folder = pathlib.Path(directory)
    make_references.main(str(folder / PARITY))
    make_embedding_references.main(str(folder / EMBEDDINGS))
    make_beam_references.main(str(folder / BEAMS), EVERY_BEAM_PROMPT)


if __name__ == "__main__":
    main(sys.argv[1])
