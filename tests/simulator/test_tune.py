"""The search for options, the file that it writes, and traces served by the engine in real time."""

import numpy as np
import pytest

from jaxserve import tune
from jaxserve.config import gin_config
from jaxserve.runner.fake import FakeRunner
from jaxserve.simulator import tune_run as tuning
from jaxserve.simulator.replay import replay
from jaxserve.simulator.search import Score, candidates, owner_of, search_space, stressed, successive_halving
from jaxserve.simulator.setup import with_options
from jaxserve.simulator.simulation import ClientRule, simulate
from jaxserve.simulator.simulation_report import Slo
from jaxserve.simulator.synthetic import SyntheticConfig, synthetic_trace
from jaxserve.simulator.traces import make_trace
from tests.simulator.helpers import SimpleCosts, make_config, make_device

SLO = Slo(ttft=1.0)


def serve(config, trace):
    return simulate(config, trace, SimpleCosts(step=0.02, token=1e-3), make_device())


def busy_trace(count=160):
    return synthetic_trace(SyntheticConfig(rate=12, count=count, prompt="10-200", output="2-40"))


def test_candidates_are_valid_different_and_reproducible():
    config = make_config()
    space = search_space(config, busy_trace())
    found = candidates(config, space, 20, seed=3)
    assert found == candidates(config, space, 20, seed=3) != candidates(config, space, 20, seed=4)
    assert found[0] == {}
    assert all(found.count(options) == 1 for options in found)
    for options in found:
        with_options(config, options)  # raises where a combination is refused


def test_the_deadline_policy_aims_at_the_targets():
    config = make_config()
    found = candidates(config, search_space(config, busy_trace()), 40, seed=3, slo=Slo(ttft=0.25))
    aiming = [options for options in found if "ttft_target" in options]
    assert aiming
    assert aiming == [options for options in found if options.get("policy") == "deadline"]
    assert all(options["ttft_target"] == 0.25 and "tpot_target" not in options for options in aiming)


def test_policies_are_tried_where_the_trace_has_what_they_go_by():
    config = make_config()
    plain = search_space(config, make_trace("t", [0.0, 1.0], 5, 5))["policy"]
    rich = search_space(config, make_trace("t", [0.0, 1.0], 5, 5, tenants=["a", "b"], priorities=[0, 9]))["policy"]
    assert set(rich) - set(plain) == {"fair", "priority"}


def test_halving_keeps_the_best_and_the_configuration_itself():
    config, trace = make_config(max_num_seqs=2), busy_trace()
    tables = successive_halving(config, trace, SLO, serve, count=9, seed=1)
    assert len(tables[0]) == 9
    assert [table[0].requests for table in tables] == [18, 53, 160]
    for table in tables:
        scores = [trial.score for trial in table]
        assert scores == sorted(scores, reverse=True)
        assert {} in [trial.options for trial in table]
    best, before = tables[-1][0], next(trial for trial in tables[-1] if not trial.options)
    assert best.score.goodput > 1.2 * before.score.goodput
    assert best.score == Score.of(serve(with_options(config, best.options), trace), SLO)


def test_what_refuses_more_requests_is_left_out():
    # Without chunks, prompts longer than a step are refused, and what is left is quickly done.
    trace = make_trace("t", np.arange(60) * 0.1, [20, 120] * 30, 4)
    config = make_config(max_num_batched_tokens=128, max_num_seqs=8, enable_chunked_prefill=False)
    tables = successive_halving(config, trace, SLO, serve, count=20, seed=1)
    tried = {
        options.get("max_num_batched_tokens", 128) for options in candidates(config, search_space(config, trace), 20, 1)
    }
    assert min(tried) < 120
    assert all(trial.options.get("max_num_batched_tokens", 128) >= 120 for table in tables for trial in table)


def test_a_trace_is_sped_up_until_it_hurts():
    config, trace = make_config(), busy_trace(80)
    slow = trace.faster(0.1)
    factor = stressed(config, slow, SLO, serve)
    assert SLO.met(serve(config, slow.faster(factor / 1.25))).mean() >= 0.9
    assert SLO.met(serve(config, slow.faster(factor))).mean() < 0.9
    with pytest.raises(ValueError, match="too loose to tune"):
        stressed(config, slow, Slo(), serve)


def test_the_owner_of_an_option_is_its_section():
    config = make_config()
    assert type(owner_of(config, "watermark")).__name__ == "AdmissionConfig"
    assert type(owner_of(config, "page_size")).__name__ == "CacheConfig"
    with pytest.raises(ValueError, match="'speed' is unknown"):
        owner_of(config, "speed")


def test_the_file_is_a_configuration_with_its_evidence(tmp_path, capsys):
    output = tmp_path / "tuned.gin"
    arguments = [
        "--config=llama.gin",
        "--gin.SchedulerConfig.max_num_seqs=16",
        "--gin.SchedulerConfig.policy=fcfs",
        "--trace=synthetic:count=60,rate=40",
        "--slo=ttft=0.3,tpot=0.03",
        "--candidates=6",
        "--rungs=2",
        f"--output={output}",
    ]
    assert tune.main(arguments) == 0
    text = output.read_text()
    assert text.startswith("# python -m jaxserve.tune --config=llama.gin --gin.SchedulerConfig.max_num_seqs=16")
    assert str(tmp_path) not in text
    assert "# engine: not confirmed, the model is not at hand" in text
    assert "# simulation, before: goodput" in text
    server, _ = gin_config.load(str(output))
    changed = [line for line in text.splitlines() if "# was" in line]
    assert changed
    assert "max_num_seqs = 16\n" in text
    assert server.engine.architecture.hidden_size == 4096
    assert "written: tuned.gin" in capsys.readouterr().out


def test_a_configuration_is_never_written_over_itself(tmp_path, capsys):
    mine = tmp_path / "mine.gin"
    mine.write_text("include 'llama.gin'\n")
    arguments = [f"--config={mine}", "--trace=synthetic:count=20,rate=40", f"--output={mine}", "--candidates=1"]
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert "--output mine.gin is the configuration itself; name another file" in capsys.readouterr().err
    assert mine.read_text() == "include 'llama.gin'\n"


def test_a_file_that_cannot_be_read_is_not_written(tmp_path):
    output = tmp_path / "tuned.gin"
    output.write_text("# before")
    with pytest.raises(ValueError, match="no_such"):
        tuning.write_readable(output, "no_such.setting = 3\n", gin_config.load)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.gin"]
    assert output.read_text() == "# before"


def test_the_engine_confirms(monkeypatch, tmp_path):
    made = []

    def runner(config):
        made.append(config)
        return FakeRunner(num_pages=65, page_size=16, max_model_len=256)

    config, trace = make_config(), make_trace("t", np.arange(12) * 0.02, 20, 5)
    trial = tuning.Trial({"policy": "sjf"}, 12, Score(1.0, 1.0, -1.0, 1.0))
    parsed = tune.make_parser().parse_args(["--confirm-seconds=0.1"])
    found = tuning.confirm(config, trace, Slo(ttft=30.0), ClientRule(), tuning.Evidence(trial, trial), parsed, runner)
    assert [each.scheduler.policy for each in made] == ["fcfs", "sjf"]
    assert found.engine_requests == 5
    assert found.engine_after is not None
    assert found.engine_after.good_share == 1.0
    # What the engine refutes is not set.
    scores = iter([Score(2.0, 1.0, -1.0, 1.0), Score(1.0, 1.0, -1.0, 1.0)])
    monkeypatch.setattr(tuning, "replay", lambda *arguments, **options: None)
    monkeypatch.setattr(Score, "of", lambda result, slo: next(scores))
    before = tuning.Trial({}, 12, Score(0.5, 1.0, -1.0, 1.0))
    found = tuning.confirm(config, trace, Slo(ttft=30.0), ClientRule(), tuning.Evidence(trial, before), parsed, runner)
    assert found.best is before
    assert found.refuted is trial


def test_the_engine_refutes_beyond_a_tolerance():
    base = Score(2.0, 100.0, -1.0, 1.0)
    for goodput, tokens, promptness, below in (
        (1.95, 100.0, -1.0, False),
        (1.8, 200.0, -0.1, True),
        (1.95, 90.0, -1.0, True),
        (2.0, 100.0, -1.04, False),
        (2.0, 100.0, -1.2, True),
        (1.95, 120.0, -9.0, False),
        (2.05, 10.0, -9.0, False),
    ):
        assert Score(goodput, tokens, promptness, 1.0).clearly_below(base, tuning.REFUTED) is below
    never = Score(0.0, 0.0, -np.inf, 0.0)
    assert not never.clearly_below(never, tuning.REFUTED)
    assert never.clearly_below(base, tuning.REFUTED)


def test_where_nothing_is_better_the_file_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "successive_halving", lambda config, *rest, **named: [trials(config)] * 2)
    output = tmp_path / "tuned.gin"
    assert tune.main(["--config=llama.gin", "--trace=synthetic:count=20,rate=40", f"--output={output}"]) == 0
    said = "none of 1 others simulated better: no option is better than the configuration, which stays as it is"
    assert said in capsys.readouterr().out
    text = output.read_text()
    assert f"# {said}" in text
    assert "simulation, after" not in text
    assert "# was" not in text
    assert gin_config.load(str(output))[0] == gin_config.load("llama.gin")[0]


def test_candidates_that_all_refuse_more_are_no_options(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "successive_halving", lambda config, *rest, **named: [trials(config)[:1]])
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--config=llama.gin", "--trace=synthetic:count=20,rate=40", f"--output={tmp_path / 'tuned.gin'}"])
    assert "none of the other 53 candidates can serve the trace" in capsys.readouterr().err


def trials(config):
    own = tuning.Trial({}, 20, Score(2.0, 1.0, -1.0, 1.0))
    return [own, tuning.Trial({"policy": "sjf"}, 20, Score(1.0, 1.0, -1.0, 1.0))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--candidates=1"], "--candidates 1 leaves no options to try"),
        (["--stress"], "--stress needs targets to miss: give --slo"),
        (["--limit=0"], "--limit is 0; it must be at least 1"),
    ],
)
def test_nothing_to_try_is_said_at_once(options, message, tmp_path, capsys):
    output = tmp_path / "tuned.gin"
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--config=llama.gin", "--trace=synthetic:count=20,rate=40", f"--output={output}", *options])
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_the_engine_serves_a_trace_as_long_as_it_says():
    trace = make_trace("t", np.arange(20) * 0.01, np.arange(20) * 7 % 60 + 1, np.arange(20) % 9 + 1, tenants="a")
    runner = FakeRunner(num_pages=65, page_size=16, max_model_len=256)
    result = replay(make_config(), runner, trace, client=ClientRule(64))
    assert result.output_tokens.tolist() == trace.output_tokens.tolist()
    assert set(result.reasons) == {"stop"}
    assert (result.ttft > 0).all()
    assert (result.finished >= result.first_token).all()
    assert (result.scheduled >= trace.arrivals).all()
    assert [len(times) for times in result.token_times] == trace.output_tokens.tolist()
    assert result.steps[0]["prefill_tokens"].sum() == trace.prompt_tokens.sum()


def test_the_engine_waits_for_a_static_batch():
    trace = make_trace("t", [0.0, 0.02, 0.3], 10, 3)
    config = make_config(mode="static", batch_size=2, max_wait_seconds=0.1)
    result = replay(config, FakeRunner(num_pages=65, page_size=16, max_model_len=256), trace)
    assert result.completed.all()
    assert result.scheduled[0] >= 0.02
    assert result.scheduled[2] >= 0.4
