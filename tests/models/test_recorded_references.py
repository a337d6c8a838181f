"""What is recorded of transformers (logits, embeddings, beam searches) is what it computes now."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
TOLERANCE = 2e-5
RELATIVE = 1e-5
"""Of a search's score: a sum of logarithms up to some hundred, which CPUs round in different places."""

EVERY = 5
"""Only the first of so many prompts is searched again."""


@pytest.mark.one_lane
@pytest.mark.slow(reason="runs every shape and search through torch")
def test_recorded_numbers_are_what_transformers_computes_now(tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed here; its recorded numbers are compared instead")
    # A process of its own: torch's threads and the warnings of its imports stay out of this one.
    parity, embeddings, beams = (tmp_path / name for name in ("parity.npz", "embeddings.npz", "beams.json"))
    files = map(str, (parity, embeddings, beams))
    command = [sys.executable, "-m", "tests.models.make_all_references", *files, str(EVERY)]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    _assert_arrays_agree(parity, HERE / "references.npz")
    _assert_arrays_agree(embeddings, HERE / "embedding_references.npz")
    _assert_searches_agree(beams, HERE / "beam_references.json")


def _assert_arrays_agree(fresh_file: pathlib.Path, recorded_file: pathlib.Path) -> None:
    """Token ids are equal, other numbers to the tolerance."""
    with np.load(fresh_file) as fresh, np.load(recorded_file) as recorded:
        assert set(fresh) == set(recorded)
        for name, array in fresh.items():
            if name.endswith(".tokens"):
                np.testing.assert_array_equal(array, recorded[name], err_msg=name)
            else:
                np.testing.assert_allclose(array, recorded[name], rtol=0, atol=TOLERANCE, err_msg=name)


def _assert_searches_agree(fresh_file: pathlib.Path, recorded_file: pathlib.Path) -> None:
    """Sequences are equal, scores to the tolerance."""
    fresh, recorded = (json.loads(path.read_text("utf-8")) for path in (fresh_file, recorded_file))
    assert fresh["settings"] == recorded["settings"]
    prompts = recorded["prompts"][::EVERY]
    for now, before in zip(fresh["prompts"], prompts, strict=True):
        for new, old in zip(now["searches"], before["searches"], strict=True):
            assert new["sequences"] == old["sequences"], now["text"]
            assert new["scores"] == pytest.approx(old["scores"], abs=TOLERANCE, rel=RELATIVE)
