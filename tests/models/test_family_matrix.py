"""Every shape of every family against transformers: logits, and tokens through the engine (`make test-all`)."""

import importlib.util

import pytest

from benchmarks import family_matrix
from tests.models.family_shapes import shape_names

pytestmark = pytest.mark.long


@pytest.mark.parametrize("name", shape_names())
def test_logits_and_tokens_are_those_of_transformers_whole_chunked_and_preempted(name, tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed here; test_family_parity compares with recorded numbers")
    family_matrix.write_references(tmp_path, [name])
    found = family_matrix.compare(tmp_path / name, name)
    assert found.passed, found
