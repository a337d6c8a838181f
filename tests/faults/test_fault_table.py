"""docs/faults.md has every fault, and each has a test of the name that stands there."""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d+) \| .* \| .* \| `(test_fault_(\d\d)_\w+)` \|$", re.MULTILINE)
NUM_FAULTS = 38


def test_each_fault_has_its_test():
    rows = ROW.findall((ROOT / "docs" / "faults.md").read_text(encoding="utf-8"))
    assert [int(number) for number, _, _ in rows] == list(range(1, NUM_FAULTS + 1))
    assert all(int(number) == int(in_name) for number, _, in_name in rows)
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_fault_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {name for _, name, _ in rows} <= defined
