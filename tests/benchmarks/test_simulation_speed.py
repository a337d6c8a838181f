"""The benchmark of the simulator's speed on a small trace."""

import json

from benchmarks import report, simulation_speed


def test_a_small_trace_is_timed_as_the_program_simulates_it(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "write", lambda name, settings, results: written.append((name, settings, results)))
    written = []
    path = tmp_path / "trace.csv"
    lines = (f"{second},{100 + second},{5 + second}" for second in range(12))
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines) + "\n")
    assert simulation_speed.main(["--trace", str(path), "--limit", "10"]) == 0
    ((name, settings, found),) = written
    assert (name, settings["cores"]) == ("simulation_speed", 1)
    assert (found["trace"], found["requests"]) == ("trace", 10)
    assert found["steps"] >= sum(range(5, 15)) / 10
    assert found["simulated_seconds"] >= 9
    assert 0 <= found["seconds"] < found["process_seconds"]
    assert found["peak_rss_mib"] > 10
    assert json.dumps(found)
    printed = capfd.readouterr()
    assert "request/s" not in printed.err  # no progress bar
    assert "peak MiB" in printed.out
