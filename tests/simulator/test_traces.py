"""Traces: files of both formats, what is wrong with a file, and the made-up ones."""

import json
import math

import numpy as np
import pytest

from jaxserve.simulator.synthetic import LENGTHS, SyntheticConfig, synthetic_trace
from jaxserve.simulator.trace_files import read_trace, trace_rows
from jaxserve.simulator.traces import make_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9305900,396,109
2023-11-16 18:16:46.6805900,879,55
"""


def test_azure_csv(tmp_path):
    (tmp_path / "conv.csv").write_text(AZURE)
    trace = read_trace(tmp_path / "conv.csv")
    assert trace.arrivals.tolist() == pytest.approx([0.0, 4.25, 60.0])
    assert trace.prompt_tokens.tolist() == [374, 396, 879]
    assert trace.output_tokens.tolist() == [44, 109, 55]
    assert trace.tenants == ("", "", "")
    assert np.isinf(trace.deadlines).all()
    assert trace.rate == pytest.approx(2 / 60)


def test_optional_columns_and_order(tmp_path):
    rows = [
        {"timestamp": 3000, "input_length": 7, "output_length": 5, "tenant": "b", "priority": -2},
        {"timestamp": 1500, "input_length": 9, "output_length": 4, "deadline": 2.5, "max_tokens": 16},
    ]
    (tmp_path / "cake.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = read_trace(tmp_path / "cake.jsonl")
    assert trace.arrivals.tolist() == [0.0, 1.5]
    assert trace.tenants == ("", "b")
    assert trace.priorities.tolist() == [0, -2]
    assert trace.max_tokens.tolist() == [16, 0]
    assert trace.deadlines.tolist() == [2.5, math.inf]


def test_csv_of_the_other_columns(tmp_path):
    (tmp_path / "own.csv").write_text("timestamp,input_length,output_length,tenant\n0,5,2,a\n250,6,3,b\n")
    trace = read_trace(tmp_path / "own.csv")
    assert trace.arrivals.tolist() == [0.0, 0.25]
    assert trace.tenants == ("a", "b")


def test_rows_in_the_order_of_the_file_with_their_blocks(tmp_path):
    rows = [
        {"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [7, 9]},
        {"timestamp": 0, "input_length": 600, "output_length": 6},
    ]
    (tmp_path / "cake.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = trace_rows(tmp_path / "cake.jsonl")
    assert (first.arrival, first.prompt_tokens, first.output_tokens, first.blocks) == (3.0, 700, 5, (7, 9))
    assert (second.arrival, second.blocks) == (0.0, ())
    assert len(read_trace(tmp_path / "cake.jsonl", limit=1)) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", AZURE.replace("396", "many"), r"a\.csv line 3: column 'ContextTokens' is 'many'; .* a whole number"),
        ("a.csv", AZURE.replace(",55", ",0"), r"a\.csv line 4: column 'GeneratedTokens' is '0'; it must be at least 1"),
        ("a.csv", AZURE.replace("2023-11-16 18:16", "yesterday"), r"a\.csv line 4: column 'TIMESTAMP' .* date"),
        ("a.csv", "time,tokens\n1,2\n", r"a\.csv line 2 has columns time, tokens; it needs TIMESTAMP"),
        ("a.csv", "TIMESTAMP,ContextTokens\n1,2\n", r"line 2: column 'GeneratedTokens' is missing"),
        (
            "a.csv",
            AZURE.replace("Generated", "tenent,Generated"),
            r"a\.csv line 2 .* 'tenent'; did you mean 'tenant'\?",
        ),
        (
            "a.jsonl",
            '{"timestamp": 0, "input_length": 6, "output_length": 6, "Priority": 2}\n',
            r"line 1 has the unknown column 'Priority'; did you mean 'priority'\? Rename it, or remove it",
        ),
        ("a.csv", "", r"a\.csv has no requests"),
        ("a.jsonl", "{}\n", r"a\.jsonl line 1 has columns ; it needs"),
        ("a.jsonl", '{"timestamp": 1,\n', r"a\.jsonl line 1 is not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl line 1 is \[1\]; it must be an object"),
        ("a.txt", "", r"a\.txt ends in '\.txt'"),
        (
            "a.jsonl",
            '{"timestamp": 0, "input_length": 600, "output_length": 6, "hash_ids": [1]}\n',
            r"line 1: column 'hash_ids' is \[1\]; it must be 2 or more, 512 tokens each, for 600 tokens",
        ),
        (
            "a.jsonl",
            '{"timestamp": 0, "input_length": 6, "output_length": 6, "hash_ids": "7"}\n',
            r"line 1: column 'hash_ids' is '7'; it must be a list of whole numbers",
        ),
    ],
)
def test_faults_name_file_line_and_column(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path / name)


def test_other_columns_are_ignored(tmp_path):
    rows = "timestamp,input_length,output_length,tenant,tenant_id,region,type\n0,5,2,a,7,north,chat\n"
    (tmp_path / "own.csv").write_text(rows)
    assert read_trace(tmp_path / "own.csv").tenants == ("a",)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_file_in_another_encoding_is_named(tmp_path, name):
    (tmp_path / name).write_bytes("timestamp,input_length,output_length,tenant\n0,5,2,Zoë\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"trace {name} is no UTF-8 text \(.*0xeb\); save it in UTF-8"):
        read_trace(tmp_path / name)


def test_rate_and_parts():
    trace = make_trace("t", [10.0, 11.0, 13.0], [1, 2, 3], 4)
    assert trace.faster(2).arrivals.tolist() == [0.0, 0.5, 1.5]
    part = trace.part(1, 3)
    assert part.arrivals.tolist() == [0.0, 2.0]
    assert part.prompt_tokens.tolist() == [2, 3]
    with pytest.raises(ValueError, match="prompt_tokens has 2 entries"):
        make_trace("t", [0.0, 1.0, 2.0], [1, 2], 4)


def test_the_same_seed_gives_the_same_trace_and_another_rate_the_same_lengths():
    config = SyntheticConfig.parse("count=200,rate=3,seed=5,arrivals=gamma,burstiness=0.5,tenants=a:3/b:1")
    first, again = synthetic_trace(config), synthetic_trace(config)
    faster = synthetic_trace(SyntheticConfig.parse("count=200,rate=6,seed=5,tenants=a:3/b:1"))
    other = synthetic_trace(SyntheticConfig.parse("count=200,rate=3,seed=6"))
    assert (first.arrivals == again.arrivals).all()
    assert first.tenants == again.tenants == faster.tenants
    assert (first.output_tokens == faster.output_tokens).all()
    assert (first.output_tokens != other.output_tokens).any()


@pytest.mark.parametrize(
    ("arrivals", "variation", "tolerance"),
    [("poisson", 1.0, 0.05), ("gamma,burstiness=0.25", 2.0, 0.2), ("gamma,burstiness=4", 0.5, 0.05), ("even", 0, 0.01)],
)
def test_arrival_processes(arrivals, variation, tolerance):
    trace = synthetic_trace(SyntheticConfig.parse(f"count=8000,rate=5,arrivals={arrivals}"))
    gaps = np.diff(trace.arrivals)
    assert trace.rate == pytest.approx(5, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, abs=tolerance)


def test_bursts_keep_the_rate_and_leave_seconds_empty():
    text = "count=20000,rate=5,arrivals=onoff,on_seconds=2,off_seconds=8"
    trace = synthetic_trace(SyntheticConfig.parse(text))
    assert trace.rate == pytest.approx(5, rel=0.15)
    filled = len(set(trace.arrivals.astype(int).tolist())) / trace.seconds
    assert filled < 0.4


@pytest.mark.parametrize("lengths", list(LENGTHS))
def test_lengths_follow_the_mixtures(lengths):
    trace = synthetic_trace(SyntheticConfig.parse(f"count=20000,lengths={lengths}"))
    for mixture, found in zip(LENGTHS[lengths], (trace.prompt_tokens, trace.output_tokens), strict=True):
        mean = sum(weight * math.exp(mu + sigma**2 / 2) for weight, mu, sigma in mixture)
        assert found.mean() == pytest.approx(mean, rel=0.05)


def test_lengths_given():
    trace = synthetic_trace(SyntheticConfig.parse("count=5,prompt=10/20,output=3-4,priorities=7"))
    assert trace.prompt_tokens.tolist() == [10, 20, 10, 20, 10]
    assert set(trace.output_tokens.tolist()) <= {3, 4}
    assert trace.priorities.tolist() == [7] * 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate", "it must be NAME=VALUE"),
        ("speed=3", "with NAME one of rate, count"),
        ("count=x", "synthetic count is 'x'"),
        ("arrivals=late", "synthetic arrivals is 'late'"),
        ("prompt=9-3", "LOW-HIGH must rise"),
        ("tenants=a:0", "each weight must be above 0"),
    ],
)
def test_faults_of_synthetic_traces(text, message):
    with pytest.raises(ValueError, match=message):
        synthetic_trace(SyntheticConfig.parse(text))
