"""Figures of a simulation, the search for its capacity, and the command line."""

import json

import numpy as np
import pytest

from jaxserve import simulate as command
from jaxserve import tune
from jaxserve.simulator.capacity import parts_of, search_capacity
from jaxserve.simulator.search import Score
from jaxserve.simulator.setup import find_target, set_up, with_options
from jaxserve.simulator.simulation import simulate
from jaxserve.simulator.simulation_report import Slo, jain_index, report, table
from jaxserve.simulator.synthetic import SyntheticConfig, synthetic_trace
from jaxserve.simulator.traces import make_trace
from tests.simulator.helpers import SimpleCosts, make_config, make_device


def test_figures_by_hand():
    # One at a time, a second a step: the first takes 0 to 3, the second is scheduled at 4 (its step follows the one
    # that was in flight when the first stopped) and has its two tokens at 5 and 6.
    trace = make_trace("t", [0.0, 0.0], [10, 20], [3, 2], tenants=["a", "b"])
    result = simulate(make_config(max_num_seqs=1), trace, SimpleCosts(), make_device())
    assert [times.tolist() for times in result.token_times] == [[1, 2, 3], [5, 6]]
    found = report(result, Slo(ttft=2.0, tpot=1.0))
    assert found.seconds == 6.0
    assert found.output_tokens_per_second == pytest.approx(5 / 6)
    assert found.total_tokens_per_second == pytest.approx(35 / 6)
    assert found.goodput == pytest.approx(1 / 6)
    assert found.good_share == 0.5
    assert found.ttft is not None
    assert found.ttft.mean == 3.0
    assert found.itl is not None
    assert found.itl.mean == 1.0
    assert found.tenants["b"].service == 22
    assert found.jain == pytest.approx(36 / (2 * 26))
    text = table({"one": found})
    assert "requests/s" in text
    assert "TTFT of b, ms, mean / p99" in text
    json.dumps(found.to_dict())


def test_requests_that_were_not_served_are_not_within_targets():
    # The second is too long for the context of 256, the third is refused by a queue of one.
    trace = make_trace("t", [0.0, 0.0, 0.0, 0.0], [10, 300, 10, 10], [2, 2, 2, 2])
    config = make_config(max_num_seqs=1, max_num_waiting=1)
    result = simulate(config, trace, SimpleCosts(), make_device())
    found = report(result, Slo())
    assert (found.requests, found.skipped) == (4, 1)
    served = sum(reason in ("stop", "length") for reason in result.reasons)
    assert served < 3
    assert found.good_share == served / 4
    assert Slo().share(result) == served / 4
    assert Score.of(result, Slo()).good_share == served / 4
    assert "of these too long, not served" in table({"one": found})


def test_jains_index():
    assert jain_index([2.0, 2.0, 2.0]) == 1.0
    assert jain_index([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert jain_index([]) == 1.0


def test_targets():
    slo = Slo.parse("ttft=0.5,tpot=0.05")
    assert (slo.ttft, slo.tpot, slo.e2e) == (0.5, 0.05, np.inf)
    assert str(slo) == "ttft=0.5,tpot=0.05"
    for text in ("ttft", "ttft=fast", "ttft=-1", "latency=3"):
        with pytest.raises(ValueError, match="it must be NAME=SECONDS"):
            Slo.parse(text)


def test_the_capacity_is_where_the_share_falls():
    trace = make_trace("t", np.arange(100) * 0.5, 10, 5)
    found = search_capacity(parts_of(trace, 3), lambda part: 1.0 if part.rate <= 7.0 else 0.5, tolerance=0.01)
    assert len(found.rates) == 3
    assert all(7.0 / 1.01 <= rate <= 7.0 for rate in found.rates)
    with pytest.raises(ValueError, match="too loose"):
        search_capacity([trace], lambda part: 1.0)
    with pytest.raises(ValueError, match="one by one"):
        search_capacity([trace], lambda part: 0.0)


def test_a_simulated_capacity_lies_between_idle_and_overload():
    config, device, costs = make_config(), make_device(), SimpleCosts(step=0.05)
    slo = Slo(ttft=0.5)
    trace = synthetic_trace(SyntheticConfig(rate=1.0, count=150, prompt="10-20", output="5-15"))

    def share(part):
        return slo.share(simulate(config, part, costs, device))

    found = search_capacity([trace], share, target=0.9, tolerance=0.05)
    assert share(trace.faster(found.rate / trace.rate * 0.9)) >= 0.9
    assert share(trace.faster(found.rate / trace.rate * 1.3)) < 0.9


def test_options_reach_every_section():
    config = with_options(make_config(), {"policy": "sjf", "watermark": 0.1, "page_size": 32, "max_model_len": 128})
    assert config.scheduler.policy == "sjf"
    assert config.scheduler.admission.watermark == 0.1
    assert (config.cache.page_size, config.max_model_len) == (32, 128)
    with pytest.raises(ValueError, match="option 'speed' is unknown"):
        with_options(config, {"speed": 3})


def test_a_setup_takes_pages_from_the_configuration_or_the_target():
    target = find_target("configs/targets/h200.json")
    assert target.name == "h200"
    fixed = set_up(make_config(num_pages=77, swap_space=1.0), target=target)
    page = 2 * 2 * 16 * 3 * 4 * 16
    assert fixed.device.num_pages == 77
    assert fixed.device.num_host_pages == 2**30 // page
    assert set_up(make_config(), target=target).device.num_pages == 4 * 512 // 16 + 1
    assert set_up(make_config(kv_cache_memory_bytes=50 * page), target=target).device.num_pages == 50
    with pytest.raises(ValueError, match="no target and no measured costs"):
        set_up(make_config(num_pages=77))


def test_the_command_line_compares_draws_and_writes(tmp_path, capsys):
    arguments = [
        "--config=llama.gin",
        "--trace=synthetic:count=30,rate=20,tenants=a/b",
        "--compare",
        "policy=fcfs,fair",
        "replicas=1,2",
        "--slo=ttft=1",
        f"--plot={tmp_path / 'plots'}",
        f"--json={tmp_path / 'out.json'}",
    ]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "policy=fair, replicas=2" in out
    assert "roofline, LlamaForCausalLM in bfloat16 on NVIDIA H200" in out
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["runs"]) == 4
    assert all(run["requests"] == 30 for run in found["runs"].values())
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"latency.png", "over_time.png", "tenants.png"}


def test_the_command_line_serves_agents_and_tells_what_the_cache_finds(tmp_path, capsys):
    arguments = [
        "--config=llama.gin",
        "--trace=agent:sessions=4,turns=5,rate=2",
        "--compare",
        "enable_prefix_caching=True,False",
        f"--plot={tmp_path / 'plots'}",
        f"--json={tmp_path / 'out.json'}",
    ]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "agent: 20 requests of 4 sessions in" in out
    bound = float(out.split("would find ")[1].split(" %")[0])
    on, off = json.loads((tmp_path / "out.json").read_text())["runs"].values()
    assert off["hit_rate"] == off["cached_tokens"] == 0
    assert 100 * on["hit_rate"] == pytest.approx(bound, abs=5)
    assert on["cached_tokens"] == on["hit_rate"] * on["prompt_tokens"]
    assert on["ttft"]["mean"] < off["ttft"]["mean"]
    (row,) = [line for line in out.splitlines() if line.startswith("cached prompt tokens, %")]
    assert [float(cell) for cell in row.split()[-2:]] == [pytest.approx(100 * on["hit_rate"], abs=0.01), 0.0]
    assert (tmp_path / "plots" / "cached.png").stat().st_size > 5000


def test_values_of_a_comparison_may_hold_commas_and_combinations_may_be_refused(tmp_path, capsys):
    arguments = ["--config=llama.gin", "--trace=synthetic:count=20,rate=40,tenants=a:1/b:1", "--compare"]
    assert command.main([*arguments, "policy=fair", "tenant_weights={'a':2,'b':1},{'a':1}"]) == 0
    assert "tenant_weights={'a': 2, 'b': 1}" in capsys.readouterr().out
    assert command.main([*arguments, "mode=continuous,dynamic", "formation=greedy,hybrid"]) == 0
    printed = capsys.readouterr()
    assert "mode=dynamic, formation=hybrid: left out, formation is 'hybrid'" in printed.err
    assert "mode=dynamic, formation=greedy" in printed.out


def test_runs_are_named_by_what_differs(capsys):
    arguments = ["--config=llama.gin", "--trace=synthetic:count=5,rate=40", "--compare"]
    assert command.main([*arguments, "policy=fcfs,sjf", "max_num_batched_tokens=512"]) == 0
    out = capsys.readouterr().out
    assert "policy=sjf:" in out
    assert "max_num_batched_tokens" not in out
    assert command.main([*arguments, "max_num_batched_tokens=512"]) == 0
    assert "max_num_batched_tokens=512:" in capsys.readouterr().out


def test_lengths_that_are_cut_are_counted(capsys):
    trace = "--trace=synthetic:count=40,rate=40,prompt=10/200/300,output=5,max_length=100"
    assert command.main(["--config=llama.gin", trace]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "cut" in line]
    assert said == ["synthetic: 26 prompts of 40 are cut to max_length 100 tokens"]


@pytest.mark.parametrize("parser", [command.make_parser(), tune.make_parser()])
def test_defaults_are_said(parser):
    text = " ".join(parser.format_help().split())
    assert "(default h200, none where costs are measured)" in text
    assert f"of the trace alone ({'default 2,000' if 'tune' in parser.prog else 'default: all'})" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("load_profile=false", "load_profile is 'false'; it must be True or False"),
        ("tenant_weights=3", "tenant_weights is 3; it must be a mapping"),
        ("max_num_seqs=0,-1", "--compare leaves nothing to simulate"),
    ],
)
def test_faulty_values_of_a_comparison(options, message, capsys):
    with pytest.raises(SystemExit):
        command.main(["--config=llama.gin", "--trace=synthetic:count=20,rate=40", "--compare", options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--efficiency=mem=0.5"], "--efficiency has mem; known are memory, compute"),
        (["--capacity=0.9", "--slo=ttft=0.5", "--rounds=0"], "capacity rounds is 0"),
        (["--json=/nowhere/at/all.json"], "No such file or directory"),
    ],
)
def test_faults_of_the_command_line_are_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--config=llama.gin", "--trace=synthetic:count=20,rate=40", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_command_line_finds_a_capacity(tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:15:{number // 2:02d}.{5 * (number % 2)},1000,100" for number in range(40)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines) + "\n")
    arguments = ["--config=llama.gin", f"--trace={trace}", "--capacity=0.9", "--rounds=2", "--slo=ttft=0.2,tpot=0.02"]
    assert command.main([*arguments, f"--plot={tmp_path}"]) == 0
    assert "90 % within ttft=0.2,tpot=0.02 up to" in capsys.readouterr().out
    assert (tmp_path / "capacity.png").is_file()


def test_a_capacity_counts_requests_that_are_too_long(tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    prompts = [140000 if number % 5 == 0 else 2000 for number in range(40)]
    lines = [f"{number},{prompt},10" for number, prompt in enumerate(prompts)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines) + "\n")
    arguments = ["--config=llama.gin", f"--trace={trace}", "--rounds=1", "--slo=ttft=0.1"]
    assert command.main([*arguments, "--capacity=0.8"]) == 0
    assert "8 of 40 requests are too long and count as missed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main([*arguments, "--capacity=0.9"])
    assert "misses its targets even when requests come one by one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace=nowhere.csv"], "nowhere.csv"),
        (["--trace=synthetic:rate=0"], "synthetic rate is 0.0"),
        (["--compare", "policy"], "it must be NAME=VALUE"),
        (["--compare", "policy=best"], "policy is 'best'"),
        (["--slo=x=1"], "it must be NAME=SECONDS"),
        (["--target=h900"], "target 'h900' is unknown"),
        (["--model-cost=none.json"], "costs none.json cannot be read"),
        (["--fleet=speed=3"], "--fleet has speed"),
        (["--target=cpu"], "target cpu is this machine, whose rates are not known; measure its steps"),
        (["--limit=0"], "--limit is 0; it must be at least 1"),
        (["--limit=-3"], "--limit is -3; it must be at least 1"),
        (["--capacity=0.9"], "--capacity needs targets to keep: give --slo"),
        (["--compare", "polcy=fcfs,sjf"], "--compare 'polcy' is unknown; did you mean policy?"),
        (["--compare", "replica=1,2"], "--compare 'replica' is unknown; did you mean replicas?"),
        (["--compare", "policy=fcfs", "policy=sjf"], "--compare has 'policy' twice; give its values together"),
        (["--compare", "policy=fcfs,fcfs"], "has the value 'fcfs' twice"),
        (["--client-max-tokens=some"], "client max_tokens is 'some'"),
    ],
)
def test_faults_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--config=llama.gin", *arguments])
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
