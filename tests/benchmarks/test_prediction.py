"""The benchmark of predicted output lengths on a trace whose order is known."""

import json

import pytest

from benchmarks import prediction, report


def test_a_trace_that_repeats_itself_is_predicted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    path = tmp_path / "trace.csv"
    lines = (f"{second},{prompt},{output}" for second, (prompt, output) in enumerate([(20, 7), (900, 300)] * 64))
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines) + "\n")
    assert prediction.main([str(path), "--window", "32"]) == 0
    (found,) = json.loads((tmp_path / "prediction.json").read_text())["results"]
    assert found["requests"] == 128
    assert len(found["tau"]["windows"]) == 4
    assert found["tau"]["windows"][-1] == 1.0  # short after short prompts, long after long ones
    assert found["coverage"]["0.95"] == pytest.approx(1.0, abs=0.1)
    assert "tau" in capsys.readouterr().out
