"""Computes every file of recorded numbers anew, in one process.

    python -m tests.models.make_all_references PARITY EMBEDDINGS BEAMS EVERY

Importing torch and transformers takes longer than most of what is computed.
"""

from __future__ import annotations

import sys

from tests.models import make_beam_references, make_embedding_references, make_references


def main(parity: str, embeddings: str, beams: str, every: int) -> None:
    """Writes the files. every: only the first of so many prompts is searched."""
    make_references.main(parity)
    make_embedding_references.main(embeddings)
    make_beam_references.main(beams, every)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
